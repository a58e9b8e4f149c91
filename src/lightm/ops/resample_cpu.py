"""Halving and doubling channels-last images on the CPU: pooling over 2x2(x2) voxels and linear interpolation.

Kernels work on one plane, rows `first`..`last` - 1 of their output. Sizes are in voxels; in 2D the depth is 1 and not
resampled (`axes` is 2). Addresses point to float32 data. Interpolation has its samples at voxel centres: an output
is 3/4 of the nearest and 1/4 of the next nearest input along every axis, clamped at the border.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from lightm.ops.bounds import NOTHING, Extent, address, entry_address
from lightm.ops.jit import LANES, device_function, kernel
from lightm.ops.threads import doubled, for_blocks, for_rows, halved, plane_sizes
from lightm.ops.vector import call, fma, full, load, splat, store


@intrinsic
def _first_largest(typing: Any, kept: Any, value: Any, largest: Any) -> Any:
    """(gradient for this voxel, gradient still to give) of a pooled voxel's gradient `kept`."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        left, here, best = args
        zero = splat(0.0, left.type)
        same = builder.fcmp_ordered("==", here, best)
        return context.make_tuple(
            builder, sig.return_type, [builder.select(same, left, zero), builder.select(same, zero, left)]
        )

    return types.UniTuple(kept, 2)(kept, value, largest), generate


@intrinsic
def _larger(typing: Any, a: Any, b: Any) -> Any:
    """The larger of a and b; NaN when one is."""
    name = f"llvm.maximum.v{a.lanes}f32"
    return a(a, a), lambda context, builder, sig, args: call(builder, name, args[0].type, *args)


# Pooling: `half` is the pooled image, or in the backward functions its gradient; those write dx


@device_function
def _corner(k, row, step):  # type: ignore[no-untyped-def]
    """Where corner k of a block of 2x2(x2) voxels is."""
    return (k & 1) * step + (k >> 1 & 1) * row[0] + (k >> 2) * row[1]


@device_function
def _max(x, half, dx, row, step, width, lanes, corners):  # type: ignore[no-untyped-def]
    for i in range(width):
        best = load(x + 2 * i * step, lanes)
        for k in range(1, corners):
            best = _larger(best, load(x + _corner(k, row, step) + 2 * i * step, lanes))
        store(half + i * step, best)


@device_function
def _max_back(x, half, dx, row, step, width, lanes, corners):  # type: ignore[no-untyped-def]
    for i in range(width):
        best = load(x + 2 * i * step, lanes)
        for k in range(1, corners):
            best = _larger(best, load(x + _corner(k, row, step) + 2 * i * step, lanes))
        left = load(half + i * step, lanes)
        for k in range(corners):
            at = _corner(k, row, step) + 2 * i * step
            given, left = _first_largest(left, load(x + at, lanes), best)
            store(dx + at, given)


@device_function
def _mean(x, half, dx, row, step, width, lanes, corners):  # type: ignore[no-untyped-def]
    for i in range(width):
        total = full(0.0, lanes)
        for k in range(corners):
            total = total + load(x + _corner(k, row, step) + 2 * i * step, lanes)
        store(half + i * step, total * full(1.0 / corners, lanes))


@device_function
def _mean_back(x, half, dx, row, step, width, lanes, corners):  # type: ignore[no-untyped-def]
    for i in range(width):
        given = load(half + i * step, lanes) * full(1.0 / corners, lanes)
        for k in range(corners):
            store(dx + _corner(k, row, step) + 2 * i * step, given)


@device_function
def _both(x, half, dx, row, step, width, lanes, corners):  # type: ignore[no-untyped-def]
    for i in range(width):
        best = load(x + 2 * i * step, lanes)
        total = best
        for k in range(1, corners):
            value = load(x + _corner(k, row, step) + 2 * i * step, lanes)
            best = _larger(best, value)
            total = total + value
        store(half + i * step, best + total * full(1.0 / corners, lanes))


_POOLS = {"max": _max, "avg": _mean, "add": _both, "max back": _max_back, "avg back": _mean_back}


