"""UltraLight VM-UNet: narrow Mamba layers in parallel, and attention over all skips (arXiv 2403.20035)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightm.nets.baselines.common import Baseline, conv, linear_mode
from lightm.nets.spm import ParallelVSS

PARTS = 4


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
        self.conv = conv(spatial_dims)(2, 1, 7, padding=9, dilation=3)

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
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        widths: Sequence[int],
        groups: int,
        state_size: int,
        bridge: bool,
    ) -> None:
        super().__init__()
        kind = conv(spatial_dims)
        self.mode = linear_mode(spatial_dims)
        self.pool = nn.MaxPool3d(2) if spatial_dims == 3 else nn.MaxPool2d(2)
        channels = [in_channels, *widths]

        def layer(stage: int, inputs: int, outputs: int) -> nn.Module:
            return kind(inputs, outputs, 3, padding=1) if stage < 3 else PVM(inputs, outputs, state_size=state_size)

        self.encoder = nn.ModuleList(layer(i, channels[i], channels[i + 1]) for i in range(6))
        self.encoder_norms = nn.ModuleList(nn.GroupNorm(groups, width) for width in widths[:5])
        self.spatial = SpatialAttention(spatial_dims) if bridge else None
        self.channel = ChannelAttention(widths[:5]) if bridge else None
        # the decoder's convolutions are those between the widths of the first three stages
        self.decoder = nn.ModuleList(layer(i, widths[i], widths[i - 1]) for i in range(5, 0, -1))
        self.decoder_norms = nn.ModuleList(nn.GroupNorm(groups, widths[i - 1]) for i in range(5, 0, -1))
        self.head = kind(widths[0], out_channels, 1)

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


def ultralight_vm_unet(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    image_size: Sequence[int] | None,
    *,
    channels: Sequence[int] = (8, 16, 24, 32, 48, 64),
    groups: int = 4,
    state_size: int = 16,
    bridge: bool = True,
) -> Baseline:
    """UltraLight VM-UNet with the paper's widths; in 3D with 3D convolutions, poolings and interpolations."""
    widths = tuple(channels)
    if len(widths) != 6 or any(width % PARTS or width % groups for width in widths):
        raise ValueError(
            f"channels {widths}: six widths are needed, each divisible by {PARTS} parts and {groups} groups"
        )
    body = UltraLightVMUNet(
        spatial_dims,
        in_channels,
        out_channels,
        widths=widths,
        groups=groups,
        state_size=state_size,
        bridge=bridge,
    )
    return Baseline(body, in_channels=in_channels, divisor=[32] * spatial_dims)
