"""Kernels of the causal depthwise convolution over tokens: a block of tokens, all channels.

Addresses point to float32 data; `*_step` is in bytes from one token to the next; weights are stored (K, E).
"""

from __future__ import annotations

from typing import Any

from lightm.ops.bounds import Extent, rows
from lightm.ops.jit import LANES, device_function, kernel
from lightm.ops.vector import fma, full, load, store
from lightm.ops.vector_math import sigmoid


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
    x: int, x_step: int, y: int, y_step: int, weight: int, bias: int, kernel_size: int, channels: int, silu: int,
    first: int, last: int,
) -> dict[str, Extent]:  # fmt: skip
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
    x: int, x_step: int, dy: int, dy_step: int, dx: int, dx_step: int, weight: int, bias: int, kernel_size: int,
    channels: int, silu: int, first: int, last: int, length: int, dweight: int, dbias: int, scratch: int,
) -> dict[str, Extent]:  # fmt: skip
    row, stop = 4 * channels, min(last + kernel_size - 1, length)
    return {
        "x": rows(max(0, first - kernel_size + 1), stop if silu else last, x_step, row),
        "dy": rows(first, stop, dy_step, row),
        "dx": rows(first, last, dx_step, row),
        "weight": (0, kernel_size * row),
        "bias": (0, row),
        "dweight": (0, kernel_size * row),
        "dbias": (0, row),
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


def scratch_floats(block: int, kernel_size: int) -> Any:
    """Floats of scratch memory that a thread's backward kernel needs."""
    return (block + kernel_size - 1) * LANES
