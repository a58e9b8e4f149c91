"""The linear layer on the CPU: kernels spread over segments of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from lightm.ops.bounds import address
from lightm.ops.jit import LANES
from lightm.ops.matmul_kernels import SCRATCH, Packed, gradient_kernel, matmul_kernel
from lightm.ops.threads import parallel_for, worker_count

_SEGMENT = 1920  # rows of one work item of a matmul
_SUMMED = (
    2048  # rows of one work item of a weight's gradient; fixed, so that sums do not depend on the number of threads
)


def _rows(x: Tensor) -> Tensor:
    """x as (rows, C) with channels next to each other; a copy only where the layout asks for one."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def run_matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., C) times the transpose of weight, (C_out, C) or (G, C_out / G, C / G), + bias."""
    rows = _rows(x)
    if weight.dim() == 2:
        packed = Packed(weight.t(), bias)
    else:
        packed = Packed(torch.block_diag(*weight).t(), bias, groups=weight.shape[0])
    y = torch.empty((*x.shape[:-1], packed.columns))
    plan, blocks, matrix, shift = packed.arguments
    items = -(-rows.shape[0] // _SEGMENT)
    scratch = torch.empty((worker_count(items), SCRATCH // 4))
    row_in, row_out = 4 * rows.stride(0), 4 * packed.columns

    def work(item: int, worker: int) -> None:
        first = item * _SEGMENT
        matmul_kernel(
            plan, blocks, address(rows) + first * row_in, row_in, matrix, shift, address(y) + first * row_out,
            row_out, min(_SEGMENT, rows.shape[0] - first), address(scratch[worker]),
        )  # fmt: skip

    parallel_for(work, items)
    return y


def run_weight_gradient(left: Tensor, right: Tensor, groups: int = 1) -> Tensor:
    """transpose(left) @ right over all rows, part by part: (groups, A / groups, B / groups)."""
    a, b = _rows(left), _rows(right)
    count, high, wide = a.shape[0], a.shape[1] // groups, b.shape[1] // groups
    items = max(1, -(-count // _SUMMED))
    parts = torch.zeros((items, groups, high, wide))
    zeros = torch.zeros(4 * LANES)
    scratch = torch.empty((worker_count(items), SCRATCH // 2 + _SUMMED * LANES))

    def work(item: int, worker: int) -> None:
        first = item * _SUMMED
        for g in range(groups):
            gradient_kernel(
                address(a) + 4 * (first * a.stride(0) + g * high), 4 * a.stride(0), high,
                address(b) + 4 * (first * b.stride(0) + g * wide), 4 * b.stride(0), wide,
                min(_SUMMED, count - first), address(parts[item, g]), address(zeros), address(scratch[worker]),
            )  # fmt: skip

    parallel_for(work, items)
    return parts.sum(0)
