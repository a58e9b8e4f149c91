"""Mamba networks of others: U-Mamba (arXiv 2401.04722) and UltraLight VM-UNet (arXiv 2403.20035)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightm.nets.baselines.common import Baseline, Shape, Stages, linear_mode, of_dims, plan_stages
from lightm.nets.state_space import VSS, ParallelVSS

PARTS = 4  # of UltraLight VM-UNet's layers


class MambaBlock(nn.Module):
    """x + Mamba(LayerNorm(x)) over the voxels in raster order: (B, C, *S) -> (B, C, *S).

    The authors' code leaves the residual out in both variants (`residual=False` here).
    """

    def __init__(self, channels: int, *, residual: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.mamba = VSS(channels, inner_norm=False)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2).contiguous()  # (B, L, C)
        mixed = self.mamba(self.norm(tokens))
        if self.residual:
            mixed = mixed + tokens
        return mixed.transpose(1, 2).unflatten(2, x.shape[2:]).contiguous()


class ResidualBlock(nn.Module):
    """Convolution, norm, leaky ReLU, convolution, norm; plus the input, pooled and projected where it must be."""

    def __init__(self, inputs: int, outputs: int, kernel: Sequence[int], stride: Sequence[int]) -> None:
        super().__init__()
        kind = of_dims("Conv", len(kernel))
        norm, pool = of_dims("InstanceNorm", len(kernel)), of_dims("AvgPool", len(kernel))
        shape, step, pad = tuple(kernel), tuple(stride), tuple(k // 2 for k in kernel)
        self.path = nn.Sequential(
            kind(inputs, outputs, shape, step, pad),
            norm(outputs, affine=True),
            nn.LeakyReLU(0.01),
            kind(outputs, outputs, shape, padding=pad),
            norm(outputs, affine=True),
        )
        shortcut: list[nn.Module] = []
        if max(step) > 1:
            shortcut.append(pool(step, step))
        if inputs != outputs:
            shortcut += [kind(inputs, outputs, 1, bias=False), norm(outputs, affine=True)]
        self.shortcut = nn.Sequential(*shortcut)
        self.act = nn.LeakyReLU(0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.path(x) + self.shortcut(x))


class UMamba(nn.Module):
    """U-Net of residual blocks; Mamba after the last encoder stage, or after every one (`everywhere`).

    Every encoder stage has `blocks` residual blocks behind a stem convolution, every decoder stage a transposed
    convolution, the skip beside it, and `decoder_blocks` residual blocks.
    """

    def __init__(
        self, shape: Shape, stages: Stages, *, everywhere: bool, blocks: int, decoder_blocks: int, residual: bool
    ) -> None:
        super().__init__()
        dims = len(stages.kernels[0])
        norm = of_dims("InstanceNorm", dims)
        widths, one = stages.channels, (1,) * dims
        first = stages.kernels[0]
        self.stem = nn.Sequential(
            of_dims("Conv", dims)(shape.in_channels, widths[0], first, padding=tuple(k // 2 for k in first)),
            norm(widths[0], affine=True),
            nn.LeakyReLU(0.01),
        )
        self.encoder = nn.ModuleList()
        width = widths[0]
        for depth, (kernel, stride, out) in enumerate(zip(stages.kernels, stages.strides, widths, strict=True)):
            stage: list[nn.Module] = [ResidualBlock(width, out, kernel, stride)]
            stage += [ResidualBlock(out, out, kernel, one) for _ in range(blocks - 1)]
            if everywhere or depth == len(widths) - 1:
                stage.append(MambaBlock(out, residual=residual))
            self.encoder.append(nn.Sequential(*stage))
            width = out
        self.up, self.decoder = nn.ModuleList(), nn.ModuleList()
        for depth in range(len(widths) - 1, 0, -1):
            out, stride = widths[depth - 1], stages.strides[depth]
            self.up.append(of_dims("ConvTranspose", dims)(width, out, stride, stride))
            stage = [ResidualBlock(2 * out, out, stages.kernels[depth - 1], one)]
            stage += [ResidualBlock(out, out, stages.kernels[depth - 1], one) for _ in range(decoder_blocks - 1)]
            self.decoder.append(nn.Sequential(*stage))
            width = out
        self.head = of_dims("Conv", dims)(width, shape.out_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        skips.pop()
        for up, stage in zip(self.up, self.decoder, strict=True):
            x = stage(torch.cat([up(x), skips.pop()], dim=1))
        return self.head(x)


def umamba_bot(
    shape: Shape,
    *,
    base_channels: int = 32,
    max_channels: int | None = None,
    spacing: Sequence[float] | None = None,
    blocks: int = 2,
    decoder_blocks: int = 2,
    residual: bool = True,
    everywhere: bool = False,
) -> Baseline:
    """U-Mamba_Bot: the state-space module in the bottleneck alone; stages by nnU-Net's rules."""
    size = shape.needed_size("nnU-Net's rules derive the stages from it")
    if min(blocks, decoder_blocks) < 1:
        raise ValueError(f"blocks {blocks}, decoder_blocks {decoder_blocks}: every stage needs one or more")
    stages = plan_stages(size, spacing=spacing, base_channels=base_channels, max_channels=max_channels)
    counts = {"blocks": blocks, "decoder_blocks": decoder_blocks}
    body = UMamba(shape, stages, everywhere=everywhere, residual=residual, **counts)
    return shape.baseline(body, stages.divisor, one_voxel=False)


