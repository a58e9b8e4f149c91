"""LightM-UNet as the paper and the report describe it (arXiv 2403.05246), in 2D and 3D from one code path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightm.nets.blocks import RVM, ConvStem, DecoderStage, DWConv, GroupNormReLU, PositionConv, run_head
from lightm.nets.intact import has_hooks
from lightm.nets.spm import SPM
from lightm.nets.token_layer import POOLINGS

LAYERS = ("rvm", "spm", "spm-shared")
STEMS = ("dwconv", "conv")
SSMS = ("mamba1", "mamba2")


class Positioned(nn.Sequential):
    """A position convolution and the layer behind it."""

    def forward(self, x: Tensor, pooling: str | None = None) -> Tensor:
        return self[1](self[0](x), pooling)


class Block(nn.Sequential):
    """Layers one after the other; the last one pools its result, which so is never whole in memory."""

    def forward(self, x: Tensor, pooling: str | None = None) -> Tensor:
        for index, layer in enumerate(self):
            x = layer(x, pooling if index == len(self) - 1 else None)
        return x


class LightMUNet(nn.Module):
    """LightM-UNet: depthwise stem, Mamba encoder, Mamba bottleneck, depthwise decoder.

    The Mamba layers are RVM (residual vision Mamba: norm, state-space module, scaled residual, projection), whose
    state-space module is a VSS (vision state-space: projection, causal convolution, selective scan, gate), or SPM
    (parallel Mamba: several narrow VSS side by side, each on a part of the channels).

    Source: LightM-UNet, arXiv 2403.05246, section 2. Stem at full resolution; encoder blocks of `encoder_layers`
    RVM layers, the last of a block projecting C -> 2C, then max pooling by 2; `bottleneck_layers` RVM layers (the
    report names three and four); a decoder stage for each encoder block; head: norm, ReLU, DWConv 1.
    Unlike the released code there is an RVM LayerNorm after the SSM, two LayerNorms a layer and a vector s.

    Arguments:
        spatial_dims: 2 or 3.
        in_channels: image channels.
        out_channels: classes, background included.
        base_channels: C0, channels of the stem; a multiple of `groups`.
        encoder_layers: RVM layers of every encoder block.
        bottleneck_layers: RVM layers of the bottleneck.
        state_size: N of the state-space module.
        expand: E / C of the state-space module.
        groups: groups of every GroupNorm.
        layer: "rvm" (the paper's), "spm" (four narrow VSS side by side) or "spm-shared" (one VSS for all parts).
        parts: parts of an SPM layer.
        pooling: "max", "avg", or "add": the sum of both (the report's Pooling Add, Figure 6).
        stem: "dwconv" (the paper's: depthwise, then pointwise, no bias) or "conv" (a full convolution).
        position_conv: a residual depthwise convolution before every layer (in neither source).
        scan: "raster"; "bidirectional": VSS summed over the raster order and its reverse; "axes": summed over raster
            orders with each axis in turn as the fastest (in neither source). The weights are the same for all orders.
        ssm: "mamba1" (a decay for every channel and state) or "mamba2" (one for a head of 16 channels).

    Input (B, in_channels, *S) of any float type, every size a multiple of `2 ** len(encoder_layers)`; output
    (B, out_channels, *S), raw logits. Raises ValueError for other sizes. Cost: linear in the number of voxels.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        base_channels: int = 32,
        encoder_layers: Sequence[int] = (1, 2, 2),
        bottleneck_layers: int = 4,
        state_size: int = 16,
        expand: int = 2,
        groups: int = 8,
        layer: str = "rvm",
        parts: int = 4,
        pooling: str = "max",
        stem: str = "dwconv",
        position_conv: bool = False,
        scan: str = "raster",
        ssm: str = "mamba1",
    ) -> None:
        super().__init__()
        _check(spatial_dims, in_channels, out_channels, base_channels, encoder_layers, bottleneck_layers, groups)
        for what, given, known in (
            ("layer", layer, LAYERS),
            ("pooling", pooling, POOLINGS),
            ("stem", stem, STEMS),
            ("ssm", ssm, SSMS),
        ):
            if given not in known:
                raise ValueError(f"{what} '{given}': one of {', '.join(known)}")
        self.spatial_dims, self.in_channels, self.pooling = spatial_dims, in_channels, pooling
        self.divisor = 2 ** len(encoder_layers)

        settings: dict[str, Any] = {"state_size": state_size, "expand": expand, "scan": scan, "ssm": ssm}

        def build(channels: int, out: int) -> nn.Module:
            made: nn.Module
            if layer == "rvm":
                made = RVM(channels, out, **settings)
            else:
                made = SPM(channels, out, parts=parts, shared=layer == "spm-shared", **settings)
            return Positioned(PositionConv(channels, spatial_dims), made) if position_conv else made

        self.stem = (DWConv if stem == "dwconv" else ConvStem)(in_channels, base_channels, spatial_dims)
        self.encoder = nn.ModuleList()
        width = base_channels
        for count in encoder_layers:
            block = [*(build(width, width) for _ in range(count - 1)), build(width, 2 * width)]
            self.encoder.append(Block(*block))
            width *= 2
        self.bottleneck = Block(*(build(width, width) for _ in range(bottleneck_layers)))
        self.decoder = nn.ModuleList()
        for _ in encoder_layers:
            self.decoder.append(DecoderStage(width, spatial_dims, groups=groups))
            width //= 2
        self.checkpointing: bool | None = None
        self.head_norm = GroupNormReLU(width, groups)
        self.head = DWConv(width, out_channels, spatial_dims, kernel_size=1, bias=True)

    def forward(self, image: Tensor) -> Tensor:
        image = check_input(image, self.spatial_dims, self.in_channels, self.divisor)
        overwrite = may_overwrite(self)
        x = self.stem(image.movedim(1, -1).contiguous())
        skips = []
        for block in self.encoder:
            skips.append(x)
            x = block(x, self.pooling)
        x = self.bottleneck(x)
        for stage in self.decoder:
            x = stage(x, skips.pop(), overwrite_skip=overwrite)
        return run_head(self.head_norm, self.head, x, self.checkpointing).movedim(-1, 1)


def may_overwrite(network: nn.Module) -> bool:
    """Whether a call without gradients may compute in the memory of skips: nothing else, such as a hook, holds them."""
    return not torch.compiler.is_compiling() and not torch.is_grad_enabled() and not has_hooks(network)


def check_input(image: Tensor, spatial_dims: int, in_channels: int, divisor: int) -> Tensor:
    """Return the image as a plain tensor: MONAI's `MetaTensor` without its metadata, which kernels cannot carry.

    Raises ValueError unless it is (B, in_channels, *S) with every size a multiple of `divisor`.
    """
    if image.ndim != spatial_dims + 2 or image.shape[1] != in_channels:
        axes = "Z, Y, X" if spatial_dims == 3 else "Y, X"
        raise ValueError(f"input of shape {tuple(image.shape)}; this network expects (B, {in_channels}, {axes})")
    for axis, size in zip("ZYX"[-spatial_dims:], image.shape[2:], strict=True):
        if size % divisor or size == 0:
            low = size // divisor * divisor
            near = f"{low} or {low + divisor}" if low else f"{divisor}"
            raise ValueError(
                f"input size {tuple(image.shape[2:])}: {axis}={size} is not divisible by {divisor} "
                f"({divisor.bit_length() - 1} poolings); pad it to {near}"
            )
    plain: Tensor = image.as_tensor() if hasattr(image, "as_tensor") else image
    return plain


def _check(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    base_channels: int,
    encoder_layers: Sequence[int],
    bottleneck_layers: int,
    groups: int,
) -> None:
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims {spatial_dims}: a network is 2D or 3D; use 2 or 3")
    if in_channels < 1:
        raise ValueError(f"in_channels {in_channels}: an image has at least one channel")
    if out_channels < 2:
        raise ValueError(f"out_channels {out_channels}: background and at least one class are needed, so 2 or more")
    if base_channels < groups or base_channels % groups:
        raise ValueError(f"base_channels {base_channels} is not divisible by the {groups} groups of GroupNorm")
    if not encoder_layers or min(encoder_layers) < 1:
        raise ValueError(f"encoder_layers {tuple(encoder_layers)}: every encoder block needs a layer")
    if bottleneck_layers < 0:
        raise ValueError(f"bottleneck_layers {bottleneck_layers}: 0 or more")
