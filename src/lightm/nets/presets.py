"""Networks by name: LightM's presets, the baselines they are compared with, and those registered from outside."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from lightm.errors import InputError
from lightm.nets import baselines
from lightm.nets.lightm_unet import LightMUNet, ReleasedLightMUNet
from lightm.registry import Registry

Builder = Callable[..., nn.Module]

_SPM = {"layer": "spm", "pooling": "add", "bottleneck_layers": 3}  # the LightM-UNet report's Figure 6
_OWN = {**_SPM, "stem": "conv", "position_conv": True}
_SMALL = {"base_channels": 16}

PRESETS: dict[str, tuple[Builder, dict[str, Any]]] = {
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


@dataclass(frozen=True)
class Entry:
    """What a name stands for. `options`: settings of the builder; `renamed`: its options by their former names."""

    builder: Builder
    options: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)


def _wrap(builder: Any) -> Entry:
    if not callable(builder):
        raise InputError(
            f"network builder {builder!r}: expected a class or function that is called as "
            "builder(spatial_dims, in_channels, out_channels, **options) and returns an nn.Module"
        )
    return Entry(builder)


NETWORKS: Registry[Entry] = Registry(
    "network",
    "lightm.networks",
    _wrap,
    hint="Add one with lightm.register_network(name, builder) before it is named, also before a model of it is loaded.",
)
for _name, (_builder, _options) in PRESETS.items():
    NETWORKS.add_built_in(_name, Entry(_builder, _options, {"filters": "base_channels"}))
for _name in baselines.BASELINES:
    _widths = "channels" if _name in ("unet", "attention-unet", "ultralight-vm-unet") else "base_channels"
    NETWORKS.add_built_in(
        _name, Entry(partial(baselines.build, _name), {}, {"filters": _widths, "max_filters": "max_channels"})
    )


def names() -> list[str]:
    """Return the names of all networks: LightM's presets, the baselines, then what was registered or installed."""
    return NETWORKS.names()


def register_network(name: str, builder: Builder, *, overwrite: bool = False) -> None:
    """Make a network of one's own known by a name, wherever LightM takes the name of a network.

    builder: a class or function, called as builder(spatial_dims, in_channels, out_channels, **options), that returns
    an `nn.Module` with fresh weights which maps (B, in_channels, *S) to logits (B, out_channels, *S). A parameter
    `image_size` gets the size of the patches. A trained model keeps name and options and can be loaded wherever the
    name is registered; options must therefore be plain values (numbers, text, lists).

    The command line and other programs know the name if a package declares it as an entry point of the group
    "lightm.networks" (in pyproject.toml: `[project.entry-points."lightm.networks"]`, `my-net = "my_package:MyNet"`).

    Raises InputError for a name that is taken (LightM's own are never replaced, others with `overwrite`) or is not one
    lower-case word, and for a builder that cannot be called.

    >>> from torch import nn
    >>> def tiny(spatial_dims, in_channels, out_channels, width=8):
    ...     conv = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
    ...     return nn.Sequential(conv(in_channels, width, 3, padding=1), nn.ReLU(), conv(width, out_channels, 1))
    >>> lightm.register_network("tiny-example", tiny, overwrite=True)
    >>> model = lightm.network("tiny-example", spatial_dims=2, in_channels=1, out_channels=2)
    >>> sum(parameter.numel() for parameter in model.parameters())
    98
    """
    NETWORKS.register(name, builder, overwrite=overwrite)


