"""Names and layouts of LightM-UNet's released code, and this package's for the same weights."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from lightm.errors import InputError

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
    (r"down_layers\.(\d+)\.([1-9]\d*)\.norm([12])\.(\w+)", r"stages.\1.{\2}.norm\3.norm.\4"),
    (r"down_layers\.(\d+)\.([1-9]\d*)\.conv([12])\.(.+)", r"stages.\1.{\2}.layer\3.@\4"),
    (r"down_layers\.([1-9]\d*)\.0\.0\.(.+)", r"widen.[\1].@\2"),
]
_INVERSE = [
    (r"stem\.depthwise", "convInit.0.conv.weight"),
    (r"stem\.pointwise\.weight", "convInit.1.conv.weight"),
    (r"head_norm\.norm\.(\w+)", "conv_final.0.{0}"),
    (r"head\.depthwise", "conv_final.2.0.conv.weight"),
    (r"head\.depthwise_bias", "conv_final.2.0.conv.bias"),
    (r"head\.pointwise\.(\w+)", "conv_final.2.1.conv.{0}"),
    (r"decoder\.(\d+)\.reduce\.weight", "up_samples.{0}.0.conv.weight"),
    (r"decoder\.(\d+)\.norm([12])\.norm\.(\w+)", "up_layers.{0}.0.norm{1}.{2}"),
    (r"decoder\.(\d+)\.conv\.depthwise", "up_layers.{0}.0.conv.0.conv.weight"),
    (r"decoder\.(\d+)\.conv\.pointwise\.weight", "up_layers.{0}.0.conv.1.conv.weight"),
    (r"decoder\.(\d+)\.skip_scale", "up_layers.{0}.0.skip_scale"),
    (r"stages\.(\d+)\.(\d+)\.norm([12])\.norm\.(\w+)", "down_layers.{0}.{after[1]}.norm{2}.{3}"),
    (r"stages\.(\d+)\.(\d+)\.layer([12])\.(.+)", "down_layers.{0}.{after[1]}.conv{2}.@"),
    (r"widen\.(\d+)\.(.+)", "down_layers.{after[0]}.0.0.@"),
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


def original_name(name: str) -> str:
    """Return the released code's name for a parameter of this package: the inverse of `released_name`."""
    for pattern, theirs in _INVERSE:
        if match := re.fullmatch(pattern, name):
            head = theirs.format(
                *match.groups(), after=[int(part) + 1 if part.isdigit() else 0 for part in match.groups()]
            )
            if "@" not in head:
                return head
            for key, mine in _LAYER.items():
                inner = match.groups()[-1]
                if inner == mine or inner.startswith(mine + "."):
                    return head.replace("@", key + inner[len(mine) :])
    return name


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
