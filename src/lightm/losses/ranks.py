"""Sums over the ranks of distributed training, through which gradients flow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable


class _Sum(torch.autograd.Function):
    """Sum over ranks, forward and backward.

    Every rank computes the same loss L from the same sum s = sum_r c_r, and DistributedDataParallel averages the
    gradients of W ranks. With W * dL/ds for each c_r, which the sum of equal gradients is, that average is the
    gradient of L: that of the whole batch in one process.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return (total,)


def sum_over_ranks(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors, each summed over all ranks; as they are outside of distributed training.

    Every rank must call this with tensors of the same shapes and dtypes. Cost: one all_reduce, whatever the number
    of tensors, and one more in the backward pass.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return tensors
    total = _Sum.apply(torch.cat([tensor.flatten() for tensor in tensors]))
    parts = total.split([tensor.numel() for tensor in tensors])
    return tuple(part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True))
