"""A network built from a description that others wrote, together with weights, without trusting either.

The description may ask for any number of layers of any width. What bounds it: no long lists and no large numbers in the
settings of LightM's own networks and of the baselines, and the weights beside it. A network that does not have just
their names and shapes is refused before its memory is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from torch import nn

from lightm.config_io import validated
from lightm.errors import InputError
from lightm.nets.presets import NETWORKS, create, current_options

OWN = "own:"
"""How the name of a network begins that is no name but a module of the caller's."""

Shapes = Mapping[str, tuple[int, ...]]

# Far above any setting of a network that trains, far below one that takes minutes to lay out.
_MAX_SETTINGS = 10_000


class Description(BaseModel):
    """A network as `model.json` describes it: what `lightm.nets.create` takes."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    spatial_dims: Annotated[int, Field(ge=2, le=3)]
    in_channels: Annotated[int, Field(ge=1, le=1000)]
    out_channels: Annotated[int, Field(ge=1, le=1000)]
    image_size: list[Annotated[int, Field(ge=1, le=_MAX_SETTINGS)]] | None = None
    options: dict[str, Any] = Field(default_factory=dict)


def tensor_shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors of a safetensors file from its header; raises InputError naming it."""
    try:
        with safe_open(weights, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{weights}: not a readable safetensors file ({error})") from error


def create_described(described: Mapping[str, Any], shapes: Shapes, where: Path, weights: Path) -> nn.Module:
    """Return the network of a description, with fresh weights, if its tensors have the names and shapes given.

    described: name, spatial_dims, in_channels, out_channels and options, as `create` takes them; options may have
    their former names. where, weights: the files for messages. The network is laid out without memory first (on
    PyTorch's meta device). Raises InputError for all else. Cost: some 20 ms more than `create`.
    """
    if str(described.get("name")).startswith(OWN):
        raise InputError(
            f"{where}: trained with a network of your own, '{str(described['name']).removeprefix(OWN)}', which no file "
            "holds; make it again as it was and give it: lightm.load(..., network=module)"
        )
    description = validated(Description, dict(described), f"{where}: network")
    name = description.name
    try:
        options = current_options(name, description.options)
        arguments = {**description.model_dump(exclude={"options"}, exclude_none=True), **options}
        if NETWORKS.is_built_in(name) and _total(options) > _MAX_SETTINGS:
            raise InputError(f"network '{name}': settings that add up to more than {_MAX_SETTINGS}")
        with torch.random.fork_rng(devices=[]):  # building draws initial weights; the caller's generator is left alone
            try:
                with torch.device("meta"):
                    expected = create(**arguments).state_dict()
            except (RuntimeError, NotImplementedError) as error:  # a network that computes numbers while it is built
                if "meta" not in str(error):
                    raise
                expected = create(**arguments).state_dict()
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except Exception as error:  # impossible settings end in errors of any kind
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{where}: its 'network' cannot be built ({reason}); the file is damaged") from error
    check_shapes(expected, shapes, name, weights)
    with torch.random.fork_rng(devices=[]):
        return create(**arguments)


def check_shapes(expected: Mapping[str, torch.Tensor], shapes: Shapes, name: str, weights: Path) -> None:
    """Raise InputError where a network's tensors differ from those in a file of weights."""
    missing, unknown = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    other = sorted(n for n in expected.keys() & shapes.keys() if tuple(expected[n].shape) != tuple(shapes[n]))
    if missing or unknown or other:
        raise InputError(
            f"{weights}: weights of another network than '{name}': {len(missing)} missing "
            f"{missing[:3]}, {len(unknown)} unknown {unknown[:3]}, {len(other)} of another shape {other[:3]}"
        )


def _total(value: Any) -> float:
    """The sum of all numbers in a setting, and of the lengths of its lists."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return len(value) + sum(_total(part) for part in value)
    return abs(value) if isinstance(value, (int, float)) else 0
