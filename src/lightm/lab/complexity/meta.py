"""Networks without numbers, and the activation memory they need, on PyTorch's `meta` device.

Nothing is allocated and nothing computed there. Two figures of memory, both without the network's weights:

- **inference**: the peak of the bytes of all tensors alive at once in one forward pass without gradients, the image
  and the logits included. A kernel's private scratch memory is not seen.
- **training**: the bytes that autograd keeps for the backward pass after one forward pass of a batch of one, each
  storage once, weights left out. The optimiser's state, the gradients and the backward pass's own temporaries come on
  top; all but the last depend on the number of parameters alone.

The fused layers of the CPU keep and need less; `lightm bench` measures what they need.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


# Activation memory ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of activations of one image in float32, see the module."""

    inference_bytes: int
    training_bytes: int


def activation_memory(network: nn.Module, in_channels: int, spatial: Sequence[int]) -> Memory:
    """Return the activation memory of a network on the `meta` device for one image of these sizes.

    Raises InputError for sizes that the network refuses.
    """
    return Memory(_inference_peak(network, in_channels, spatial), _saved_for_backward(network, in_channels, spatial))


class _Live(TorchDispatchMode):
    """Follows the storages of all tensors that operators make, from their birth to their end."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.live = self.peak = 0

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, key).atexit = False

    def _gone(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return result


def _inference_peak(network: nn.Module, in_channels: int, spatial: Sequence[int]) -> int:
    live = _Live()
    for parameter in network.parameters():  # known beforehand, so that views of them count nothing
        live.sizes[parameter.untyped_storage()._cdata] = 0
    for buffer in network.buffers():
        live.sizes[buffer.untyped_storage()._cdata] = 0
    with meta_forward(network, in_channels, spatial) as image, torch.no_grad(), live:
        live.see(image)
        network(image)
    return live.peak


def _saved_for_backward(network: nn.Module, in_channels: int, spatial: Sequence[int]) -> int:
    weights = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())}
    kept: dict[int, Tensor] = {}  # the tensors, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in weights:
            kept.setdefault(key, tensor)
        return tensor

    with (
        meta_forward(network, in_channels, spatial) as image,
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        logits = network(image)
        total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        del logits
    return total
