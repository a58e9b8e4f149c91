"""DeepLabV3+: a dilated residual network, atrous spatial pyramid pooling, a short decoder (arXiv 1802.02611)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightm.errors import did_you_mean
from lightm.nets.baselines.common import Baseline, conv, linear_mode
from lightm.nets.baselines.resnet import DEPTHS, Convolution, ResNet, group_norm

MULTI_GRID = (2, 4, 8)  # the last stage's stride of 2 made into dilation, times the paper's grid 1, 2, 4


def _layer(spatial_dims: int, inputs: int, outputs: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        Convolution(spatial_dims, inputs, outputs, kernel, dilation=dilation), group_norm(outputs), nn.ReLU()
    )


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: a 1^d, three dilated 3^d convolutions and the image's mean, then projected."""

    def __init__(self, spatial_dims: int, inputs: int, outputs: int, rates: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList([_layer(spatial_dims, inputs, outputs, 1)])
        self.branches.extend(_layer(spatial_dims, inputs, outputs, 3, rate) for rate in rates)
        self.mean = _layer(spatial_dims, inputs, outputs, 1)
        self.project = _layer(spatial_dims, (len(rates) + 2) * outputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean(x.mean(tuple(range(2, x.ndim)), keepdim=True)).expand(-1, -1, *x.shape[2:])
        return self.project(torch.cat([*(branch(x) for branch in self.branches), mean], dim=1))


class DeepLabV3Plus(nn.Module):
    """Backbone at 1/16 with ASPP, upsampled to the first stage's features at 1/4, refined, upsampled to the image."""

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        depths: Sequence[int],
        width: int,
        features: int,
        low: int,
        rates: Sequence[int],
    ) -> None:
        super().__init__()
        self.mode = linear_mode(spatial_dims)
        self.backbone = ResNet(
            spatial_dims, in_channels, depths=depths, width=width, strides=(1, 2, 2, 1), dilations=MULTI_GRID
        )
        self.aspp = ASPP(spatial_dims, self.backbone.channels, features, rates)
        self.low = _layer(spatial_dims, 4 * width, low, 1)
        self.refine = nn.Sequential(
            _layer(spatial_dims, features + low, features, 3), _layer(spatial_dims, features, features, 3)
        )
        self.head = conv(spatial_dims)(features, out_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        features = self.backbone(image)
        low = self.low(features[1])
        high = self._resize(self.aspp(features[-1]), low.shape[2:])
        return self._resize(self.head(self.refine(torch.cat([high, low], dim=1))), image.shape[2:])

    def _resize(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return F.interpolate(x, tuple(size), mode=self.mode, align_corners=False)


def deeplabv3plus(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    image_size: Sequence[int] | None,
    *,
    backbone: str = "resnet101",
    width: int = 64,
    features: int = 256,
    low: int = 48,
    rates: Sequence[int] = (6, 12, 18),
) -> Baseline:
    """DeepLabV3+ at output stride 16 on ResNet-50 or ResNet-101, with GroupNorm; in 3D all its parts in 3D."""
    if backbone not in DEPTHS:
        raise ValueError(f"backbone '{backbone}'{did_you_mean(backbone, DEPTHS)} Known: {', '.join(DEPTHS)}")
    if min(width, features, low) < 4:
        raise ValueError(f"width {width}, features {features}, low {low}: 4 or more channels each are needed")
    body = DeepLabV3Plus(
        spatial_dims,
        in_channels,
        out_channels,
        depths=DEPTHS[backbone],
        width=width,
        features=features,
        low=low,
        rates=rates,
    )
    return Baseline(body, in_channels=in_channels, divisor=[16] * spatial_dims)
