"""The network of LightM-UNet's released code, and the loading of its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lightm import ops
from lightm.errors import InputError
from lightm.nets.blocks import RVM, DecoderStage, DWConv, GroupNormReLU
from lightm.nets.lightm_unet import check_input


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
        filters: int = 32,
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
        if filters < groups or filters % groups:
            raise ValueError(f"filters {filters} are not divisible by the {groups} groups of GroupNorm")
        if len(blocks_up) != len(blocks_down) - 1 or any(count != 1 for count in blocks_up):
            raise ValueError(f"blocks_up {tuple(blocks_up)}: one block for each of {len(blocks_down) - 1} poolings")
        self.spatial_dims, self.in_channels = spatial_dims, in_channels
        self.divisor = 2 ** len(blocks_up)
        self.stem = DWConv(in_channels, filters, spatial_dims)
        self.widen, self.stages, self.decoder = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        width = filters
        for stage, count in enumerate(blocks_down):
            if stage:
                self.widen.append(released_layer(width, 2 * width, state_size=state_size, expand=expand))
                width *= 2
            blocks = [ResidualRVM(width, groups=groups, state_size=state_size, expand=expand) for _ in range(count)]
            self.stages.append(nn.Sequential(*blocks))
        for _ in blocks_up:
            self.decoder.append(DecoderStage(width, spatial_dims, groups=groups, vector_scale=False))
            width //= 2
        self.head_norm = GroupNormReLU(width, groups)
        self.head = DWConv(width, out_channels, spatial_dims, kernel_size=1, bias=True)

    def forward(self, image: Tensor) -> Tensor:
        check_input(image, self.spatial_dims, self.in_channels, self.divisor)
        x = self.stages[0](self.stem(image.movedim(1, -1).contiguous()))
        skips = []
        for widen, stage in zip(self.widen, list(self.stages)[1:], strict=True):
            skips.append(x)
            x = stage(ops.max_pool2(widen(x)))
        for stage in self.decoder:
            x = stage(x, skips.pop())
        return self.head(self.head_norm(x)).movedim(-1, 1)


_LAYER = {
    "norm": "norm_in",
    "mamba.in_proj": "vss.in_proj",
    "mamba.x_proj": "vss.x_proj",
    "mamba.dt_proj": "vss.dt_proj",
    "mamba.out_proj": "vss.out_proj",
    "mamba.conv1d.weight": "vss.conv_weight",
    "mamba.conv1d.bias": "vss.conv_bias",
    "mamba.A_log": "vss.A_log",
    "mamba.D": "vss.d_skip",
    "proj": "proj",
    "skip_scale": "skip_scale",
}
_RULES: list[tuple[str, str]] = [
    (r"convInit\.0\.conv\.weight", "stem.depthwise"),
    (r"convInit\.1\.conv\.weight", "stem.pointwise.weight"),
    (r"conv_final\.0\.(\w+)", r"head_norm.norm.\1"),
    (r"conv_final\.2\.0\.conv\.weight", "head.depthwise"),
    (r"conv_final\.2\.0\.conv\.bias", "head.depthwise_bias"),
    (r"conv_final\.2\.1\.conv\.(\w+)", r"head.pointwise.\1"),
    (r"up_samples\.(\d+)\.0\.conv\.weight", r"decoder.\1.reduce.weight"),
    (r"up_layers\.(\d+)\.0\.norm([12])\.(\w+)", r"decoder.\1.norm\2.norm.\3"),
    (r"up_layers\.(\d+)\.0\.conv\.0\.conv\.weight", r"decoder.\1.conv.depthwise"),
    (r"up_layers\.(\d+)\.0\.conv\.1\.conv\.weight", r"decoder.\1.conv.pointwise.weight"),
    (r"up_layers\.(\d+)\.0\.skip_scale", r"decoder.\1.skip_scale"),
    (r"down_layers\.(\d+)\.(\d+)\.norm([12])\.(\w+)", r"stages.\1.{\2}.norm\3.norm.\4"),
    (r"down_layers\.(\d+)\.(\d+)\.conv([12])\.(.+)", r"stages.\1.{\2}.layer\3.@\4"),
    (r"down_layers\.(\d+)\.0\.0\.(.+)", r"widen.[\1].@\2"),
]


def released_name(name: str) -> str | None:
    """Return this package's name for a parameter of the released code, or None for a name that it has not."""
    for pattern, replacement in _RULES:
        match = re.fullmatch(pattern, name)
        if match is None:
            continue
        ours = match.expand(replacement)
        # blocks of a stage are numbered from 1 there, widening layers by the stage that they open
        ours = re.sub(r"\{(\d+)\}", lambda m: str(int(m[1]) - 1), ours)
        ours = re.sub(r"\[(\d+)\]", lambda m: str(int(m[1]) - 1), ours)
        if "@" not in ours:
            return ours
        head, inner = ours.split("@")
        for theirs, mine in _LAYER.items():
            if inner == theirs or inner.startswith(theirs + "."):
                return head + mine + inner[len(theirs) :]
    return None


