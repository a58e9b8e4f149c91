"""Networks without numbers: built on PyTorch's `meta` device, where a forward pass costs no memory and no time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightm.errors import InputError
from lightm.nets.presets import create, names


def known_names() -> list[str]:
    """Every name that `lightm.nets.create` knows, sorted."""
    return sorted(names())


def build_network(
    name: str,
    in_channels: int,
    out_channels: int,
    spatial: Sequence[int],
    options: Mapping[str, Any] | None = None,
    *,
    device: str = "meta",
) -> nn.Module:
    """Build a network by name, in 2D or 3D after the number of sizes in `spatial`, on the `meta` device or the CPU.

    The global random generator is left as it was. Raises InputError as `create` does, and for sizes that are none.
    """
    check_spatial(spatial)
    extra = {"image_size": tuple(spatial), **(options or {})}
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device(device):
                return create(name, len(spatial), in_channels, out_channels, **extra)
        except (RuntimeError, NotImplementedError):  # a network that computes numbers while it is built
            return create(name, len(spatial), in_channels, out_channels, **extra).to(device)


def check_spatial(spatial: Sequence[int]) -> None:
    """Raise InputError unless `spatial` is two or three positive sizes."""
    if len(spatial) not in (2, 3) or min(spatial, default=0) < 1:
        raise InputError(
            f"spatial size {' '.join(map(str, spatial)) or '(empty)'}: give two sizes (Y X) for a 2D network or three "
            "(Z Y X) for a 3D one, each at least 1, e.g. 128 128 128"
        )


@contextmanager
def meta_forward(network: nn.Module, in_channels: int, spatial: Sequence[int], batch: int = 1) -> Iterator[Tensor]:
    """Yield an image on `meta` with which `network` can be called inside of the block; sizes refused become InputError.

    On `meta` the operators run as the registered ones of the CPU do, whose shapes are known without a kernel.
    """
    with torch.device("meta"):
        try:
            yield torch.empty(batch, in_channels, *spatial)
        except (ValueError, RuntimeError) as error:
            if isinstance(error, ValueError) or "size" in str(error):
                raise InputError(
                    f"spatial size {' '.join(map(str, spatial))}: {' '.join(str(error).split())}"
                ) from error
            raise
