"""A network built from a description that others wrote, together with weights, without trusting either.

The description may ask for any number of layers of any width. What bounds it are the weights beside it: a network
that does not have just their names and shapes is refused before its memory is asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from lightm.errors import InputError
from lightm.nets.presets import create

OWN = "own:"
"""How the name of a network begins that is no name but a module of the caller's."""

Shapes = Mapping[str, tuple[int, ...]]

# Modules and parameters may be registered more often than they have names in the state: shared ones, and those that
# are put together and then taken apart. No network here does so for half of them.
_SPARE = 2
_FREE = 1000
# Networks that PyTorch cannot build without memory: no setting of theirs may be larger than this.
_MAX_SETTING = 4096


def tensor_shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors of a safetensors file from its header; raises InputError naming it."""
    try:
        with safe_open(weights, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{weights}: not a readable safetensors file ({error})") from error


def create_described(described: Mapping[str, Any], shapes: Shapes, where: Path, weights: Path) -> nn.Module:
    """Return the network of a description, with fresh weights, if its tensors have the names and shapes given.

    described: name, spatial_dims, in_channels, out_channels and options, as `create` takes them. where, weights: the
    files for messages. It is built without memory first (on PyTorch's meta device), and no further than
    the number of tensors allows. Raises InputError for all else. Cost: some 20 ms more than `create`.
    """
    settings = {key: value for key, value in described.items() if key != "options"}
    if str(settings.get("name")).startswith(OWN):
        raise InputError(
            f"{where}: trained with a network of your own, '{str(settings['name']).removeprefix(OWN)}', which no file "
            "holds; make it again as it was and give it: lightm.load(..., network=module)"
        )
    try:
        options = dict(described.get("options", {}))
        with _bounded(_SPARE * len(shapes) + _FREE), torch.random.fork_rng(devices=[]):
            try:
                with torch.device("meta"):
                    expected = create(**settings, **options).state_dict()
            except RuntimeError as error:
                if "meta" not in str(error):
                    raise
                _check_settings({**settings, **options})
                expected = create(**settings, **options).state_dict()
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except _TooLargeError:
        raise InputError(
            f"{weights}: weights of another network than '{settings.get('name')}': {len(shapes)} tensors, and the "
            f"network described in {where.name} has many more"
        ) from None
    except TypeError as error:
        raise InputError(f"{where}: its 'network' is not complete ({error})") from error
    except Exception as error:  # impossible settings end in errors of any kind
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{where}: its 'network' cannot be built ({reason}); the file is damaged") from error
    check_shapes(expected, shapes, str(settings.get("name")), weights)
    with torch.random.fork_rng(devices=[]):  # building draws initial weights; the caller's generator is left alone
        return create(**settings, **options)


def check_shapes(expected: Mapping[str, torch.Tensor], shapes: Shapes, name: str, weights: Path) -> None:
    """Raise InputError where a network's tensors differ from those in a file of weights."""
    missing, unknown = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    other = sorted(n for n in expected.keys() & shapes.keys() if tuple(expected[n].shape) != tuple(shapes[n]))
    if missing or unknown or other:
        raise InputError(
            f"{weights}: weights of another network than '{name}': {len(missing)} missing "
            f"{missing[:3]}, {len(unknown)} unknown {unknown[:3]}, {len(other)} of another shape {other[:3]}"
        )


class _TooLargeError(Exception):
    """More modules or parameters than the weights can fill."""


@contextmanager
def _bounded(most: int) -> Iterator[None]:
    """Raise _TooLargeError where this thread registers more than `most` modules and parameters in the block."""
    left, thread = [most], threading.get_ident()

    def count(module: nn.Module, name: str, part: Any) -> None:
        if threading.get_ident() == thread:
            left[0] -= 1
            if left[0] < 0:
                raise _TooLargeError

    hooks = [register_module_module_registration_hook(count), register_module_parameter_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_settings(value: Any) -> None:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        if len(value) > 100:
            raise ValueError(f"a list of {len(value)} settings")
        for part in value:
            _check_settings(part)
    elif isinstance(value, (int, float)) and abs(value) > _MAX_SETTING:
        raise ValueError(f"a setting of {value}")
