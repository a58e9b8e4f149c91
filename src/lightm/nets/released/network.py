"""The network of LightM-UNet's released code; `checkpoint` loads its weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightm.nets.blocks import RVM, DecoderStage, DWConv, GroupNormReLU, run_head
from lightm.nets.lightm_unet import check_input, may_overwrite


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
    return RVM(
        channels,
        out_channels,
        state_size=state_size,
        expand=expand,
        inner_norm=False,
        vector_scale=False,
        one_norm=True,
    )


class ReleasedLightMUNet(nn.Module):
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
        super().__init__()
        if spatial_dims not in (2, 3) or in_channels < 1 or out_channels < 1:
            raise ValueError(
                f"spatial_dims {spatial_dims}, in_channels {in_channels}, out_channels {out_channels}: 2 or 3, and at "
                "least one channel and one class are needed"
            )
        if base_channels < groups or base_channels % groups:
            raise ValueError(f"base_channels {base_channels} is not divisible by the {groups} groups of GroupNorm")
        if len(blocks_up) != len(blocks_down) - 1 or any(count != 1 for count in blocks_up):
            raise ValueError(f"blocks_up {tuple(blocks_up)}: one block for each of {len(blocks_down) - 1} poolings")
        self.spatial_dims, self.in_channels = spatial_dims, in_channels
        self.divisor = 2 ** len(blocks_up)
        self.stem = DWConv(in_channels, base_channels, spatial_dims)
        self.widen, self.stages, self.decoder = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        width = base_channels
        for stage, count in enumerate(blocks_down):
            if stage:
                self.widen.append(released_layer(width, 2 * width, state_size=state_size, expand=expand))
                width *= 2
            blocks = [ResidualRVM(width, groups=groups, state_size=state_size, expand=expand) for _ in range(count)]
            self.stages.append(nn.Sequential(*blocks))
        for _ in blocks_up:
            self.decoder.append(DecoderStage(width, spatial_dims, groups=groups, vector_scale=False))
            width //= 2
        self.checkpointing: bool | None = None
        self.head_norm = GroupNormReLU(width, groups)
        self.head = DWConv(width, out_channels, spatial_dims, kernel_size=1, bias=True)

    def forward(self, image: Tensor) -> Tensor:
        image = check_input(image, self.spatial_dims, self.in_channels, self.divisor)
        overwrite = may_overwrite(self)
        x = self.stages[0](self.stem(image.movedim(1, -1).contiguous()))
        skips = []
        for widen, stage in zip(self.widen, list(self.stages)[1:], strict=True):
            skips.append(x)
            x = stage(widen(x, "max"))
        for stage in self.decoder:
            x = stage(x, skips.pop(), overwrite_skip=overwrite)
        return run_head(self.head_norm, self.head, x, self.checkpointing).movedim(-1, 1)