def umamba_enc(shape: Shape, **options: Any) -> Baseline:
    """U-Mamba_Enc: the state-space module after every encoder stage, the first at full resolution."""
    return umamba_bot(shape, everywhere=True, **options)


class PVM(nn.Module):
    """Parallel Vision Mamba layer: (B, C, *S) -> (B, out_channels, *S).

    X' = LayerNorm(X); Yi = Mamba(X'i) + s X'i for the four parts, with one Mamba; out = Linear(LayerNorm(concat)).
    As in the authors' code both LayerNorms are one module and s is a scalar.
    """

    def __init__(self, channels: int, out_channels: int, *, state_size: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.mamba = ParallelVSS(channels, parts=PARTS, shared=True, state_size=state_size, inner_norm=False)
        self.skip_scale = nn.Parameter(torch.ones(1))
        self.proj = nn.Linear(channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x.flatten(2).transpose(1, 2).contiguous())  # (B, L, C)
        mixed = torch.addcmul(self.mamba(tokens), tokens, self.skip_scale)
        return self.proj(self.norm(mixed)).transpose(1, 2).unflatten(2, x.shape[2:]).contiguous()


class SpatialAttention(nn.Module):
    """SAB: one dilated 7^d convolution, shared by all skips, over their channels' mean and maximum."""

    def __init__(self, spatial_dims: int) -> None:
        super().__init__()
        self.conv = of_dims("Conv", spatial_dims)(2, 1, 7, padding=9, dilation=3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)))


class ChannelAttention(nn.Module):
    """CAB: the means of all skips' channels, a convolution along them, and a linear layer for every skip."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.mix = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.weights = nn.ModuleList(nn.Linear(sum(widths), width) for width in widths)

    def forward(self, skips: Sequence[Tensor]) -> list[Tensor]:
        means = torch.cat([skip.flatten(2).mean(2) for skip in skips], dim=1)
        mixed = self.mix(means.unsqueeze(1)).squeeze(1)
        ones = (1,) * (skips[0].ndim - 2)
        return [torch.sigmoid(layer(mixed)).unflatten(1, (-1, *ones)) for layer in self.weights]


class UltraLightVMUNet(nn.Module):
    """Six stages: three convolutions, then three PVM layers; the mirror image up; skips through SAB and CAB.

    Every encoder stage but the last: layer, GroupNorm, max pooling by 2, GELU; every decoder stage: layer, GroupNorm,
    linear upsampling by 2 (but the first), GELU, + skip. The head works at half resolution and is upsampled.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        channels: Sequence[int] = (8, 16, 24, 32, 48, 64),
        groups: int = 4,
        state_size: int = 16,
        bridge: bool = True,
    ) -> None:
        super().__init__()
        widths, spatial_dims = tuple(channels), shape.spatial_dims
        if len(widths) != 6 or any(width % PARTS or width % groups for width in widths):
            raise ValueError(
                f"channels {widths}: six widths are needed, each divisible by {PARTS} parts and {groups} groups"
            )
        kind = of_dims("Conv", spatial_dims)
        self.mode = linear_mode(spatial_dims)
        self.pool = of_dims("MaxPool", spatial_dims)(2)
        steps = [shape.in_channels, *widths]

        def layer(stage: int, inputs: int, outputs: int) -> nn.Module:
            return kind(inputs, outputs, 3, padding=1) if stage < 3 else PVM(inputs, outputs, state_size=state_size)

        self.encoder = nn.ModuleList(layer(i, steps[i], steps[i + 1]) for i in range(6))
        self.encoder_norms = nn.ModuleList(nn.GroupNorm(groups, width) for width in widths[:5])
        self.spatial = SpatialAttention(spatial_dims) if bridge else None
        self.channel = ChannelAttention(widths[:5]) if bridge else None
        # the decoder's convolutions are those between the widths of the first three stages
        self.decoder = nn.ModuleList(layer(i, widths[i], widths[i - 1]) for i in range(5, 0, -1))
        self.decoder_norms = nn.ModuleList(nn.GroupNorm(groups, widths[i - 1]) for i in range(5, 0, -1))
        self.head = kind(widths[0], shape.out_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        x, skips = image, []
        for layer, norm in zip(self.encoder, self.encoder_norms, strict=False):
            x = F.gelu(self.pool(norm(layer(x))))
            skips.append(x)
        if self.spatial is not None and self.channel is not None:
            weighed = [self.spatial(skip) * skip for skip in skips]
            summed = [a + b for a, b in zip(weighed, skips, strict=True)]
            factors = self.channel(summed)
            skips = [f * s + w for f, s, w in zip(factors, summed, weighed, strict=True)]
        # the deepest stage goes on from the bridged features, as its skip does
        x = F.gelu(self.encoder[5](skips[-1]))
        for depth, (layer, norm) in enumerate(zip(self.decoder, self.decoder_norms, strict=True)):
            x = norm(layer(x))
            x = F.gelu(self._upsample(x) if depth else x) + skips.pop()
        return self._upsample(self.head(x))

    def _upsample(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode=self.mode, align_corners=True)


def ultralight_vm_unet(shape: Shape, **options: Any) -> Baseline:
    """UltraLight VM-UNet with the paper's widths; in 3D with 3D convolutions, poolings and interpolations."""
    return shape.baseline(UltraLightVMUNet(shape, **options), 32)