def convert_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a released state dict under this package's names and in its layouts.

    Convolutions (out, in, *k) become channels-last (depthwise) or matrices (pointwise, and Mamba's conv1d).
    Raises InputError that lists the names which the released code has not.
    """
    unknown = [name for name in state if released_name(name) is None]
    if unknown:
        raise InputError(
            f"{len(unknown)} of {len(state)} names are not those of a released LightM-UNet: {', '.join(unknown[:5])}"
        )
    return {str(released_name(name)): _relaid(name, tensor) for name, tensor in state.items()}


def _relaid(name: str, tensor: Tensor) -> Tensor:
    if name.endswith("conv1d.weight"):
        return tensor.squeeze(1)  # (E, 1, K) -> (E, K)
    if re.search(r"(convInit|conv_final\.2|conv)\.0\.conv\.weight$", name) and tensor.ndim > 3:
        if "up_samples" in name:
            return tensor.flatten(1)
        return tensor.squeeze(1).movedim(0, -1).contiguous()  # (C, 1, *k) -> (*k, C)
    if tensor.ndim > 3:
        return tensor.flatten(1)  # (O, C, 1, 1, 1) -> (O, C)
    return tensor


def load_released(path: Path, *, groups: int = 8) -> ReleasedLightMUNet:
    """Build the released network from its own weights: a plain state dict, or an nnU-Net checkpoint that holds one.

    Filters, stages, channels and classes are read off the shapes. Files are `.safetensors`, or `.pth`/`.pt` read
    without executing anything in them. Raises InputError, naming the file, for unreadable files, checkpoints with
    anything but tensors and plain values, and weights of another network.
    """
    state = _read_state(Path(path))
    try:
        converted = convert_released(state)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    try:
        stem = converted["stem.depthwise"]
        filters, image = converted["stem.pointwise.weight"].shape
        blocks: dict[int, int] = {}
        for name in converted:
            if match := re.match(r"stages\.(\d+)\.(\d+)\.", name):
                blocks[int(match[1])] = max(blocks.get(int(match[1]), 0), int(match[2]) + 1)
        network = ReleasedLightMUNet(
            stem.ndim - 1,
            image,
            converted["head.pointwise.weight"].shape[0],
            filters=filters,
            blocks_down=[blocks[stage] for stage in sorted(blocks)],
            blocks_up=[1] * (len(blocks) - 1),
            state_size=converted["stages.0.0.layer1.vss.A_log"].shape[1],
            groups=groups,
        )
        network.load_state_dict(converted)
    except (KeyError, RuntimeError, ValueError) as error:
        raise InputError(f"{path}: not the weights of a whole released LightM-UNet ({error})") from error
    return network.eval()


def _read_state(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error
    except Exception as error:  # the unpickler raises many kinds for damaged or refused files
        raise InputError(
            f"{path}: cannot be read as plain weights ({str(error).splitlines()[0]}); a checkpoint that holds other "
            "Python objects is refused, since reading it would execute code. Save its state dict alone, as safetensors"
        ) from error
    for key in ("network_weights", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path}: holds no state dict; names and tensors are expected")
    return {str(name).removeprefix("module.").removeprefix("_orig_mod."): value for name, value in content.items()}
