"""The causal convolution on the CPU: kernels spread over batch entries and blocks of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from lightm.ops.bounds import address
from lightm.ops.conv1d_kernels import conv1d_backward, conv1d_forward, scratch_floats
from lightm.ops.threads import parallel_for, worker_count

_BLOCK = 512  # tokens of one work item; fixed, so that sums do not depend on the number of threads


def _rows(x: Tensor) -> Tensor:
    """x as float32 with channels next to each other."""
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _parameters(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    by_offset = weight.float().t().contiguous()
    return by_offset, torch.zeros(weight.shape[0]) if bias is None else bias.float().contiguous()


def run_forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """y (Bt, L, E) in x's dtype."""
    batch, length, channels = x.shape
    rows = _rows(x)
    y = torch.empty(x.shape)
    by_offset, shift = _parameters(weight, bias)
    blocks = -(-length // _BLOCK)

    def work(item: int, worker: int) -> None:
        entry, block = divmod(item, blocks)
        conv1d_forward(
            address(rows) + 4 * entry * rows.stride(0),
            4 * rows.stride(1),
            address(y) + 4 * entry * y.stride(0),
            4 * channels,
            address(by_offset),
            address(shift),
            weight.shape[1],
            channels,
            int(silu),
            block * _BLOCK,
            min((block + 1) * _BLOCK, length),
        )

    parallel_for(work, batch * blocks)
    return y.to(x.dtype)


def run_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, bias); the last is empty without bias."""
    batch, length, channels = x.shape
    kernel_size = weight.shape[1]
    rows, grad = _rows(x), _rows(grad_y)
    dx = torch.empty(x.shape)
    by_offset, shift = _parameters(weight, bias)
    blocks = -(-length // _BLOCK)
    items = batch * blocks
    dweight, dbias = torch.empty((items, kernel_size, channels)), torch.empty((items, channels))
    scratch = torch.empty((worker_count(items), scratch_floats(_BLOCK, kernel_size)))

    def work(item: int, worker: int) -> None:
        entry, block = divmod(item, blocks)
        conv1d_backward(
            address(rows) + 4 * entry * rows.stride(0),
            4 * rows.stride(1),
            address(grad) + 4 * entry * grad.stride(0),
            4 * grad.stride(1),
            address(dx) + 4 * entry * dx.stride(0),
            4 * channels,
            address(by_offset),
            address(shift),
            kernel_size,
            channels,
            int(silu),
            block * _BLOCK,
            min((block + 1) * _BLOCK, length),
            length,
            address(dweight[item]),
            address(dbias[item]),
            address(scratch[worker]),
        )

    parallel_for(work, items)
    total = torch.empty(0) if bias is None else dbias.sum(0).to(bias.dtype)
    return dx.to(x.dtype), dweight.sum(0).t().to(weight.dtype).contiguous(), total
