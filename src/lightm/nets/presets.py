"""Networks by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lightm.errors import InputError, did_you_mean
from lightm.nets import baselines
from lightm.nets.lightm_unet import LightMUNet
from lightm.nets.released import ReleasedLightMUNet

_SPM = {"layer": "spm", "pooling": "add", "bottleneck_layers": 3}  # the report's Figure 6
_OWN = {**_SPM, "stem": "conv", "position_conv": True}

_SMALL = {"filters": 16}

PRESETS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    # the project's own
    "lightm": (LightMUNet, _OWN),
    "lightm-small": (LightMUNet, {**_OWN, **_SMALL}),
    # the paper's network and the released code's
    "lightm-unet": (LightMUNet, {}),
    "lightm-unet-small": (LightMUNet, _SMALL),
    "lightm-unet-released": (ReleasedLightMUNet, {}),
    "lightm-unet-released-small": (ReleasedLightMUNet, _SMALL),
    # the report's
    "spm-lightm-unet": (LightMUNet, _SPM),
    "spm-lightm-unet-small": (LightMUNet, {**_SPM, **_SMALL}),
    "spm-lightm-unet-shared": (LightMUNet, {**_SPM, "layer": "spm-shared"}),
    "spm-lightm-unet-shared-small": (LightMUNet, {**_SPM, "layer": "spm-shared", **_SMALL}),
    # between both: layer and pooling exchanged one at a time, and the other state-space core
    "lightm-unet-add": (LightMUNet, {"pooling": "add"}),
    "spm-lightm-unet-max": (LightMUNet, {**_SPM, "pooling": "max"}),
    "lightm-unet-mamba2": (LightMUNet, {"ssm": "mamba2"}),
}
DEFAULT = "lightm-small"


def names() -> list[str]:
    """Return the names of all networks: LightM's presets, then the peers that they are compared with."""
    return [*PRESETS, *baselines.PEERS]


def create(
    name: str,
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    image_size: Sequence[int] | None = None,
    **options: Any,
) -> nn.Module:
    """Return a new network by name, with fresh weights from torch's global generator.

    Arguments: `name` of a preset or of a peer (`lightm.nets.baselines`); `spatial_dims` 2 or 3; `in_channels` of the
    image; `out_channels` classes, background included; `image_size`: the size of the patches, which some peers are
    built for and LightM's own networks do not need; `options` override single settings.
    Raises InputError for an unknown name, an unknown option, impossible settings, a missing library, or an
    image_size that a peer cannot take.

    >>> network = lightm.network("lightm-small", spatial_dims=2, in_channels=1, out_channels=2)
    >>> sum(p.numel() for p in network.parameters()) > 100_000
    True
    """
    if name not in PRESETS and name not in baselines.PEERS:
        known = names()
        raise InputError(f"unknown network '{name}'{did_you_mean(name, known)} Known: {', '.join(sorted(known))}.")
    try:
        if name in baselines.PEERS:
            return baselines.build(name, spatial_dims, in_channels, out_channels, image_size, **options)
        build, settings = PRESETS[name]
        return build(spatial_dims, in_channels, out_channels, **{**settings, **options})
    except (TypeError, ValueError, ImportError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"network '{name}': {error}") from error


def count_parameters(network: nn.Module) -> int:
    """Return the sum of the elements of all parameters."""
    return sum(parameter.numel() for parameter in network.parameters())
