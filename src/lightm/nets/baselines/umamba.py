"""U-Mamba: nnU-Net's residual U-Net with Mamba on the flattened features (arXiv 2401.04722)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightm.nets.baselines.common import Baseline, conv, needed, transposed_conv
from lightm.nets.baselines.nnunet import Stages, plan_stages
from lightm.nets.blocks import VSS


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
        kind = conv(len(kernel))
        norm = nn.InstanceNorm3d if len(kernel) == 3 else nn.InstanceNorm2d
        pool = nn.AvgPool3d if len(kernel) == 3 else nn.AvgPool2d
        shape, step, pad = tuple(kernel), tuple(stride), tuple(k // 2 for k in kernel)
        self.path = nn.Sequential(
            kind(inputs, outputs, shape, step, pad),  # type: ignore[arg-type]
            norm(outputs, affine=True),
            nn.LeakyReLU(0.01),
            kind(outputs, outputs, shape, padding=pad),  # type: ignore[arg-type]
            norm(outputs, affine=True),
        )
        shortcut: list[nn.Module] = []
        if max(step) > 1:
            shortcut.append(pool(step, step))  # type: ignore[arg-type]
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
        self,
        in_channels: int,
        out_channels: int,
        stages: Stages,
        *,
        everywhere: bool,
        blocks: int,
        decoder_blocks: int,
        residual: bool,
    ) -> None:
        super().__init__()
        dims = len(stages.kernels[0])
        norm = nn.InstanceNorm3d if dims == 3 else nn.InstanceNorm2d
        widths, one = stages.channels, (1,) * dims
        first = stages.kernels[0]
        self.stem = nn.Sequential(
            conv(dims)(in_channels, widths[0], first, padding=tuple(k // 2 for k in first)),  # type: ignore[arg-type]
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
            self.up.append(transposed_conv(dims)(width, out, stride, stride))  # type: ignore[arg-type]
            stage = [ResidualBlock(2 * out, out, stages.kernels[depth - 1], one)]
            stage += [ResidualBlock(out, out, stages.kernels[depth - 1], one) for _ in range(decoder_blocks - 1)]
            self.decoder.append(nn.Sequential(*stage))
            width = out
        self.head = conv(dims)(width, out_channels, 1)

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
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    image_size: Sequence[int] | None,
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
    size = needed(image_size, "nnU-Net's rules derive the stages from it")
    if min(blocks, decoder_blocks) < 1:
        raise ValueError(f"blocks {blocks}, decoder_blocks {decoder_blocks}: every stage needs one or more")
    stages = plan_stages(size, spacing=spacing, base_channels=base_channels, max_channels=max_channels)
    body = UMamba(
        in_channels,
        out_channels,
        stages,
        everywhere=everywhere,
        blocks=blocks,
        decoder_blocks=decoder_blocks,
        residual=residual,
    )
    return Baseline(body, in_channels=in_channels, divisor=stages.divisor, one_voxel=False)


def umamba_enc(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    image_size: Sequence[int] | None,
    *,
    base_channels: int = 32,
    max_channels: int | None = None,
    spacing: Sequence[float] | None = None,
    blocks: int = 2,
    decoder_blocks: int = 2,
    residual: bool = True,
) -> Baseline:
    """U-Mamba_Enc: the state-space module after every encoder stage, the first at full resolution."""
    return umamba_bot(
        spatial_dims,
        in_channels,
        out_channels,
        image_size,
        base_channels=base_channels,
        max_channels=max_channels,
        spacing=spacing,
        blocks=blocks,
        decoder_blocks=decoder_blocks,
        residual=residual,
        everywhere=True,
    )
