"""LightM-UNet in 2D and 3D: as the paper and the report describe it (arXiv 2403.05246), and as the code has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightm.nets.blocks import RVM, SPM, ConvStem, DecoderStage, DWConv, GroupNormReLU, PositionConv, run_head
from lightm.nets.execution import has_hooks
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


class MambaUNet(nn.Module):
    """The U-Net around a Mamba encoder: checks, stem, decoder and head; a subclass builds and runs the encoder."""

    stem: nn.Module

    def __init__(self, spatial_dims: int, in_channels: int, poolings: int) -> None:
        super().__init__()
        self.spatial_dims, self.in_channels, self.divisor = spatial_dims, in_channels, 2**poolings
        self.checkpointing: bool | None = None

    def _add_decoder(self, width: int, poolings: int, out_channels: int, groups: int, vector_scale: bool) -> None:
        self.decoder = nn.ModuleList()
        for _ in range(poolings):
            self.decoder.append(DecoderStage(width, self.spatial_dims, groups=groups, vector_scale=vector_scale))
            width //= 2
        self.head_norm = GroupNormReLU(width, groups)
        self.head = DWConv(width, out_channels, self.spatial_dims, kernel_size=1, bias=True)

    def encode(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The deepest features of the stem's (B, *S, C), and the skips from the finest on."""
        raise NotImplementedError

    def forward(self, image: Tensor) -> Tensor:
        image = self._checked(image)
        # without gradients the decoder may compute in the memory of skips that nothing else, such as a hook, holds
        overwrite = not torch.compiler.is_compiling() and not torch.is_grad_enabled() and not has_hooks(self)
        x, skips = self.encode(self.stem(image.movedim(1, -1).contiguous()))
        for stage in self.decoder:
            x = stage(x, skips.pop(), overwrite_skip=overwrite)
        return run_head(self.head_norm, self.head, x, self.checkpointing).movedim(-1, 1)

    def _checked(self, image: Tensor) -> Tensor:
        """The image as a plain tensor: MONAI's `MetaTensor` without its metadata, which kernels cannot take."""
        check_shape(image, self.spatial_dims, self.in_channels)
        divisor = self.divisor
        for axis, size in zip("ZYX"[-self.spatial_dims :], image.shape[2:], strict=True):
            if size % divisor or size == 0:
                low = size // divisor * divisor
                near = f"{low} or {low + divisor}" if low else f"{divisor}"
                raise ValueError(
                    f"input size {tuple(image.shape[2:])}: {axis}={size} is not divisible by {divisor} "
                    f"({divisor.bit_length() - 1} poolings); pad it to {near}"
                )
        plain: Tensor = image.as_tensor() if hasattr(image, "as_tensor") else image
        return plain


class LightMUNet(MambaUNet):
    """LightM-UNet: depthwise stem, Mamba encoder, Mamba bottleneck, depthwise decoder.

    The Mamba layers are RVM (residual vision Mamba: norm, state-space module, scaled residual, projection), whose
    state-space module is a VSS (vision state-space: projection, causal convolution, selective scan, gate), or SPM
    (parallel Mamba: several narrow VSS side by side, each on a part of the channels).

    Source: LightM-UNet, arXiv 2403.05246, section 2. Stem at full resolution; encoder blocks of `encoder_layers`
    RVM layers, the last of a block projecting C -> 2C, then max pooling by 2; `bottleneck_layers` RVM layers (the
    report names three and four); a decoder stage for each encoder block; head: norm, ReLU, DWConv 1.
    Unlike the released code: an RVM LayerNorm after the SSM, two LayerNorms per layer, and a vector s.

    Arguments:
        spatial_dims: 2 or 3. in_channels: of the image. out_channels: classes, background included.
        base_channels: C0, channels of the stem; a multiple of `groups`.
        encoder_layers: layers of every encoder block. bottleneck_layers: layers of the bottleneck.
        state_size, expand: N and E / C of the state-space module. groups: of every GroupNorm.
        layer: "rvm" (the paper's), "spm" (`parts` narrow VSS side by side) or "spm-shared" (one VSS for all parts).
        pooling: "max", "avg", or "add": the sum of both (the report's Pooling Add, Figure 6).
        stem: "dwconv" (the paper's: depthwise, then pointwise, no bias) or "conv" (a full convolution).
        position_conv: a residual depthwise convolution before every layer (in neither source).
        scan: "raster"; "bidirectional": VSS summed over the raster order and its reverse; "axes": summed over raster
            orders with each axis in turn as the fastest (in neither source). All orders share their weights.
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
        check_channels(spatial_dims, in_channels, out_channels)
        _check_groups(base_channels, groups)
        if not encoder_layers or min(encoder_layers) < 1:
            raise ValueError(f"encoder_layers {tuple(encoder_layers)}: every encoder block needs a layer")
        if bottleneck_layers < 0:
            raise ValueError(f"bottleneck_layers {bottleneck_layers}: 0 or more")
        for what, given, known in (
            ("layer", layer, LAYERS),
            ("pooling", pooling, POOLINGS),
            ("stem", stem, STEMS),
            ("ssm", ssm, SSMS),
        ):
            if given not in known:
                raise ValueError(f"{what} '{given}': one of {', '.join(known)}")
        super().__init__(spatial_dims, in_channels, len(encoder_layers))
        self.pooling = pooling
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
        self._add_decoder(width, len(encoder_layers), out_channels, groups, vector_scale=True)

    def encode(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for block in self.encoder:
            skips.append(x)
            x = block(x, self.pooling)
        return self.bottleneck(x), skips


class ResidualRVM(nn.Module):
    """x + layer2(act(norm2(layer1(act(norm1(x)))))) with GroupNorm and ReLU: (B, *S, C) -> (B, *S, C)."""

    def __init__(self, channels: int, *, groups: int, state_size: int, expand: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = GroupNormReLU(channels, groups), GroupNormReLU(channels, groups)
        self.layer1 = released_layer(channels, channels, state_size=state_size, expand=expand)
        self.layer2 = released_layer(channels, channels, state_size=state_size, expand=expand)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer2(self.norm2(self.layer1(self.norm1(x))))


def released_layer(channels: int, out_channels: int, *, state_size: int, expand: int) -> RVM:
    """The released code's RVM: a scalar s, one LayerNorm used twice, none after the SSM."""
    settings: dict[str, Any] = {"inner_norm": False, "vector_scale": False, "one_norm": True}
    return RVM(channels, out_channels, state_size=state_size, expand=expand, **settings)


