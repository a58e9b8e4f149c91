"""Checkpoints of LightM-UNet's released code: read safely, measured, and made into its network."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightm.errors import InputError
from lightm.nets.lightm_unet import ReleasedLightMUNet

# The released code's names and this package's. n: a number; m: one that counts from 1 there, from 0 here (blocks of a
# stage, and widening layers by the stage that they open); k: 1 or 2; p: weight or bias; x: a parameter of an RVM.
_NAMES = [
    ("convInit.0.conv.weight", "stem.depthwise"),
    ("convInit.1.conv.weight", "stem.pointwise.weight"),
    ("conv_final.0.{p}", "head_norm.norm.{p}"),
    ("conv_final.2.0.conv.weight", "head.depthwise"),
    ("conv_final.2.0.conv.bias", "head.depthwise_bias"),
    ("conv_final.2.1.conv.{p}", "head.pointwise.{p}"),
    ("up_samples.{n}.0.conv.weight", "decoder.{n}.reduce.weight"),
    ("up_layers.{n}.0.norm{k}.{p}", "decoder.{n}.norm{k}.norm.{p}"),
    ("up_layers.{n}.0.conv.0.conv.weight", "decoder.{n}.conv.depthwise"),
    ("up_layers.{n}.0.conv.1.conv.weight", "decoder.{n}.conv.pointwise.weight"),
    ("up_layers.{n}.0.skip_scale", "decoder.{n}.skip_scale"),
    ("down_layers.{n}.{m}.norm{k}.{p}", "stages.{n}.{m}.norm{k}.norm.{p}"),
    ("down_layers.{n}.{m}.conv{k}.{x}", "stages.{n}.{m}.layer{k}.{x}"),
    ("down_layers.{m}.0.0.{x}", "widen.{m}.{x}"),
]
_RVM = [
    ("norm", "norm_in"),
    ("mamba.in_proj", "vss.in_proj"),
    ("mamba.x_proj", "vss.x_proj"),
    ("mamba.dt_proj", "vss.dt_proj"),
    ("mamba.out_proj", "vss.out_proj"),
    ("mamba.conv1d.weight", "vss.conv_weight"),
    ("mamba.conv1d.bias", "vss.conv_bias"),
    ("mamba.A_log", "vss.A_log"),
    ("mamba.D", "vss.d_skip"),
    ("proj", "proj"),
    ("skip_scale", "skip_scale"),
]
# What other networks' checkpoints can be told by; the first that fits is named.
_OTHERS = [
    (r"encoder\.stages\.\d+\..*mamba|mamba_layer", "U-Mamba"),
    (r"encoder\.stages\.\d+\.blocks\.", "nnU-Net's residual encoder U-Net"),
    (r"encoder\.stages\.\d+\.\d+\.convs\.", "nnU-Net's plain U-Net"),
    (r"conv_blocks_context\.", "the U-Net of nnU-Net's first version"),
    (r"input_block\.conv1\.conv\.", "MONAI's DynUNet"),
    (r"swinViT\.", "MONAI's SwinUNETR"),
    (r"vit\.", "MONAI's UNETR"),
    (
        r"convInit\.conv\.|down_layers\.\d+\.\d+\.conv1\.conv\.",
        "MONAI's SegResNet, which LightM-UNet's code started from",
    ),
    (r"(.+\.)?(vss|A_log)\b.*", "a network of LightM's own; give its model folder to `lightm predict`"),
    (r"model\.\d+\.", "a U-Net of MONAI"),
    (r"backbone\.|layer[1-4]\.\d+\.", "a residual network"),
]
# The pickle holds names, shapes and settings only; those of nnU-Net's checkpoints are below 1 MB.
MAX_PICKLE_BYTES = 16 << 20
# NumPy's numbers, by the names that its versions 1 and 2 write
_SCALAR = np.float64(0).__reduce__()[0]
_NUMBERS: list[Any] = [
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")),
]
_WRAPPERS = ("module.", "_orig_mod.", "network.", "net.", "model.")


@dataclass(frozen=True)
class Checkpoint:
    """A state dict under the released code's names, and what nnU-Net wrote beside it (None without it)."""

    path: Path
    state: dict[str, Tensor]
    plans: dict[str, Any] | None = None
    dataset_json: dict[str, Any] | None = None
    configuration: str | None = None
    trainer: str | None = None
    epoch: int | None = None


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Read a plain state dict, or an nnU-Net checkpoint that holds one, without executing anything in the file.

    `.safetensors`, or what `torch.save` wrote, in both of its formats: names to tensors, or a dictionary with those
    under `network_weights` (nnU-Net v2) or `state_dict` (nnU-Net v1 and others). Prefixes that wrappers put before
    every name (`module.`, `_orig_mod.`) are taken off. Only the network's tensors are read, not the optimizer's.

    Raises InputError, naming the file: missing, damaged, with anything executable, without a state dict, or of
    another network, whose kind is named where it is known. Memory: the network's weights.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: a folder; give the file of the weights, such as checkpoint_final.pth in it")
    if path.suffix == ".safetensors":
        return Checkpoint(path, _of_released(path, _unwrapped(_read_safetensors(path))))
    whole = content = _read_torch(path)
    for key in ("network_weights", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(name, str) for name in content):
        raise InputError(f"{path}: holds no state dict; names and tensors are expected")
    others = [
        name
        for name, value in content.items()
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu"
    ]
    if others:
        raise InputError(
            f"{path}: holds no state dict: '{others[0]}' is no tensor; tensors by their names are expected, or under "
            "network_weights or state_dict"
        )
    state = _of_released(path, _unwrapped(content))
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if size > path.stat().st_size:
        raise InputError(f"{path}: its tensors would fill {size} bytes, more than the file has; refused")
    beside = whole.get("init_args")
    beside = beside if isinstance(beside, dict) else {}
    return Checkpoint(
        path,
        {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()},
        plans=_kind(beside.get("plans"), dict),
        dataset_json=_kind(beside.get("dataset_json"), dict),
        configuration=_kind(beside.get("configuration"), str),
        trainer=_kind(whole.get("trainer_name"), str),
        epoch=_kind(whole.get("current_epoch", whole.get("epoch")), int),
    )