def current_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options under their names of today: model folders and configurations may hold former ones."""
    renamed = NETWORKS[name].renamed
    return {renamed.get(option, option): value for option, value in options.items()}


def network(
    name: str,
    spatial_dims: int = 3,
    in_channels: int = 1,
    out_channels: int = 2,
    image_size: Sequence[int] | None = None,
    **options: Any,
) -> nn.Module:
    """Return a new network by name, with fresh weights from torch's global generator.

    Arguments: `name` of a preset, of a baseline (`lightm.nets.baselines`) or of a registered network; `spatial_dims` 2
    or 3; `in_channels` of the image; `out_channels` classes, background included; `image_size`: the size of the patches
    in voxels, which some baselines are built for; `options` override single settings, such as `base_channels=16`.

    Returns a module (B, in_channels, *S) -> raw logits (B, out_channels, *S), float32. LightM's own networks take sizes
    S that their `divisor` (8) divides, and raise ValueError for others. Raises InputError for an unknown name or
    option, impossible settings, a missing library, or an image_size that a baseline cannot take.

    >>> import torch
    >>> model = lightm.network("lightm-small", spatial_dims=2, in_channels=1, out_channels=3)
    >>> model(torch.zeros(1, 1, 64, 64)).shape
    torch.Size([1, 3, 64, 64])
    """
    entry = NETWORKS[name]
    former = [option for option in options if option in entry.renamed]
    if former:
        told = ", ".join(f"'{option}' is now '{entry.renamed[option]}'" for option in former)
        warnings.warn(f"network '{name}': option {told}", DeprecationWarning, stacklevel=2)
        options = current_options(name, options)
    options = {**entry.options, **options}
    try:
        if "image_size" in inspect.signature(entry.builder).parameters:
            options["image_size"] = image_size
        built = entry.builder(spatial_dims, in_channels, out_channels, **options)
    except InputError:
        raise
    except (TypeError, ValueError, ImportError) as error:
        raise InputError(f"network '{name}': {error}") from error
    if not isinstance(built, nn.Module):
        raise InputError(f"network '{name}': its builder returned {type(built).__name__}, expected an nn.Module")
    return built


def fitting_size(
    name: str | nn.Module,
    *,
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    image_size: Sequence[int],
    **options: Any,
) -> tuple[int, ...]:
    """Return the smallest size of patches, none shorter than `image_size`, that a network can take.

    name: as in `network`, or a module, whose attribute `divisor` counts, one number or one per axis. Raises InputError
    as `network`, where no such size is found.

    >>> from lightm.nets.presets import fitting_size
    >>> fitting_size("unet", spatial_dims=2, in_channels=1, out_channels=2, image_size=(24, 40))
    (32, 48)
    """

    def up(size: Sequence[int], divisor: Sequence[int]) -> tuple[int, ...]:
        return tuple(-(-length // step) * step for length, step in zip(size, divisor, strict=True))

    def divisor_of(net: nn.Module) -> tuple[int, ...]:
        found = getattr(net, "divisor", 1)
        return found if isinstance(found, tuple) else (int(found),) * spatial_dims

    if isinstance(name, nn.Module):
        return up(image_size, divisor_of(name))
    refusal: InputError | None = None
    for step in (1, 16, 32, 64):  # networks that are built for one size refuse others before they have a divisor
        size = up(image_size, (step,) * spatial_dims)
        try:
            for _ in range(4):  # a divisor may follow from the size
                net = network(
                    name, spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels,
                    image_size=size, **options,
                )  # fmt: skip
                fit = up(size, divisor_of(net))
                if fit == size:
                    getattr(net, "check_size", lambda size: None)(size)
                    return size
                size = fit
        except InputError as error:
            refusal = refusal or error
        except ValueError as error:
            refusal = refusal or InputError(f"network '{name}': {error}")
    raise refusal or InputError(
        f"network '{name}': no patch size from {tuple(image_size)} on fits it; give another one"
    )


create = network  # inside of this package, where a variable is called network


def count_parameters(network: nn.Module) -> int:
    """Return the sum of the elements of all parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return a network's parameters in two groups for an optimizer of torch: those that decay, and those that do not.

    Matrices and convolution kernels decay. Biases, norms, scales and the state space's parameters (A_log, D, the bias
    of dt, the causal convolution) do not, as in Mamba: decay would pull the learnt time scales towards one value. What
    must not decay is named by the attribute `no_decay` of its module, or marked as Mamba does it
    (`parameter._no_weight_decay = True`); nothing of fewer than two axes decays in any network.

    >>> import torch
    >>> model = lightm.network("lightm-small", spatial_dims=2)
    >>> optimizer = torch.optim.AdamW(lightm.parameter_groups(model, 0.01), lr=1e-3)
    >>> [group["weight_decay"] for group in optimizer.param_groups]
    [0.01, 0.0]
    """
    decay: dict[nn.Parameter, bool] = {}
    for module in network.modules():
        exempt = getattr(module, "no_decay", ())
        for name, parameter in module.named_parameters(recurse=False):
            spared = parameter.ndim < 2 or name in exempt or getattr(parameter, "_no_weight_decay", False)
            decay.setdefault(parameter, not spared)
    return [
        {"params": [parameter for parameter in decay if decay[parameter]], "weight_decay": weight_decay},
        {"params": [parameter for parameter in decay if not decay[parameter]], "weight_decay": 0.0},
    ]