class ReleasedLightMUNet(MambaUNet):
    """The network that LightM-UNet's authors released: residual blocks of two Mamba layers, 5.0 M parameters.

    Stage 0 keeps the resolution; every further one starts with a layer C -> 2C and max pooling by 2. `blocks_down`
    residual blocks follow in each stage; the decoder has one stage for each of `blocks_up` (1 each).

    Input (B, in_channels, *S), every size a multiple of 2 ** (stages - 1); output (B, out_channels, *S), raw logits.
    Raises ValueError for other sizes and impossible settings.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        base_channels: int = 32,
        blocks_down: Sequence[int] = (1, 2, 2, 4),
        blocks_up: Sequence[int] = (1, 1, 1),
        state_size: int = 16,
        expand: int = 2,
        groups: int = 8,
    ) -> None:
        if spatial_dims not in (2, 3) or in_channels < 1 or out_channels < 1:
            raise ValueError(
                f"spatial_dims {spatial_dims}, in_channels {in_channels}, out_channels {out_channels}: 2 or 3, and at "
                "least one channel and one class are needed"
            )
        _check_groups(base_channels, groups)
        if len(blocks_up) != len(blocks_down) - 1 or any(count != 1 for count in blocks_up):
            raise ValueError(f"blocks_up {tuple(blocks_up)}: one block for each of {len(blocks_down) - 1} poolings")
        super().__init__(spatial_dims, in_channels, len(blocks_up))
        self.stem = DWConv(in_channels, base_channels, spatial_dims)
        self.widen, self.stages = nn.ModuleList(), nn.ModuleList()
        width = base_channels
        for stage, count in enumerate(blocks_down):
            if stage:
                self.widen.append(released_layer(width, 2 * width, state_size=state_size, expand=expand))
                width *= 2
            blocks = [ResidualRVM(width, groups=groups, state_size=state_size, expand=expand) for _ in range(count)]
            self.stages.append(nn.Sequential(*blocks))
        self._add_decoder(width, len(blocks_up), out_channels, groups, vector_scale=False)

    def encode(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.stages[0](x)
        skips = []
        for widen, stage in zip(self.widen, list(self.stages)[1:], strict=True):
            skips.append(x)
            x = stage(widen(x, "max"))
        return x, skips


def _check_groups(base_channels: int, groups: int) -> None:
    if base_channels < groups or base_channels % groups:
        raise ValueError(f"base_channels {base_channels} is not divisible by the {groups} groups of GroupNorm")


def check_channels(spatial_dims: int, in_channels: int, out_channels: int) -> None:
    """Raise ValueError for dimensions and channels that no network has."""
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims {spatial_dims}: a network is 2D or 3D; use 2 or 3")
    if in_channels < 1:
        raise ValueError(f"in_channels {in_channels}: an image has at least one channel")
    if out_channels < 1:
        raise ValueError(f"out_channels {out_channels}: a region, or background and at least one class, are needed")


def check_shape(image: Tensor, spatial_dims: int, in_channels: int) -> None:
    """Raise ValueError for an image of other axes or channels than a network takes."""
    if image.ndim != spatial_dims + 2 or image.shape[1] != in_channels:
        axes = "Z, Y, X" if spatial_dims == 3 else "Y, X"
        raise ValueError(f"input of shape {tuple(image.shape)}; this network expects (B, {in_channels}, {axes})")