def _read_torch(path: Path) -> Any:
    """The content of a file of `torch.save`; tensors of its present format stay in the file until they are used."""
    try:
        with path.open("rb") as stream:
            archive = stream.read(4) == b"PK\x03\x04"
        if archive:
            _check_archive(path)
        elif path.stat().st_size < 8:
            raise EOFError("its end is missing")
        with warnings.catch_warnings(), torch.serialization.safe_globals(_NUMBERS):
            warnings.simplefilter("ignore")  # about old formats
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: cannot be read ({error}); it is damaged or was cut off") from None
    except Exception as error:  # a damaged pickle ends in exceptions of any kind
        if forbidden := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise InputError(
                f"{path}: refused: reading it would need {forbidden[1]}, and a pickle that names other things than "
                "tensors and plain values could execute code. Nothing was executed. If you trust its source, load it "
                "there and save the state dict alone, best as safetensors"
            ) from None
        # torch's own advice, to load the file without its protection, is not passed on
        found = re.search(r"WeightsUnpickler error: (.*)", str(error))
        told = "" if "weights_only" in str(error) else str(error)
        reason = found[1] if found else (told.splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"{path}: not a file of weights that PyTorch wrote, or damaged ({reason}); expected .safetensors, .pth or "
            ".pt"
        ) from None


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise InputError(f"{path}: {entry.filename} is compressed, as PyTorch never writes it; refused")
        if re.search(r"(^|/)(code/|constants\.pkl)", entry.filename):
            raise InputError(f"{path}: a TorchScript program, which holds code; save its state dict instead")
        if entry.filename.endswith("data.pkl") and entry.file_size > MAX_PICKLE_BYTES:
            raise InputError(
                f"{path}: {entry.filename} has {entry.file_size} bytes where at most {MAX_PICKLE_BYTES} are expected"
            )
    if sum(entry.filename.endswith("/data.pkl") for entry in entries) != 1:
        raise InputError(f"{path}: a zip archive without weights of PyTorch (no data.pkl in it)")


def _kind(value: Any, kind: type) -> Any:
    return value if isinstance(value, kind) else None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None


def _unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    """Take off every prefix that all names share."""
    found = True
    while found and state:
        found = False
        for prefix in _WRAPPERS:
            if all(name.startswith(prefix) for name in state):
                state, found = {name.removeprefix(prefix): value for name, value in state.items()}, True
    return dict(state)


