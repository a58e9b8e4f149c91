"""TransUNet: a residual network, a vision transformer on its features, a cascade up (arXiv 2102.04306). 2D."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightm.nets.baselines.attention import MLP, Attention
from lightm.nets.baselines.common import Baseline, needed
from lightm.nets.baselines.resnet import ResNet

REDUCTION = 16  # pixels of the image along each side of a token


class Block(nn.Module):
    """x + attention(LayerNorm(x)), then x + MLP(LayerNorm(x)): a layer of ViT (arXiv 2010.11929)."""

    def __init__(self, channels: int, heads: int, mlp: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels, eps=1e-6), nn.LayerNorm(channels, eps=1e-6)
        self.attention = Attention(channels, heads)
        self.mlp = MLP(channels, mlp, dropout)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attention(normed, normed)
        return x + self.mlp(self.norm2(x))


def _conv_norm_relu(inputs: int, outputs: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class TransUNet(nn.Module):
    """R50-ViT with the cascaded upsampler: skips at 1/8, 1/4 and 1/2 join, the last step to full size has none."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: Sequence[int],
        *,
        depths: Sequence[int],
        width: int,
        hidden: int,
        layers: int,
        heads: int,
        mlp: int,
        dropout: float,
        decoder: Sequence[int],
    ) -> None:
        super().__init__()
        self.grid = tuple(length // REDUCTION for length in image_size)
        self.cnn = ResNet(2, in_channels, depths=depths, width=width, strides=(1, 2, 2), standardised=True)
        self.embed = nn.Conv2d(self.cnn.channels, hidden, 1)
        self.positions = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], hidden))
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.Sequential(*(Block(hidden, heads, mlp, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(hidden, eps=1e-6)
        channels = 8 * width
        self.bottom = _conv_norm_relu(hidden, channels)
        self.steps = nn.ModuleList()
        for skip, out in zip((8 * width, 4 * width, width, 0), decoder, strict=True):
            self.steps.append(nn.Sequential(_conv_norm_relu(channels + skip, out), _conv_norm_relu(out, out)))
            channels = out
        self.head = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        *skips, deepest = self.cnn(image)
        tokens = self.embed(deepest).flatten(2).transpose(1, 2)  # (B, L, hidden)
        tokens = self.norm(self.layers(self.dropout(tokens + self.positions)))
        x = self.bottom(tokens.transpose(1, 2).unflatten(2, self.grid))
        for step in self.steps:
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)
            x = step(torch.cat([x, skips.pop()], dim=1) if skips else x)
        return self.head(x)


def transunet(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    image_size: Sequence[int] | None,
    *,
    depths: Sequence[int] = (3, 4, 9),
    width: int = 64,
    hidden: int = 768,
    layers: int = 12,
    heads: int = 12,
    mlp: int = 3072,
    dropout: float = 0.1,
    decoder: Sequence[int] = (256, 128, 64, 16),
) -> Baseline:
    """TransUNet with its R50-ViT-B/16 configuration; raises ValueError for 3D, which the paper does not define."""
    if spatial_dims != 2:
        raise ValueError("TransUNet is defined for 2D images alone; in 3D use unetr, swinunetr or nnformer")
    size = needed(image_size, "a vision transformer learns a position for every part of it")
    for axis, length in zip("YX", size, strict=True):
        if length % REDUCTION or not length:
            near = length // REDUCTION * REDUCTION + REDUCTION
            raise ValueError(f"image_size {size}: {axis}={length} is not divisible by {REDUCTION}; use {near}")
    body = TransUNet(
        in_channels,
        out_channels,
        size,
        depths=depths,
        width=width,
        hidden=hidden,
        layers=layers,
        heads=heads,
        mlp=mlp,
        dropout=dropout,
        decoder=decoder,
    )
    return Baseline(body, in_channels=in_channels, divisor=[REDUCTION] * 2, image_size=size, one_voxel=False)
