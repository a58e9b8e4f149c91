"""The causal depthwise convolution on the CPU: a kernel takes a block of tokens and all channels.

In kernels addresses point to float32 data; `*_step` is in bytes from one token to the next; weights are stored (K, E).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightm.ops.bounds import Extent, address, each, entry_address, rows, strided_address, token_rows
from lightm.ops.jit import LANES, device_function, kernel
from lightm.ops.threads import parallel_for, worker_count
from lightm.ops.vector import fma, full, load, store
from lightm.ops.vector_math import sigmoid

_BLOCK = 512  # tokens of one work item; fixed, so that sums do not depend on the number of threads


@device_function
def _before_activation(x, x_step, t, weight, bias, kernel_size, channels, c, lanes):  # type: ignore[no-untyped-def]
    """The convolution at token t for `lanes` channels from c on."""
    total = load(bias + 4 * c, lanes)
    for k in range(max(0, kernel_size - 1 - t), kernel_size):
        at = x + (t - kernel_size + 1 + k) * x_step + 4 * c
        total = fma(load(weight + 4 * (k * channels + c), lanes), load(at, lanes), total)
    return total


@device_function
def _forward(x, x_step, y, y_step, weight, bias, kernel_size, channels, silu, first, last, c, lanes):  # type: ignore[no-untyped-def]
    for t in range(first, last):
        total = _before_activation(x, x_step, t, weight, bias, kernel_size, channels, c, lanes)
        if silu != 0:
            total = total * sigmoid(total, lanes)
        store(y + t * y_step + 4 * c, total)


def _forward_extents(
    x_step: int, y_step: int, kernel_size: int, channels: int, first: int, last: int
) -> dict[str, Extent]:
    row = 4 * channels
    return {
        "x": rows(max(0, first - kernel_size + 1), last, x_step, row),
        "y": rows(first, last, y_step, row),
        "weight": (0, kernel_size * row),
        "bias": (0, row),
    }


@kernel(_forward_extents)
def conv1d_forward(  # type: ignore[no-untyped-def]
    x, x_step, y, y_step, weight, bias, kernel_size, channels, silu, first, last
):
    """Write y for tokens first..last-1 of the sequence at x."""
    whole = channels - channels % LANES
    for c in range(0, whole, LANES):
        _forward(x, x_step, y, y_step, weight, bias, kernel_size, channels, silu, first, last, c, LANES)
    for c in range(whole, channels):
        _forward(x, x_step, y, y_step, weight, bias, kernel_size, channels, silu, first, last, c, 1)


@device_function
def _backward(  # type: ignore[no-untyped-def]
    x, x_step, dy, dy_step, dx, dx_step, weight, bias, kernel_size, channels, silu, first, last, length,
    dweight, dbias, scratch, c, lanes,
):  # fmt: skip
    row = 4 * lanes
    stop = min(last + kernel_size - 1, length)
    one = full(1.0, lanes)
    for t in range(first, stop):
        grad = load(dy + t * dy_step + 4 * c, lanes)
        if silu != 0:
            total = _before_activation(x, x_step, t, weight, bias, kernel_size, channels, c, lanes)
            s = sigmoid(total, lanes)
            grad = grad * s * fma(total, one - s, one)
        store(scratch + (t - first) * row, grad)
    for t in range(first, last):
        total = full(0.0, lanes)
        for k in range(max(0, t + kernel_size - stop), kernel_size):
            at = scratch + (t + kernel_size - 1 - k - first) * row
            total = fma(load(weight + 4 * (k * channels + c), lanes), load(at, lanes), total)
        store(dx + t * dx_step + 4 * c, total)
    for k in range(kernel_size):
        total = full(0.0, lanes)
        for t in range(max(first, kernel_size - 1 - k), last):
            at = x + (t - kernel_size + 1 + k) * x_step + 4 * c
            total = fma(load(scratch + (t - first) * row, lanes), load(at, lanes), total)
        store(dweight + 4 * (k * channels + c), total)
    total = full(0.0, lanes)
    for t in range(first, last):
        total = total + load(scratch + (t - first) * row, lanes)
    store(dbias + 4 * c, total)


def _backward_extents(
    x_step: int, dy_step: int, dx_step: int, kernel_size: int, channels: int, silu: int, first: int, last: int,
    length: int,
) -> dict[str, Extent]:  # fmt: skip
    row, stop = 4 * channels, min(last + kernel_size - 1, length)
    return {
        "x": rows(max(0, first - kernel_size + 1), stop if silu else last, x_step, row),
        "dy": rows(first, stop, dy_step, row),
        "dx": rows(first, last, dx_step, row),
        **each((0, kernel_size * row), "weight", "dweight"),
        **each((0, row), "bias", "dbias"),
        "scratch": rows(0, stop - first, 4 * LANES, 4 * LANES),
    }


@kernel(_backward_extents)
def conv1d_backward(  # type: ignore[no-untyped-def]
    x, x_step, dy, dy_step, dx, dx_step, weight, bias, kernel_size, channels, silu, first, last, length,
    dweight, dbias, scratch,
):  # fmt: skip
    """Write dx for tokens first..last-1 and these tokens' share of dweight (K, E) and dbias (E).

    `scratch` holds last - first + K - 1 rows of LANES floats: the gradient before the activation.
    """
    whole = channels - channels % LANES
    for c in range(0, whole, LANES):
        _backward(
            x, x_step, dy, dy_step, dx, dx_step, weight, bias, kernel_size, channels, silu, first, last, length,
            dweight, dbias, scratch, c, LANES,
        )  # fmt: skip
    for c in range(whole, channels):
        _backward(
            x, x_step, dy, dy_step, dx, dx_step, weight, bias, kernel_size, channels, silu, first, last, length,
            dweight, dbias, scratch, c, 1,
        )  # fmt: skip


def _parameters(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    by_offset = weight.float().t().contiguous()
    return by_offset, torch.zeros(weight.shape[0]) if bias is None else bias.float().contiguous()


def run_forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """y (Bt, L, E) in x's dtype."""
    batch, length, channels = x.shape
    tokens, y = token_rows(x), torch.empty(x.shape)
    x_at, x_entry, x_step = strided_address(tokens)
    by_offset, shift = _parameters(weight, bias)
    blocks = -(-length // _BLOCK)

    def work(item: int, worker: int) -> None:
        entry, block = divmod(item, blocks)
        conv1d_forward(
            x_at + entry * x_entry, x_step, entry_address(y, entry), 4 * channels, address(by_offset), address(shift),
            weight.shape[1], channels, int(silu), block * _BLOCK, min((block + 1) * _BLOCK, length),
        )  # fmt: skip

    parallel_for(work, batch * blocks)
    return y.to(x.dtype)


def run_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, bias); the last is empty without bias."""
    (batch, length, channels), kernel_size = x.shape, weight.shape[1]
    tokens, grad, dx = token_rows(x), token_rows(grad_y), torch.empty(x.shape)
    (x_at, x_entry, x_step), (dy_at, dy_entry, dy_step) = strided_address(tokens), strided_address(grad)
    by_offset, shift = _parameters(weight, bias)
    blocks = -(-length // _BLOCK)
    items = batch * blocks
    dweight, dbias = torch.empty((items, kernel_size, channels)), torch.empty((items, channels))
    # a row of LANES floats for each token of a block and the K - 1 after it
    scratch = torch.empty((worker_count(items), (_BLOCK + kernel_size - 1) * LANES))

    def work(item: int, worker: int) -> None:
        entry, block = divmod(item, blocks)
        conv1d_backward(
            x_at + entry * x_entry, x_step, dy_at + entry * dy_entry, dy_step, entry_address(dx, entry), 4 * channels,
            address(by_offset), address(shift), kernel_size, channels, int(silu), block * _BLOCK,
            min((block + 1) * _BLOCK, length), length, address(dweight[item]), address(dbias[item]),
            address(scratch[worker]),
        )  # fmt: skip

    parallel_for(work, items)
    total = torch.empty(0) if bias is None else dbias.sum(0).to(bias.dtype)
    return dx.to(x.dtype), dweight.sum(0).t().to(weight.dtype).contiguous(), total