@cache
def pool_kernel(kind: str, axes: int) -> Callable[..., Any]:
    """The kernel of pooling by 2: "max", "avg", or "add", the sum of both; of the gradient: "max back", "avg back"."""
    corners = 2**axes
    pool_row = _POOLS[kind]

    def extents(dx: int, z: int, first: int, last: int, height: int, width: int, channels: int) -> dict[str, Extent]:
        """The rows of plane z of the halved image and those of the image that they come from."""
        step, half = 4 * channels, width // 2 * 4 * channels
        top, plane = (2 * z, z * (height // 2)) if axes == 3 else (z, z * (height // 2))
        bottom = top + (1 if axes == 3 else 0)
        low = (top * height + 2 * first) * width * step
        high = (bottom * height + 2 * last - 1) * width * step + 2 * half
        whole = (low, high) if half and last > first else NOTHING
        return {"x": whole, "half": ((plane + first) * half, (plane + last) * half), "dx": whole if dx else NOTHING}

    @kernel(extents)
    def pool(x, half, dx, z, first, last, height, width, channels):  # type: ignore[no-untyped-def]
        """Plane z of `half`; height and width are those of x. Voxels outside all 2x2(x2) blocks are left alone."""
        step = 4 * channels
        rows = (step * width, step * width * height)
        z_in = 2 * z if corners == 8 else z
        whole = channels - channels % LANES
        for y in range(first, last):
            at = z_in * rows[1] + 2 * y * rows[0]
            to = half + (z * (height // 2) + y) * (width // 2) * step
            for c in range(0, whole, LANES):
                pool_row(x + at + 4 * c, to + 4 * c, dx + at + 4 * c, rows, step, width // 2, LANES, corners)
            for c in range(whole, channels):
                pool_row(x + at + 4 * c, to + 4 * c, dx + at + 4 * c, rows, step, width // 2, 1, corners)

    return pool


# Interpolation


@device_function
def _neighbour(o, size):  # type: ignore[no-untyped-def]
    """The input voxel that output voxel o takes 1/4 of."""
    return max(o // 2 - 1, 0) if o % 2 == 0 else min(o // 2 + 1, size - 1)


@device_function
def _share(o, i, size):  # type: ignore[no-untyped-def]
    """How much of input voxel i output voxel o takes, o in 2i-1 .. 2i+2; 0 outside the output."""
    if o < 0 or o >= 2 * size:
        return np.float32(0.0)
    total = np.float32(0.0)
    if o // 2 == i:
        total += np.float32(0.75)
    if _neighbour(o, size) == i:
        total += np.float32(0.25)
    return total


@device_function
def _mix(base, rows, shares, count, at, lanes):  # type: ignore[no-untyped-def]
    total = full(0.0, lanes)
    for r in range(count):
        total = fma(full(shares[r], lanes), load(base + rows[r] + at, lanes), total)
    return total


@device_function
def _double_row(x, rows, shares, count, out, step, width, lanes):  # type: ignore[no-untyped-def]
    near, far = full(0.75, lanes), full(0.25, lanes)
    here = _mix(x, rows, shares, count, 0, lanes)
    before = here
    for i in range(width):
        after = _mix(x, rows, shares, count, (i + 1) * step, lanes) if i + 1 < width else here
        store(out + 2 * i * step, fma(near, here, far * before))
        store(out + (2 * i + 1) * step, fma(near, here, far * after))
        before, here = here, after


@device_function
def _double_row_back(grad, rows, shares, count, dx, step, width, lanes):  # type: ignore[no-untyped-def]
    near, far = full(0.75, lanes), full(0.25, lanes)
    before = full(0.0, lanes)
    even = _mix(grad, rows, shares, count, 0, lanes)
    for i in range(width):
        odd = _mix(grad, rows, shares, count, (2 * i + 1) * step, lanes)
        total = fma(near, even + odd, far * before)
        if i == 0:
            total = fma(far, even, total)
        if i + 1 < width:
            even = _mix(grad, rows, shares, count, (2 * i + 2) * step, lanes)
            total = fma(far, even, total)
        else:
            total = fma(far, odd, total)
        store(dx + i * step, total)
        before = odd


def _around(first: int, last: int, size: int) -> tuple[int, int]:
    """The input rows, first and last + 1, that output rows first..last-1 of a doubled axis take from."""
    return max((first + 1) // 2 - 1, 0), min(last // 2, size - 1) + 1


def _forward_extents(
    axes: int, z: int, first: int, last: int, depth: int, height: int, width: int, channels: int
) -> dict[str, Extent]:
    row = 4 * channels * width
    top, bottom = _around(z, z + 1, depth) if axes == 3 else (z, z + 1)
    low, high = _around(first, last, height)
    return {
        "x": ((top * height + low) * row, ((bottom - 1) * height + high) * row),
        "out": ((z * 2 * height + first) * 2 * row, (z * 2 * height + last) * 2 * row),
    }


def _backward_extents(
    axes: int, z: int, first: int, last: int, depth: int, height: int, width: int, channels: int
) -> dict[str, Extent]:
    row = 4 * channels * width
    top, bottom = (max(2 * z - 1, 0), min(2 * z + 3, 2 * depth)) if axes == 3 else (z, z + 1)
    low, high = max(2 * first - 1, 0), min(2 * last + 1, 2 * height)
    return {
        "grad": ((top * 2 * height + low) * 2 * row, ((bottom - 1) * 2 * height + high) * 2 * row),
        "dx": ((z * height + first) * row, (z * height + last) * row),
    }


@kernel(_forward_extents)
def double_forward(x, out, axes, z, first, last, depth, height, width, channels):  # type: ignore[no-untyped-def]
    """Interpolate plane z of the output; depth, height and width are the input's."""
    step = 4 * channels
    row = step * width
    rows, shares = np.empty(4, np.int64), np.empty(4, np.float32)
    whole = channels - channels % LANES
    for y in range(first, last):
        count = 0
        for j in range(2 if axes == 3 else 1):
            z_in = z if axes == 2 else (z // 2 if j == 0 else _neighbour(z, depth))
            part = np.float32(1.0) if axes == 2 else np.float32(0.75 - 0.5 * j)
            for k in range(2):
                y_in = y // 2 if k == 0 else _neighbour(y, height)
                rows[count] = (z_in * height + y_in) * row
                shares[count] = part * np.float32(0.75 - 0.5 * k)
                count += 1
        to = out + (z * 2 * height + y) * 2 * row
        for c in range(0, whole, LANES):
            _double_row(x + 4 * c, rows, shares, count, to + 4 * c, step, width, LANES)
        for c in range(whole, channels):
            _double_row(x + 4 * c, rows, shares, count, to + 4 * c, step, width, 1)


@kernel(_backward_extents)
def double_backward(grad, dx, axes, z, first, last, depth, height, width, channels):  # type: ignore[no-untyped-def]
    """The gradient of plane z of the input, whose sizes are depth, height and width."""
    step = 4 * channels
    row = step * width
    rows, shares = np.empty(16, np.int64), np.empty(16, np.float32)
    whole = channels - channels % LANES
    for y in range(first, last):
        count = 0
        for j in range(4 if axes == 3 else 1):
            z_out = z if axes == 2 else 2 * z - 1 + j
            part = np.float32(1.0) if axes == 2 else _share(z_out, z, depth)
            for k in range(4):
                y_out = 2 * y - 1 + k
                share = part * _share(y_out, y, height)
                if share != 0:
                    rows[count] = (z_out * 2 * height + y_out) * 2 * row
                    shares[count] = share
                    count += 1
        to = dx + (z * height + y) * row
        for c in range(0, whole, LANES):
            _double_row_back(grad + 4 * c, rows, shares, count, to + 4 * c, step, width, LANES)
        for c in range(whole, channels):
            _double_row_back(grad + 4 * c, rows, shares, count, to + 4 * c, step, width, 1)


# On all threads


def pool_forward(x: Tensor, kind: str) -> Tensor:
    """Pool x by 2, in its dtype."""
    rows, out = x.float().contiguous(), torch.empty(halved(x))
    run, (height, width, channels) = pool_kernel(kind, x.dim() - 2), x.shape[-3:]

    def work(chunk: int, entry: int, z: int, first: int, last: int) -> None:
        run(entry_address(rows, entry), entry_address(out, entry), 0, z, first, last, height, width, channels)

    if out.numel():
        for_rows(out, work)
    return out.to(x.dtype)


def pool_into(kind: str, x: Tensor, out: Tensor) -> None:
    """Pool one contiguous float32 image (*S, C) of even sizes by "max", "avg" or "add", their sum, into `out`."""
    axes = x.dim() - 1
    run, (height, width, channels) = pool_kernel(kind, axes), x.shape[-3:]

    def work(z: int, first: int, last: int, worker: int) -> None:
        run(address(x), address(out), 0, z, first, last, height, width, channels)

    for_blocks(out.shape[0] if axes == 3 else 1, out.shape[-3], 8, work)


def pool_backward(grad_y: Tensor, x: Tensor, kind: str) -> Tensor:
    """Gradient of x."""
    rows, grad = x.float().contiguous(), grad_y.float().contiguous()
    covered = all(size % 2 == 0 for size in x.shape[1:-1])
    dx = torch.empty(x.shape) if covered else torch.zeros(x.shape)
    run, (height, width, channels) = pool_kernel(f"{kind} back", x.dim() - 2), x.shape[-3:]

    def work(chunk: int, entry: int, z: int, first: int, last: int) -> None:
        of, by, to = entry_address(rows, entry), entry_address(grad, entry), entry_address(dx, entry)
        run(of, by, to, z, first, last, height, width, channels)

    if grad.numel():
        for_rows(grad, work)
    return dx.to(x.dtype)


def upsample_forward(x: Tensor) -> Tensor:
    """Double x by linear interpolation, in its dtype."""
    rows, out = x.float().contiguous(), torch.empty(doubled(x))
    sizes, axes, channels = plane_sizes(x), x.dim() - 2, x.shape[-1]

    def work(chunk: int, entry: int, z: int, first: int, last: int) -> None:
        double_forward(entry_address(rows, entry), entry_address(out, entry), axes, z, first, last, *sizes, channels)

    if out.numel():
        for_rows(out, work)
    return out.to(x.dtype)


def upsample_backward(grad_y: Tensor) -> Tensor:
    """Gradient of the tensor before doubling."""
    grad, dx = grad_y.float().contiguous(), torch.empty(halved(grad_y))
    sizes, axes, channels = plane_sizes(dx), dx.dim() - 2, dx.shape[-1]

    def work(chunk: int, entry: int, z: int, first: int, last: int) -> None:
        double_backward(entry_address(grad, entry), entry_address(dx, entry), axes, z, first, last, *sizes, channels)

    if dx.numel():
        for_rows(dx, work)
    return dx.to(grad_y.dtype)
