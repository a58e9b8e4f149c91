"""Mamba and LightM-UNet's released network in plain PyTorch, written from their equations: oracles of the tests.

Nothing here uses LightM: `nn.Linear`, `nn.Conv*`, `nn.GroupNorm`, and the recurrence as a loop over tokens, in any
dtype. Modules carry the names of the released code, so that a state dict is one that the loader must read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class Mamba(nn.Module):
    """Mamba (arXiv 2312.00752), (B, L, C) -> (B, L, C): no normalisation inside."""

    def __init__(self, channels: int, states: int = 16, expand: int = 2, kernel_size: int = 4) -> None:
        super().__init__()
        inner, rank = expand * channels, math.ceil(channels / 16)
        self.states, self.rank = states, rank
        self.in_proj = nn.Linear(channels, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, kernel_size, groups=inner, padding=kernel_size - 1)
        self.x_proj = nn.Linear(inner, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, states + 1).repeat(inner, 1)))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = functional.silu(self.conv1d(u.transpose(1, 2))[..., :length]).transpose(1, 2)
        low, b, c = self.x_proj(u).split((self.rank, self.states, self.states), dim=-1)
        dt = functional.softplus(self.dt_proj(low))
        a = -torch.exp(self.A_log)
        h = torch.zeros(*u[:, 0].shape, self.states, dtype=x.dtype)
        outputs = []
        for t in range(length):
            decay = torch.exp(dt[:, t, :, None] * a)
            h = decay * h + (dt[:, t] * u[:, t])[..., None] * b[:, t, None, :]
            outputs.append((h * c[:, t, None, :]).sum(-1) + self.D * u[:, t])
        return self.out_proj(torch.stack(outputs, dim=1) * functional.silu(z))


class MambaLayer(nn.Module):
    """proj(norm(mamba(norm(x)) + s x)) over the voxels in raster order, the same LayerNorm twice, s one number."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.mamba = Mamba(channels)
        self.proj = nn.Linear(channels, out_channels)
        self.skip_scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = self.mamba(self.norm(tokens)) + self.skip_scale * tokens
        return self.proj(self.norm(tokens)).transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])


class Conv(nn.Module):
    """A convolution named `conv`, with "same" padding."""

    def __init__(self, dims: int, channels: int, out_channels: int, size: int, *, groups: int = 1, bias: bool) -> None:
        super().__init__()
        kind = nn.Conv2d if dims == 2 else nn.Conv3d
        self.conv = kind(channels, out_channels, size, padding=size // 2, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def depthwise(dims: int, channels: int, out_channels: int, size: int = 3, *, bias: bool = False) -> nn.Sequential:
    """A depthwise convolution, then a pointwise one."""
    return nn.Sequential(
        Conv(dims, channels, channels, size, groups=channels, bias=bias),
        Conv(dims, channels, out_channels, 1, bias=bias),
    )


class Block(nn.Module):
    """x + conv2(relu(norm2(conv1(relu(norm1(x))))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv1, self.conv2 = MambaLayer(channels, channels), MambaLayer(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(functional.relu(self.norm2(self.conv1(functional.relu(self.norm1(x))))))


class UpBlock(nn.Module):
    """relu(norm2(conv(relu(norm1(x))) + s x))."""

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv = depthwise(dims, channels, channels)
        self.skip_scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.norm2(self.conv(functional.relu(self.norm1(x))) + self.skip_scale * x))


class ReleasedNetwork(nn.Module):
    """LightM-UNet as its authors released it: (B, in, *S) -> logits (B, out, *S)."""

    def __init__(self, dims: int, in_channels: int, out_channels: int, channels: int) -> None:
        super().__init__()
        self.dims = dims
        self.convInit = depthwise(dims, in_channels, channels)
        self.down_layers = nn.ModuleList()
        for stage, blocks in enumerate((1, 2, 2, 4)):
            width = channels * 2**stage
            pool = nn.MaxPool2d(2) if dims == 2 else nn.MaxPool3d(2)
            first = nn.Sequential(MambaLayer(width // 2, width), pool) if stage else nn.Identity()
            self.down_layers.append(nn.Sequential(first, *[Block(width) for _ in range(blocks)]))
        widths = [channels * 4, channels * 2, channels]
        self.up_samples = nn.ModuleList(
            nn.Sequential(
                Conv(dims, 2 * width, width, 1, bias=False),
                nn.Upsample(scale_factor=2, mode="bilinear" if dims == 2 else "trilinear", align_corners=False),
            )
            for width in widths
        )
        self.up_layers = nn.ModuleList(nn.Sequential(UpBlock(dims, width)) for width in widths)
        self.conv_final = nn.Sequential(
            nn.GroupNorm(8, channels), nn.ReLU(), depthwise(dims, channels, out_channels, 1, bias=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.convInit(x)
        skips = []
        for stage in self.down_layers:
            x = stage(x)
            skips.append(x)
        skips.pop()
        for upsample, layer in zip(self.up_samples, self.up_layers, strict=True):
            x = layer(upsample(x) + skips.pop())
        return self.conv_final(x)


def randomise(network: nn.Module, seed: int) -> None:
    """Move every parameter away from its initial value, so that none is one, zero, or equal to another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            scale = 0.2 if parameter.dim() == 1 else 0.5 * float(parameter.std(unbiased=False)) + 0.02
            parameter.add_(scale * noise)
