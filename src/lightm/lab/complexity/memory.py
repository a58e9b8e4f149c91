"""Activation memory of the plain composition of operators, on the `meta` device: nothing is allocated.

Two figures, both without the network's weights:

- **inference**: the peak of the bytes of all tensors alive at once in one forward pass without gradients, the image
  and the logits included. A kernel's private scratch memory is not seen.
- **training**: the bytes that autograd keeps for the backward pass after one forward pass of a batch of one, each
  storage once, weights left out. The optimiser's state, the gradients and the backward pass's own temporaries come on
  top; all but the last depend on the number of parameters alone.

The fused layers of the CPU keep and need less; `lightm bench` measures what they need.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightm.lab.complexity.shapes import meta_forward


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
