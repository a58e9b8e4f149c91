"""Networks by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lightm.errors import InputError, did_you_mean
from lightm.nets.lightm_unet import LightMUNet
from lightm.nets.released import ReleasedLightMUNet

_SPM = {"layer": "spm", "pooling": "add", "bottleneck_layers": 3}  # the report's Figure 6
_OWN = {**_SPM, "stem": "conv", "position_conv": True}

PRESETS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "lightm": (LightMUNet, _OWN),
    "lightm-small": (LightMUNet, {**_OWN, "filters": 16}),
    "lightm-unet": (LightMUNet, {}),
    "lightm-unet-small": (LightMUNet, {"filters": 16}),
    "lightm-unet-released": (ReleasedLightMUNet, {}),
    "spm-lightm-unet": (LightMUNet, _SPM),
    "spm-lightm-unet-small": (LightMUNet, {**_SPM, "filters": 16}),
    "spm-lightm-unet-shared": (LightMUNet, {**_SPM, "layer": "spm-shared"}),
}
DEFAULT = "lightm-small"


def create(name: str, spatial_dims: int, in_channels: int, out_channels: int, **options: Any) -> nn.Module:
    """Return a new network by the name of its preset, with fresh weights from torch's global generator.

    Arguments: `name` of a preset; `spatial_dims` 2 or 3; `in_channels` of the image; `out_channels` classes,
    background included; `options` override single settings of the preset.
    Raises InputError for an unknown name, an unknown option or impossible settings.
    """
    if name not in PRESETS:
        raise InputError(f"unknown network '{name}'{did_you_mean(name, PRESETS)} Known: {', '.join(sorted(PRESETS))}.")
    build, settings = PRESETS[name]
    try:
        return build(spatial_dims, in_channels, out_channels, **{**settings, **options})
    except TypeError as error:
        raise InputError(f"network '{name}': {error}") from error
    except ValueError as error:
        raise InputError(f"network '{name}': {error}") from error


def count_parameters(network: nn.Module) -> int:
    """Return the sum of the elements of all parameters."""
    return sum(parameter.numel() for parameter in network.parameters())
