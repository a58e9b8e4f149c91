"""Residual networks of bottleneck units (arXiv 1512.03385) as backbones, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightm.nets.baselines.common import conv

EXPANSION = 4  # a unit's output channels over its inner ones
DEPTHS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


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
        self.conv = conv(spatial_dims)(inputs, outputs, kernel, stride, pad, dilation, bias=False)

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
        self.pool = (nn.MaxPool3d if spatial_dims == 3 else nn.MaxPool2d)(3, 2, 1)
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
