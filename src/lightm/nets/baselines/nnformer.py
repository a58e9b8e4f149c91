"""nnFormer: local and global volume attention, and attention instead of skip connections (arXiv 2109.03201). 3D."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor, nn

from lightm.nets.baselines.attention import MLP, Attention
from lightm.nets.baselines.common import Baseline, needed

WINDOW = 4  # voxels of the feature maps along each side of a local volume


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


class Layer(nn.Module):
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
        self,
        in_channels: int,
        out_channels: int,
        image_size: Sequence[int],
        *,
        base_channels: int,
        heads: Sequence[int],
        patch: Sequence[int],
    ) -> None:
        super().__init__()
        half, second = base_channels // 2, tuple(side // 2 for side in patch)
        self.embed = nn.Sequential(
            nn.Conv3d(in_channels, half, 3, 2, 1),
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
                    Layer(width, heads[depth], window, shifted=place == 1 and depth < 2, skip=skip and place == 0)
                    for place in range(2)
                )

            self.encoder.append(layers(False))
            if depth < 3:
                self.down.append(nn.Sequential(ChannelNorm(width), nn.Conv3d(width, 2 * width, 3, 2, 1)))
                self.up.insert(0, nn.Sequential(ChannelNorm(2 * width), nn.ConvTranspose3d(2 * width, width, 2, 2)))
                self.decoder.insert(0, layers(True))
        self.head_norm = ChannelNorm(base_channels)
        self.head = nn.ConvTranspose3d(base_channels, out_channels, tuple(patch), tuple(patch))  # type: ignore[arg-type]

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
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    image_size: Sequence[int] | None,
    *,
    base_channels: int = 192,
    heads: Sequence[int] = (6, 12, 24, 48),
    patch: Sequence[int] = (4, 4, 4),
) -> Baseline:
    """nnFormer in its widest configuration; raises ValueError for 2D, which the paper does not define.

    `patch`: voxels of the image along each side of a token, 2 or 4 an axis: 2 for thick slices.
    """
    if spatial_dims != 3:
        raise ValueError("nnFormer is defined for 3D images alone; in 2D use transunet, unetr or swinunetr")
    size = needed(image_size, "its global attention spans the whole of it")
    if len(patch) != 3 or any(side not in (2, 4) for side in patch):
        raise ValueError(f"patch {tuple(patch)}: three sides of 2 or 4 are needed")
    if base_channels % 2 or len(heads) != 4 or any(base_channels * 2**i % count for i, count in enumerate(heads)):
        raise ValueError(
            f"heads {tuple(heads)}: four counts are needed that divide base_channels={base_channels}, doubling"
        )
    divisor = [8 * side for side in patch]
    for axis, length, side in zip("ZYX", size, divisor, strict=True):
        if length % side or not length:
            near = length // side * side + side
            raise ValueError(f"image_size {size}: {axis}={length} is not divisible by {side}; use {near}")
    body = NNFormer(in_channels, out_channels, size, base_channels=base_channels, heads=heads, patch=patch)
    return Baseline(body, in_channels=in_channels, divisor=divisor, image_size=size)
