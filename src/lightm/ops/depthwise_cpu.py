"""The depthwise convolution of kernel size 3 on the CPU: its kernels take rows of one (y, x) plane at a time.

A row is X voxels of C float32 channels. An output row takes from 9 input rows (3 in 2D); rows outside the image
are a row of zeros. Every input vector is loaded once per row and used for the three outputs beside it; the 27 (9)
weights of a tile of channels stay in registers. Weights are stored tile by tile: the kernel elements of channels c..
start at float c * 27 (9), each LANES (in the remainder: one) floats.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from lightm.ops.bounds import Extent, address, entry_address
from lightm.ops.jit import LANES, device_function, kernel
from lightm.ops.threads import for_rows, plane_sizes, row_chunks
from lightm.ops.vector import emit_fma, emit_load, full, literal, load, load_rows, store, store_rows


@intrinsic
def _spread(typing: Any, rows: Any, at: Any, weights: Any, before: Any, here: Any) -> Any:
    """_spread(rows, at, weights, before, here): inputs at byte `at` of every row, added to the three outputs
    they reach: returns (output before, output here, output after)."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        addresses, offset, weights_of, before, here = args
        after = None
        for r in range(rows.count):
            value = emit_load(builder, builder.add(builder.extract_value(addresses, r), offset), here.type.count)
            left, middle, right = (builder.extract_value(weights_of, 3 * r + k) for k in range(3))
            before = emit_fma(builder, value, right, before)
            here = emit_fma(builder, value, middle, here)
            after = builder.fmul(value, left) if after is None else emit_fma(builder, value, left, after)
        return context.make_tuple(builder, sig.return_type, [before, here, after])

    return types.UniTuple(here, 3)(rows, types.int64, weights, before, here), generate


@intrinsic
def _gather(typing: Any, rows: Any, at: Any, sums: Any, before: Any, here: Any, after: Any) -> Any:
    """_gather(rows, at, sums, before, here, after): the weights' gradients with the inputs at byte `at` of every row
    added, given the outputs' gradients beside it."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        addresses, offset, sums_of, *grads = args
        result = []
        for r in range(rows.count):
            value = emit_load(builder, builder.add(builder.extract_value(addresses, r), offset), grads[0].type.count)
            for k in range(3):
                total = builder.extract_value(sums_of, 3 * r + k)
                result.append(emit_fma(builder, value, grads[2 - k], total))
        return context.make_tuple(builder, sig.return_type, result)

    return sums(rows, types.int64, sums, before, here, after), generate


@intrinsic(prefer_literal=True)
def _window(typing: Any, x: Any, zeros: Any, z: Any, y: Any, depth: Any, height: Any, row: Any, axes: Any) -> Any:
    """_window(x, zeros, z, y, depth, height, row, axes): addresses of the input rows around (z, y), those outside
    being `zeros`; `axes` is a constant, 2 leaves the planes beside z out."""
    planes = (-1, 0, 1) if literal(axes) == 3 else (0,)
    window = [(dz, dy) for dz in planes for dy in (-1, 0, 1)]

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        base, nothing, z_at, y_at, planes_of, rows_of, bytes_of, _ = args
        number = base.type
        result = []
        for dz, dy in window:
            zz, yy = builder.add(z_at, number(dz)), builder.add(y_at, number(dy))
            inside = builder.and_(  # as unsigned numbers, negative ones are beyond every size
                builder.icmp_unsigned("<", zz, planes_of), builder.icmp_unsigned("<", yy, rows_of)
            )
            offset = builder.mul(builder.add(builder.mul(zz, rows_of), yy), bytes_of)
            result.append(builder.select(inside, builder.add(base, offset), nothing))
        return context.make_tuple(builder, sig.return_type, result)

    return types.UniTuple(types.int64, len(window))(*[types.int64] * 7, axes), generate


@device_function
def _output_row(rows, out, weight, step, width, elements, lanes):  # type: ignore[no-untyped-def]
    weights = load_rows(weight, elements, lanes)
    zero = full(0.0, lanes)
    before, here = zero, zero
    for i in range(width):
        before, here, after = _spread(rows, i * step, weights, before, here)
        if i > 0:
            store(out + (i - 1) * step, before)
        before, here = here, after
    store(out + (width - 1) * step, before)


@device_function
def _weight_row(rows, grad, dweight, step, width, elements, lanes):  # type: ignore[no-untyped-def]
    sums = load_rows(dweight, elements, lanes)
    zero = full(0.0, lanes)
    before, here = zero, load(grad, lanes)
    for i in range(width):
        after = load(grad + (i + 1) * step, lanes) if i + 1 < width else zero
        sums = _gather(rows, i * step, sums, before, here, after)
        before, here = here, after
    store_rows(dweight, sums)


def _plane_kernel(axes: int, run_row: Callable[..., None]) -> Callable[..., Any]:
    elements = 3**axes

    def extents(z: int, first: int, last: int, depth: int, height: int, width: int, channels: int) -> dict[str, Extent]:
        """Both kernels read the rows of x around those of the output, or of its gradient (`other`)."""
        row = 4 * channels * width
        low, high = (max(z - 1, 0), min(z + 1, depth - 1)) if axes == 3 else (z, z)
        return {
            "x": ((low * height + max(first - 1, 0)) * row, (high * height + min(last + 1, height)) * row),
            "other": ((z * height + first) * row, (z * height + last) * row),
            "weight": (0, 4 * channels * 3**axes),
            "zeros": (0, row),
        }

    @kernel(extents)
    def depthwise(x, other, weight, zeros, z, first, last, depth, height, width, channels):  # type: ignore[no-untyped-def]
        """Rows first..last-1 of output plane z of one image (depth is 1 in 2D)."""
        step = 4 * channels
        row = step * width
        whole = channels - channels % LANES
        for y in range(first, last):
            at = other + (z * height + y) * row
            for c in range(0, whole, LANES):
                rows = _window(x + 4 * c, zeros, z, y, depth, height, row, axes)
                run_row(rows, at + 4 * c, weight + 4 * c * elements, step, width, elements, LANES)
            for c in range(whole, channels):
                rows = _window(x + 4 * c, zeros, z, y, depth, height, row, axes)
                run_row(rows, at + 4 * c, weight + 4 * c * elements, step, width, elements, 1)

    return depthwise


@cache
def forward_kernel(axes: int) -> Callable[..., Any]:
    """The kernel that writes rows of the output, in 2 or 3 dimensions."""
    return _plane_kernel(axes, _output_row)


@cache
def weight_kernel(axes: int) -> Callable[..., Any]:
    """The kernel that adds the share of some rows of the output's gradient to that of the weights."""
    return _plane_kernel(axes, _weight_row)