def _of_released(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Return the state when most of its names are the released code's; else InputError that says what it looks like."""
    unknown = [name for name in state if released_name(name) is None]
    likely = [what for pattern, what in _OTHERS if any(re.match(pattern, name) for name in unknown)]
    if state and not likely and 2 * len(unknown) < len(state):
        return state
    raise InputError(
        f"{path}: {len(unknown)} of {len(state)} names are not those of a released LightM-UNet: "
        f"{listed(unknown)}" + (f"; this looks like {likely[0]}" if likely else "")
    )


@cache
def _rules(back: bool) -> list[tuple[re.Pattern[str], str]]:
    fields = {"n": r"\d+", "m": r"\d+" if back else r"[1-9]\d*", "k": "[12]", "p": r"\w+", "x": ".+"}
    pairs = [(ours, theirs) if back else (theirs, ours) for theirs, ours in _NAMES]
    return [
        (re.compile(re.sub(r"\\{(\w)\\}", lambda m: f"(?P<{m[1]}>{fields[m[1]]})", re.escape(source))), target)
        for source, target in pairs
    ]


def _renamed(name: str, back: bool) -> str | None:
    for pattern, target in _rules(back):
        if match := pattern.fullmatch(name):
            found = match.groupdict()
            if "m" in found:
                found["m"] = str(int(found["m"]) + (1 if back else -1))
            if "x" not in found:
                return target.format(**found)
            for pair in _RVM:
                source, other = reversed(pair) if back else pair
                if found["x"] == source or found["x"].startswith(source + "."):
                    return target.format(**{**found, "x": other + found["x"][len(source) :]})
    return None


def released_name(name: str) -> str | None:
    """Return this package's name for a parameter of the released code, or None for a name that it has not."""
    return _renamed(name, back=False)


def original_name(name: str) -> str:
    """Return the released code's name for a parameter of this package: the inverse of `released_name`."""
    return _renamed(name, back=True) or name


def convert_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a released state dict under this package's names and in its layouts.

    Convolutions (out, in, *k) become channels-last (depthwise) or matrices (pointwise, and Mamba's conv1d).
    Raises InputError that lists the names which the released code has not.
    """
    unknown = [name for name in state if released_name(name) is None]
    if unknown:
        raise InputError(
            f"{len(unknown)} of {len(state)} names are not those of a released LightM-UNet: {listed(unknown)}"
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


def listed(names: list[str], most: int = 5) -> str:
    """Join the first names, and say how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def released_settings(state: Mapping[str, Tensor], *, groups: int = 8) -> dict[str, Any]:
    """Read the arguments of `ReleasedLightMUNet` off the shapes of a released state dict, under its own names.

    Dimensions, channels, classes, base channels, blocks of every stage, state size and expansion; the number of groups
    of GroupNorm leaves no trace in the weights and is taken as given. Raises InputError for tensors without which this
    cannot be told, and for stages or blocks that are left out.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    needed = {
        "convInit.0.conv.weight": (4, 5),
        "convInit.1.conv.weight": (4, 5),
        "conv_final.2.1.conv.weight": (4, 5),
        "down_layers.0.1.conv1.mamba.A_log": (2,),
    }
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise InputError(f"not the weights of a whole released LightM-UNet: {len(missing)} missing: {listed(missing)}")
    for name, axes in needed.items():
        if len(shapes[name]) not in axes or 0 in shapes[name]:
            raise InputError(f"{name} has the shape {shapes[name]}, not one of a released LightM-UNet")
    blocks: dict[int, set[int]] = {}
    for name in shapes:
        if match := re.match(r"down_layers\.(\d+)\.([1-9]\d*)\.", name):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    counts = [len(blocks.get(stage, ())) for stage in range(max(blocks) + 1)]
    for stage, count in enumerate(counts):
        if count == 0 or max(blocks[stage]) != count:
            raise InputError(f"not the weights of a whole released LightM-UNet: stage {stage} lacks residual blocks")
    base_channels, image = shapes["convInit.1.conv.weight"][:2]
    inner, state_size = shapes["down_layers.0.1.conv1.mamba.A_log"]
    return {
        "spatial_dims": len(shapes["convInit.0.conv.weight"]) - 2,
        "in_channels": image,
        "out_channels": shapes["conv_final.2.1.conv.weight"][0],
        "base_channels": base_channels,
        "blocks_down": counts,
        "blocks_up": [1] * (len(counts) - 1),
        "state_size": state_size,
        "expand": max(1, inner // base_channels),
        "groups": groups,
    }


def build_released(state: Mapping[str, Tensor], *, groups: int = 8) -> tuple[ReleasedLightMUNet, dict[str, Any]]:
    """Build the network that a released state dict belongs to; return it with the arguments that were read off.

    Raises InputError that lists the names which are missing, unknown or of another shape, and for weights that are
    not finite. Half precision becomes float32.
    """
    settings = released_settings(state, groups=groups)
    known = {name: tensor for name, tensor in state.items() if released_name(name) is not None}
    unknown = [name for name in state if name not in known]
    try:
        with torch.device("meta"):  # shapes only: what the file claims is compared before memory is taken for it
            expected = ReleasedLightMUNet(**settings).state_dict()
    except (ValueError, RuntimeError, TypeError) as error:
        raise InputError(f"no released LightM-UNet has these shapes ({error})") from None
    converted = convert_released(known)
    missing = [original_name(name) for name in expected if name not in converted]
    unknown += [name for name in known if str(released_name(name)) not in expected]
    wrong = [
        f"{original_name(name)} {tuple(converted[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in converted and converted[name].shape != tensor.shape
    ]
    faults = [
        f"{len(names)} {what}: {listed(names)}"
        for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", wrong))
        if names
    ]
    if faults:
        raise InputError(f"not the weights of a whole released LightM-UNet: {'; '.join(faults)}")
    weights = {name: tensor.to(torch.float32) for name, tensor in converted.items()}
    infinite = [original_name(name) for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if infinite:
        raise InputError(f"{len(infinite)} tensors hold values that are NaN or infinite: {listed(infinite)}")
    with torch.random.fork_rng(devices=[]):  # building draws initial weights; the caller's generator is left alone
        network = ReleasedLightMUNet(**settings)
    network.load_state_dict(weights)
    return network.eval(), settings


def load_released(path: Path | str, *, groups: int = 8) -> ReleasedLightMUNet:
    """Build the released network from its own weights: a plain state dict, or an nnU-Net checkpoint that holds one.

    Filters, stages, channels, classes, state size and expansion are read off the shapes. The file is read by
    `read_checkpoint`, which executes nothing in it; for its errors see there and `build_released`.
    """
    state = read_checkpoint(path).state
    try:
        return build_released(state, groups=groups)[0]
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
