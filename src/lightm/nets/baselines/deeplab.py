"""DeepLabV3+ (arXiv 1802.02611), and the residual networks that are its backbone and TransUNet's (arXiv 1512.03385)."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightm.errors import did_you_mean
from lightm.nets.baselines.common import Baseline, Shape, linear_mode, of_dims

EXPANSION = 4  # a residual unit's output channels over its inner ones
DEPTHS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
MULTI_GRID = (2, 4, 8)  # the last stage's stride of 2 made into dilation, times the paper's grid 1, 2, 4


def group_norm(channels: int, least: int = 4) -> nn.GroupNorm:
    """GroupNorm of 32 groups, of fewer where a group would have less than `least` channels.

    A group of two channels at a single voxel is plus and minus one whatever its input, with wild gradients.
    """
    return nn.GroupNorm(gcd(32, max(1, channels // least)), channels)


class Convolution(nn.Module):
    """A convolution without bias that keeps the size (over its stride).

    `standardised`: its kernels have mean 0 and variance 1 (weight standardisation, arXiv 1903.10520).
    """

    def __init__(
        self,
        spatial_dims: int,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        standardised: bool = False,
    ) -> None:
        super().__init__()
        self.standardised = standardised
        pad = dilation * (kernel // 2)
        self.conv = of_dims("Conv", spatial_dims)(inputs, outputs, kernel, stride, pad, dilation, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.standardised:
            return self.conv(x)
        layer = self.conv
        axes = tuple(range(1, layer.weight.ndim))
        variance, mean = torch.var_mean(layer.weight, dim=axes, keepdim=True, unbiased=False)
        weight = (layer.weight - mean) * torch.rsqrt(variance + 1e-5)
        run = F.conv3d if layer.weight.ndim == 5 else F.conv2d
        return run(x, weight, None, layer.stride, layer.padding, layer.dilation)


class Unit(nn.Module):
    """Convolutions of 1, 3 and 1 with norms, plus the input: `width` inside, four times that outside."""

    def __init__(
        self, spatial_dims: int, inputs: int, width: int, *, stride: int, dilation: int, standardised: bool
    ) -> None:
        super().__init__()
        outputs, least = EXPANSION * width, 2 if standardised else 4  # two in the network that BiT published
        self.path = nn.Sequential(
            Convolution(spatial_dims, inputs, width, 1, standardised=standardised),
            group_norm(width, least),
            nn.ReLU(),
            Convolution(spatial_dims, width, width, 3, stride=stride, dilation=dilation, standardised=standardised),
            group_norm(width, least),
            nn.ReLU(),
            Convolution(spatial_dims, width, outputs, 1, standardised=standardised),
            group_norm(outputs, least),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                Convolution(spatial_dims, inputs, outputs, 1, stride=stride, standardised=standardised),
                group_norm(outputs, least),
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.path(x) + self.shortcut(x))


class ResNet(nn.Module):
    """Stem (7^d by 2, norm, ReLU), max pooling by 2, then stages of units; gives the features of stem and stages.

    Arguments: `depths`: units of each stage; `width` of the stem and of the first stage's units, doubling from stage
    to stage; `strides` of the stages; `dilations`: of each unit of the last stage (its multi-grid).
    (B, in, *S) -> features of `width`, 4 `width`, 8 `width`, ... channels at 1/2, 1/4, ...
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        *,
        depths: Sequence[int],
        width: int = 64,
        strides: Sequence[int] = (1, 2, 2, 2),
        dilations: Sequence[int] = (),
        standardised: bool = False,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            Convolution(spatial_dims, in_channels, width, 7, stride=2, standardised=standardised),
            group_norm(width, 2 if standardised else 4),
            nn.ReLU(),
        )
        self.pool = of_dims("MaxPool", spatial_dims)(3, 2, 1)
        self.stages = nn.ModuleList()
        channels = width
        for number, depth in enumerate(depths):
            inner = width * 2**number
            units = []
            for place in range(depth):
                grid = dilations[place % len(dilations)] if dilations and number == len(depths) - 1 else 1
                stride = strides[number] if place == 0 else 1
                units.append(
                    Unit(spatial_dims, channels, inner, stride=stride, dilation=grid, standardised=standardised)
                )
                channels = EXPANSION * inner
            self.stages.append(nn.Sequential(*units))
        self.channels = channels

    def forward(self, image: Tensor) -> list[Tensor]:
        features = [self.stem(image)]
        x = self.pool(features[0])
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


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
        shape: Shape,
        *,
        backbone: str = "resnet101",
        width: int = 64,
        features: int = 256,
        low: int = 48,
        rates: Sequence[int] = (6, 12, 18),
    ) -> None:
        super().__init__()
        if backbone not in DEPTHS:
            raise ValueError(f"backbone '{backbone}'{did_you_mean(backbone, DEPTHS)} Known: {', '.join(DEPTHS)}")
        if min(width, features, low) < 4:
            raise ValueError(f"width {width}, features {features}, low {low}: 4 or more channels each are needed")
        spatial_dims = shape.spatial_dims
        self.mode = linear_mode(spatial_dims)
        self.backbone = ResNet(
            spatial_dims,
            shape.in_channels,
            depths=DEPTHS[backbone],
            width=width,
            strides=(1, 2, 2, 1),
            dilations=MULTI_GRID,
        )
        self.aspp = ASPP(spatial_dims, self.backbone.channels, features, rates)
        self.low = _layer(spatial_dims, 4 * width, low, 1)
        self.refine = nn.Sequential(
            _layer(spatial_dims, features + low, features, 3), _layer(spatial_dims, features, features, 3)
        )
        self.head = of_dims("Conv", spatial_dims)(features, shape.out_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        features = self.backbone(image)
        low = self.low(features[1])
        high = self._resize(self.aspp(features[-1]), low.shape[2:])
        return self._resize(self.head(self.refine(torch.cat([high, low], dim=1))), image.shape[2:])

    def _resize(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return F.interpolate(x, tuple(size), mode=self.mode, align_corners=False)


def deeplabv3plus(shape: Shape, **options: Any) -> Baseline:
    """DeepLabV3+ at output stride 16 on ResNet-50 or ResNet-101, with GroupNorm; in 3D all its parts in 3D."""
    return shape.baseline(DeepLabV3Plus(shape, **options), 16)