def to_tiles(weight: Tensor) -> Tensor:
    """Weights (kernel elements, C) in the kernels' order, flat."""
    elements, channels = weight.shape
    whole = channels - channels % LANES
    tiles = weight[:, :whole].reshape(elements, -1, LANES).transpose(0, 1)
    return torch.cat((tiles.reshape(-1), weight[:, whole:].t().reshape(-1)))


def from_tiles(flat: Tensor, elements: int) -> Tensor:
    """Undo `to_tiles`: (kernel elements, C)."""
    channels = flat.numel() // elements
    whole = channels - channels % LANES
    tiles = flat[: whole * elements].reshape(-1, elements, LANES).transpose(0, 1).reshape(elements, whole)
    return torch.cat((tiles, flat[whole * elements :].reshape(-1, elements).t()), dim=1)


def run_forward(x: Tensor, weight: Tensor) -> Tensor:
    """The convolution of x (Bt, *spatial, C) with weight (3,)*d + (C,), in x's dtype."""
    out = torch.empty(x.shape)
    if not x.numel():
        return out.to(x.dtype)
    rows, sizes, channels = x.float().contiguous(), plane_sizes(x), x.shape[-1]
    tiles = to_tiles(weight.float().reshape(-1, channels))
    zeros = torch.zeros(sizes[2] * channels)
    run = forward_kernel(x.dim() - 2)

    def work(chunk: int, entry: int, z: int, first: int, last: int) -> None:
        of, to = entry_address(rows, entry), entry_address(out, entry)
        run(of, to, address(tiles), address(zeros), z, first, last, *sizes, channels)

    for_rows(x, work)
    return out.to(x.dtype)


def run_backward(grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of (x, weight)."""
    return input_gradient(grad_y, weight).to(x.dtype), weight_gradient(grad_y, x, weight)


def input_gradient(grad_y: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x."""
    return run_forward(grad_y, weight.flip(tuple(range(weight.dim() - 1))))


def weight_gradient(grad_y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The weight's gradient."""
    axes = x.dim() - 2
    if not x.numel():
        return torch.zeros_like(weight)
    rows, grad = x.float().contiguous(), grad_y.float().contiguous()
    sizes, channels, elements = plane_sizes(x), x.shape[-1], 3**axes
    zeros = torch.zeros(sizes[2] * channels)
    shares = torch.zeros((row_chunks(x), elements * channels))
    run = weight_kernel(axes)

    def work(chunk: int, entry: int, z: int, first: int, last: int) -> None:
        of, by = entry_address(rows, entry), entry_address(grad, entry)
        run(of, by, address(shares[chunk]), address(zeros), z, first, last, *sizes, channels)

    for_rows(x, work)
    return from_tiles(shares.sum(0), elements).reshape(weight.shape).to(weight.dtype)
