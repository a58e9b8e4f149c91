"""Transformers: TransUNet (arXiv 2102.04306) in 2D and nnFormer (arXiv 2109.03201) in 3D, and their attention."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightm.nets.baselines.common import Baseline, Shape
from lightm.nets.baselines.deeplab import ResNet

REDUCTION = 16  # pixels of the image along each side of a token of TransUNet
WINDOW = 4  # voxels of the feature maps along each side of a local volume of nnFormer


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d) + bias) V on tokens: (B, N, C), (B, M, C) -> (B, N, C).

    Source: arXiv 1706.03762; with `window`, a learnt bias for each head and each distance within the window, as in
    arXiv 2103.14030. `project_query=False` takes the query as it is: nnFormer's skip attention.
    Parameters: 4 C^2 + 4 C, less C^2 + C without the query's projection; heads * prod(2 w - 1) for the bias.
    """

    index: Tensor

    def __init__(
        self, channels: int, heads: int, *, window: Sequence[int] | None = None, project_query: bool = True
    ) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels are not divisible by {heads} heads")
        self.heads = heads
        self.query = nn.Linear(channels, channels) if project_query else None
        self.key_value = nn.Linear(channels, 2 * channels)
        self.out = nn.Linear(channels, channels)
        self.table: nn.Parameter | None = None
        if window is not None:
            self.table = nn.Parameter(torch.zeros(heads, prod(2 * length - 1 for length in window)))
            nn.init.trunc_normal_(self.table, std=0.02)
            self.register_buffer("index", _distances(window), persistent=False)

    def forward(self, query: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask`: (windows, N, N) of what is added to the scores, B being a multiple of the windows."""
        q = query if self.query is None else self.query(query)
        k, v = self.key_value(context).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        added: Tensor | None = None
        if self.table is not None:
            added = self.table[:, self.index].unsqueeze(0)  # (1, heads, N, N)
            if mask is not None:
                added = (added + mask.unsqueeze(1)).repeat(len(query) // len(mask), 1, 1, 1)
            added = added.to(q.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=added)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Sequential):
    """Linear C -> hidden, GELU, linear back, with dropout behind each: 2 C hidden + C + hidden parameters."""

    def __init__(self, channels: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__(
            nn.Linear(channels, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, channels),
            nn.Dropout(dropout),
        )


def _distances(window: Sequence[int]) -> Tensor:
    """For each pair of voxels of a window the number of their distance: (N, N), N = prod(window)."""
    grids = torch.meshgrid(*(torch.arange(length) for length in window), indexing="ij")
    places = torch.stack([grid.flatten() for grid in grids])  # (d, N)
    apart = places[:, :, None] - places[:, None, :]
    number = torch.zeros_like(apart[0])
    for axis, length in enumerate(window):
        number = number * (2 * length - 1) + apart[axis] + length - 1
    return number


class ViTLayer(nn.Module):
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
        shape: Shape,
        image_size: Sequence[int],
        *,
        depths: Sequence[int] = (3, 4, 9),
        width: int = 64,
        hidden: int = 768,
        layers: int = 12,
        heads: int = 12,
        mlp: int = 3072,
        dropout: float = 0.1,
        decoder: Sequence[int] = (256, 128, 64, 16),
    ) -> None:
        super().__init__()
        self.grid = tuple(length // REDUCTION for length in image_size)
        self.cnn = ResNet(2, shape.in_channels, depths=depths, width=width, strides=(1, 2, 2), standardised=True)
        self.embed = nn.Conv2d(self.cnn.channels, hidden, 1)
        self.positions = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], hidden))
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.Sequential(*(ViTLayer(hidden, heads, mlp, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(hidden, eps=1e-6)
        channels = 8 * width
        self.bottom = _conv_norm_relu(hidden, channels)
        self.steps = nn.ModuleList()
        for skip, out in zip((8 * width, 4 * width, width, 0), decoder, strict=True):
            self.steps.append(nn.Sequential(_conv_norm_relu(channels + skip, out), _conv_norm_relu(out, out)))
            channels = out
        self.head = nn.Conv2d(channels, shape.out_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        *skips, deepest = self.cnn(image)
        tokens = self.embed(deepest).flatten(2).transpose(1, 2)  # (B, L, hidden)
        tokens = self.norm(self.layers(self.dropout(tokens + self.positions)))
        x = self.bottom(tokens.transpose(1, 2).unflatten(2, self.grid))
        for step in self.steps:
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)
            x = step(torch.cat([x, skips.pop()], dim=1) if skips else x)
        return self.head(x)


def transunet(shape: Shape, **options: Any) -> Baseline:
    """TransUNet with its R50-ViT-B/16 configuration; raises ValueError for 3D, which the paper does not define."""
    if shape.spatial_dims != 2:
        raise ValueError("TransUNet is defined for 2D images alone; in 3D use unetr, swinunetr or nnformer")
    size = shape.needed_size("a vision transformer learns a position for every part of it", (REDUCTION, REDUCTION))
    return shape.baseline(TransUNet(shape, size, **options), REDUCTION, image_size=size, one_voxel=False)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, *S)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def to_windows(x: Tensor, window: Sequence[int]) -> Tensor:
    """(B, Z, Y, X, C) -> (B * windows, voxels of a window, C); sizes are multiples of the window."""
    b, (z, y, w), c = x.shape[0], window, x.shape[-1]
    x = x.reshape(b, x.shape[1] // z, z, x.shape[2] // y, y, x.shape[3] // w, w, c)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, z * y * w, c)


def from_windows(x: Tensor, window: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Undo `to_windows`; `shape` is (Z, Y, X)."""
    z, y, w = window
    counts = [length // side for length, side in zip(shape, window, strict=True)]
    x = x.reshape(-1, *counts, z, y, w, x.shape[-1])
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, *shape, x.shape[-1])


def shift_mask(shape: Sequence[int], window: Sequence[int], shifts: Sequence[int]) -> Tensor:
    """(windows, N, N): 0 within what was neighbouring before the cyclic shift, minus infinity across its seams."""
    regions = torch.zeros(1, *shape, 1)
    parts = [
        [slice(0, -side), slice(-side, -shift), slice(-shift, None)] if shift else [slice(None)]
        for side, shift in zip(window, shifts, strict=True)
    ]
    for number, (z, y, x) in enumerate(product(*parts)):
        regions[0, z, y, x, 0] = number
    found = to_windows(regions, window).squeeze(-1)
    same = found[:, :, None] == found[:, None, :]
    return torch.zeros(same.shape).masked_fill(~same, float("-inf"))


class WindowLayer(nn.Module):
    """Attention in windows (shifted or not) and an MLP, each behind a LayerNorm and added to its input.

    (B, Z, Y, X, C) -> the same. With a `skip`, keys and values come from it and the query is not projected: the
    paper's skip attention.
    """

    def __init__(self, channels: int, heads: int, window: Sequence[int], *, shifted: bool, skip: bool) -> None:
        super().__init__()
        self.window, self.shifted = tuple(window), shifted
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.norm_skip = nn.LayerNorm(channels) if skip else None
        self.attention = Attention(channels, heads, window=window, project_query=not skip)
        self.mlp = MLP(channels, 4 * channels)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        shape = tuple(x.shape[1:4])
        query = self.norm1(x)
        context = query if skip is None or self.norm_skip is None else self.norm_skip(skip)
        # a window that spans the axis has nowhere to shift to
        shifts = [
            side // 2 if self.shifted and side < length else 0 for side, length in zip(self.window, shape, strict=True)
        ]
        mask = None
        if any(shifts):
            back = [-shift for shift in shifts]
            query, context = (torch.roll(t, back, (1, 2, 3)) for t in (query, context))
            mask = shift_mask(shape, self.window, shifts).to(x.device)
        mixed = self.attention(to_windows(query, self.window), to_windows(context, self.window), mask)
        mixed = from_windows(mixed, self.window, shape)
        if any(shifts):
            mixed = torch.roll(mixed, shifts, (1, 2, 3))
        x = x + mixed
        return x + self.mlp(self.norm2(x))


class NNFormer(nn.Module):
    """Embedding, two local stages, one global one, the global bottleneck; then the stages up with skip attention.

    Every stage has two layers, in local stages one plain and one shifted. Going down: LayerNorm and a strided
    convolution of 3; up: LayerNorm and a transposed one of 2; last, one of the embedding's size to the classes.
    """

    def __init__(
        self, shape: Shape, image_size: Sequence[int], *, base_channels: int, heads: Sequence[int], patch: Sequence[int]
    ) -> None:
        super().__init__()
        half, second = base_channels // 2, tuple(side // 2 for side in patch)
        self.embed = nn.Sequential(
            nn.Conv3d(shape.in_channels, half, 3, 2, 1),
            nn.GELU(),
            ChannelNorm(half),
            nn.Conv3d(half, half, 3, 1, 1),
            nn.GELU(),
            ChannelNorm(half),
            nn.Conv3d(half, base_channels, 3, second, 1),  # type: ignore[arg-type]
            nn.GELU(),
            ChannelNorm(base_channels),
            nn.Conv3d(base_channels, base_channels, 3, 1, 1),
            ChannelNorm(base_channels),
        )
        self.encoder, self.down = nn.ModuleList(), nn.ModuleList()
        self.decoder, self.up = nn.ModuleList(), nn.ModuleList()
        grid = [length // side for length, side in zip(image_size, patch, strict=True)]
        for depth in range(4):
            width, local = base_channels * 2**depth, depth < 2
            window = [WINDOW] * 3 if local else [length // 2**depth for length in grid]

            def layers(skip: bool, width: int = width, window: list[int] = window, depth: int = depth) -> nn.ModuleList:
                return nn.ModuleList(
                    WindowLayer(width, heads[depth], window, shifted=place == 1 and depth < 2, skip=skip and place == 0)
                    for place in range(2)
                )

            self.encoder.append(layers(False))
            if depth < 3:
                self.down.append(nn.Sequential(ChannelNorm(width), nn.Conv3d(width, 2 * width, 3, 2, 1)))
                self.up.insert(0, nn.Sequential(ChannelNorm(2 * width), nn.ConvTranspose3d(2 * width, width, 2, 2)))
                self.decoder.insert(0, layers(True))
        self.head_norm = ChannelNorm(base_channels)
        self.head = nn.ConvTranspose3d(base_channels, shape.out_channels, tuple(patch), tuple(patch))  # type: ignore[arg-type]

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image)
        skips: list[Tensor] = []
        for depth, stage in enumerate(self.encoder):
            x = x.movedim(1, -1).contiguous()
            for layer in stage:  # type: ignore[attr-defined]
                x = layer(x)
            skips.append(x)
            x = x.movedim(-1, 1).contiguous()
            if depth < 3:
                x = self.down[depth](x)
        skips.pop()
        for up, stage in zip(self.up, self.decoder, strict=True):
            x = up(x).movedim(1, -1).contiguous()
            x = stage[0](x, skips.pop())  # type: ignore[index]
            x = stage[1](x).movedim(-1, 1).contiguous()  # type: ignore[index]
        return self.head(self.head_norm(x))


def nnformer(
    shape: Shape, *, base_channels: int = 192, heads: Sequence[int] = (6, 12, 24, 48), patch: Sequence[int] = (4, 4, 4)
) -> Baseline:
    """nnFormer in its widest configuration; raises ValueError for 2D, which the paper does not define.

    `patch`: voxels of the image along each side of a token, 2 or 4 an axis: 2 for thick slices.
    """
    if shape.spatial_dims != 3:
        raise ValueError("nnFormer is defined for 3D images alone; in 2D use transunet, unetr or swinunetr")
    if len(patch) != 3 or any(side not in (2, 4) for side in patch):
        raise ValueError(f"patch {tuple(patch)}: three sides of 2 or 4 are needed")
    if base_channels % 2 or len(heads) != 4 or any(base_channels * 2**i % count for i, count in enumerate(heads)):
        raise ValueError(
            f"heads {tuple(heads)}: four counts are needed that divide base_channels={base_channels}, doubling"
        )
    divisor = [8 * side for side in patch]
    size = shape.needed_size("its global attention spans the whole of it", divisor)
    body = NNFormer(shape, size, base_channels=base_channels, heads=heads, patch=patch)
    return shape.baseline(body, divisor, image_size=size)
