"""Kernels of the fused norms: a block of tokens or voxels, all channels.

Addresses point to float32 data; `*_step` is in bytes from one token to the next. Sums over many tokens or voxels
leave a kernel as one row of float32 for every SEGMENT of them and are added up in float64, in order.
"""

from __future__ import annotations

import math
from typing import Any

from numba.extending import intrinsic

from lightm.ops.bounds import NOTHING, Extent, each, row_extents
from lightm.ops.jit import LANES, device_function, kernel
from lightm.ops.vector import clear, fma, full, get, keep, load, maximum, number, put, splat, spread, store
from lightm.ops.vector_math import lane_moments, moments, sigmoid

SEGMENT = 256  # tokens or voxels that are summed in float32


def _segment_rows(first: int, last: int, row: int) -> Extent:
    """The extent of the rows that have the sums of tokens first..last-1."""
    return (first // SEGMENT * row, -(-last // SEGMENT) * row) if last > first else NOTHING


@intrinsic
def _passed(typing: Any, output: Any, gradient: Any) -> Any:
    """ReLU's gradient: 0 where its argument is <= 0, `gradient` elsewhere and where the argument is NaN."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        zero = splat(0.0, args[0].type)
        return builder.select(builder.fcmp_ordered("<=", args[0], zero), zero, args[1])

    return output(output, gradient), generate


# The gated LayerNorm: parts of 8 or 16 channels fill vectors, any other width is taken a part at a time -----------


@device_function
def _forward_lanes(  # type: ignore[no-untyped-def]
    y, y_step, z, z_step, out, weight, bias, channels, eps, first, last, width
):
    for t in range(first, last):
        for c in range(0, channels, LANES):
            far, inverse = lane_moments(load(y + t * y_step + 4 * c, LANES), eps, width)
            gate = load(z + t * z_step + 4 * c, LANES)
            value = fma(far * inverse, load(weight + 4 * c, LANES), load(bias + 4 * c, LANES))
            store(out + 4 * (t * channels + c), value * (gate * sigmoid(gate, LANES)))


@device_function
def _forward_parts(  # type: ignore[no-untyped-def]
    y, y_step, z, z_step, out, weight, bias, channels, width, eps, first, last
):
    for t in range(first, last):
        for part in range(0, channels, width):
            mean, inverse = moments(y + t * y_step + 4 * part, width, eps)
            for k in range(0, width, LANES):
                c, left = part + k, width - k
                gate = get(z + t * z_step + 4 * c, left)
                normed = (get(y + t * y_step + 4 * c, left) - mean) * inverse
                value = fma(normed, get(weight + 4 * c, left), get(bias + 4 * c, left))
                put(out + 4 * (t * channels + c), value * (gate * sigmoid(gate, LANES)), left)


@kernel(
    lambda y_step, z_step, channels, first, last: {
        **row_extents(first, last, 4 * channels, y=y_step, z=z_step, out=4 * channels),
        **each((0, 4 * channels), "weight", "bias"),
    }
)
def gated_forward(  # type: ignore[no-untyped-def]
    y, y_step, z, z_step, out, weight, bias, channels, width, eps, first, last
):
    """Write out (contiguous) for tokens first..last-1; the parts are of `width` channels."""
    if width == LANES and channels % LANES == 0:
        _forward_lanes(y, y_step, z, z_step, out, weight, bias, channels, eps, first, last, LANES)
    elif width == 8 and channels % LANES == 0:
        _forward_lanes(y, y_step, z, z_step, out, weight, bias, channels, eps, first, last, 8)
    else:
        _forward_parts(y, y_step, z, z_step, out, weight, bias, channels, width, eps, first, last)


@device_function
def _ungate(grad, gate, normed, weight, bias):  # type: ignore[no-untyped-def]
    """(gradient before the gate, gradient of the gate)."""
    s = sigmoid(gate, LANES)
    one = full(1.0, LANES)
    return grad * (gate * s), grad * fma(normed, weight, bias) * (s * fma(gate, one - s, one))


@device_function
def _backward_lanes(  # type: ignore[no-untyped-def]
    y, y_step, z, z_step, grad, grad_step, dy, dz, weight, bias, channels, eps, first, last, sums, width
):
    scale = full(1.0 / width, LANES)
    for t in range(first, last):
        for c in range(0, channels, LANES):
            far, inverse = lane_moments(load(y + t * y_step + 4 * c, LANES), eps, width)
            normed = far * inverse
            factor = load(weight + 4 * c, LANES)
            gate, given = load(z + t * z_step + 4 * c, LANES), load(grad + t * grad_step + 4 * c, LANES)
            change, gate_change = _ungate(given, gate, normed, factor, load(bias + 4 * c, LANES))
            store(dz + 4 * (t * channels + c), gate_change)
            at = sums + 4 * c
            store(at, fma(change, normed, load(at, LANES)))
            store(at + 4 * channels, load(at + 4 * channels, LANES) + change)
            change = change * factor
            common, along = spread(change, width) * scale, spread(change * normed, width) * scale
            store(dy + 4 * (t * channels + c), (change - common - normed * along) * inverse)


@device_function
def _backward_parts(  # type: ignore[no-untyped-def]
    y, y_step, z, z_step, grad, grad_step, dy, dz, weight, bias, channels, width, eps, first, last, sums
):
    scale = full(1.0 / width, LANES)
    for t in range(first, last):
        for part in range(0, channels, width):
            mean, inverse = moments(y + t * y_step + 4 * part, width, eps)
            common, along = full(0.0, LANES), full(0.0, LANES)
            for k in range(0, width, LANES):
                c, left = part + k, width - k
                normed = (get(y + t * y_step + 4 * c, left) - mean) * inverse
                factor = get(weight + 4 * c, left)
                gate, given = get(z + t * z_step + 4 * c, left), get(grad + t * grad_step + 4 * c, left)
                change, gate_change = _ungate(given, gate, normed, factor, get(bias + 4 * c, left))
                put(dz + 4 * (t * channels + c), gate_change, left)
                at = sums + 4 * c
                put(at, fma(change, normed, get(at, left)), left)
                put(at + 4 * channels, get(at + 4 * channels, left) + change, left)
                change = keep(change * factor, left)
                common, along = common + change, along + keep(change * normed, left)
                put(dy + 4 * (t * channels + c), change, left)
            common, along = spread(common, LANES) * scale, spread(along, LANES) * scale
            for k in range(0, width, LANES):
                c, left = part + k, width - k
                at = dy + 4 * (t * channels + c)
                normed = (get(y + t * y_step + 4 * c, left) - mean) * inverse
                put(at, (get(at, left) - common - normed * along) * inverse, left)


@kernel(
    lambda y_step, z_step, grad_step, channels, first, last: {
        **row_extents(first, last, 4 * channels, y=y_step, z=z_step, grad=grad_step, dy=4 * channels, dz=4 * channels),
        **each((0, 4 * channels), "weight", "bias"),
        "sums": _segment_rows(first, last, 8 * channels),
    }
)
def gated_backward(  # type: ignore[no-untyped-def]
    y, y_step, z, z_step, grad, grad_step, dy, dz, weight, bias, channels, width, eps, first, last, sums
):
    """Write dy, dz (contiguous) for tokens first..last-1 and the sums of these tokens.

    `first` is a multiple of SEGMENT; `sums` has a row of (dweight, dbias) for every SEGMENT tokens from 0 on.
    """
    for start in range(first, last, SEGMENT):
        stop = min(start + SEGMENT, last)
        row = sums + start // SEGMENT * (8 * channels)
        clear(row, 2 * channels)
        if width == LANES and channels % LANES == 0:
            _backward_lanes(
                y, y_step, z, z_step, grad, grad_step, dy, dz, weight, bias, channels, eps, start, stop, row, LANES
            )
        elif width == 8 and channels % LANES == 0:
            _backward_lanes(
                y, y_step, z, z_step, grad, grad_step, dy, dz, weight, bias, channels, eps, start, stop, row, 8
            )
        else:
            _backward_parts(
                y, y_step, z, z_step, grad, grad_step, dy, dz, weight, bias, channels, width, eps, start, stop, row
            )


@kernel(lambda count, width: {"rows": (0, 4 * count * width), "out": (0, 4 * width)})
def sum_rows(rows, count, width, out):  # type: ignore[no-untyped-def]
    """Write the sum of `count` rows of `width` numbers, added in order in float64."""
    for c in range(width):
        total = 0.0
        for row in range(count):
            total += number(rows + 4 * (row * width + c))
        store(out + 4 * c, full(total, 1))


# GroupNorm and ReLU of one image (voxels, C) -----------------------------------------------------------------------


def _voxels(first: int, last: int, channels: int, *names: str) -> dict[str, Extent]:
    """The extent of voxels first..last-1 of several images."""
    return each((4 * channels * first, 4 * channels * last), *names)


@kernel(
    lambda channels, first, last: {
        **_voxels(first, last, channels, "x"),
        "moments": _segment_rows(first, last, 8 * channels),
    }
)
def group_moments(x, channels, first, last, moments):  # type: ignore[no-untyped-def]
    """Mean of, and sum of squares around it, of every channel and SEGMENT voxels from `first`, a multiple, to last-1.

    `moments` has a row of (means, sums) for every SEGMENT voxels from 0 on.
    """
    step = 4 * channels
    for start in range(first, last, SEGMENT):
        stop = min(start + SEGMENT, last)
        row = moments + start // SEGMENT * (2 * step)
        scale = full(1.0 / (stop - start), LANES)
        for c in range(0, channels, LANES):
            left = channels - c
            total = full(0.0, LANES)
            for i in range(start, stop):
                total = total + get(x + i * step + 4 * c, left)
            mean = total * scale
            put(row + 4 * c, mean, left)
            total = full(0.0, LANES)
            for i in range(start, stop):
                far = get(x + i * step + 4 * c, left) - mean
                total = fma(far, far, total)
            put(row + step + 4 * c, total, left)


@kernel(
    lambda voxels, channels, groups: {
        "moments": _segment_rows(0, voxels, 8 * channels),
        **each((0, 4 * groups), "mean", "inverse"),
    }
)
def join_moments(moments, voxels, channels, groups, eps, mean, inverse):  # type: ignore[no-untyped-def]
    """Write mean and 1 / deviation of every group from the rows of `group_moments`, added in order in float64."""
    width = channels // groups
    step = 4 * channels
    segments = (voxels + SEGMENT - 1) // SEGMENT
    for group in range(groups):
        total = 0.0
        for s in range(segments):
            part = 0.0
            for c in range(group * width, (group + 1) * width):
                part += number(moments + 2 * s * step + 4 * c)
            total += part * min(SEGMENT, voxels - s * SEGMENT)
        middle = total / (voxels * width)
        total = 0.0
        for s in range(segments):
            size = min(SEGMENT, voxels - s * SEGMENT)
            for c in range(group * width, (group + 1) * width):
                far = number(moments + 2 * s * step + 4 * c) - middle
                total += number(moments + (2 * s + 1) * step + 4 * c) + size * far * far
        store(mean + 4 * group, full(middle, 1))
        store(inverse + 4 * group, full(1.0 / math.sqrt(total / (voxels * width) + eps), 1))


@kernel(
    lambda channels, first, last: {
        **_voxels(first, last, channels, "x", "out"),
        **each((0, 4 * channels), "mean", "scale", "shift"),
    }
)
def group_forward(x, out, mean, scale, shift, channels, first, last):  # type: ignore[no-untyped-def]
    """Write relu((x - mean) * scale + shift) for voxels first..last-1; mean, scale and shift are of channels."""
    step = 4 * channels
    for start in range(first, last, SEGMENT):
        for c in range(0, channels, LANES):
            left = channels - c
            middle, factor, offset = get(mean + 4 * c, left), get(scale + 4 * c, left), get(shift + 4 * c, left)
            for i in range(start, min(start + SEGMENT, last)):
                at = i * step + 4 * c
                value = fma(get(x + at, left) - middle, factor, offset)
                put(out + at, maximum(value, full(0.0, LANES)), left)


@kernel(
    lambda channels, first, last: {
        **_voxels(first, last, channels, "x", "grad"),
        **each((0, 4 * channels), "mean", "inverse", "scale", "shift"),
        "sums": _segment_rows(first, last, 8 * channels),
    }
)
def group_sums(x, grad, mean, inverse, scale, shift, channels, first, last, sums):  # type: ignore[no-untyped-def]
    """Shares of dweight and dbias of every SEGMENT voxels from `first`, a multiple, to last-1.

    `sums` has a row of (dweight, dbias) for every SEGMENT voxels from 0 on.
    """
    step = 4 * channels
    for start in range(first, last, SEGMENT):
        row = sums + start // SEGMENT * (2 * step)
        for c in range(0, channels, LANES):
            left = channels - c
            middle, factor, offset = get(mean + 4 * c, left), get(scale + 4 * c, left), get(shift + 4 * c, left)
            along, common = full(0.0, LANES), full(0.0, LANES)
            for i in range(start, min(start + SEGMENT, last)):
                at = i * step + 4 * c
                far = get(x + at, left) - middle
                given = _passed(fma(far, factor, offset), get(grad + at, left))
                along, common = fma(given, far, along), common + given
            put(row + 4 * c, along * get(inverse + 4 * c, left), left)
            put(row + step + 4 * c, common, left)


def _group_backward_extents(channels: int, first: int, last: int) -> dict[str, Extent]:
    vectors = each((0, 4 * channels), "mean", "scale", "shift", "along", "common")
    return {**_voxels(first, last, channels, "x", "grad", "dx"), **vectors}


@kernel(_group_backward_extents)
def group_backward(  # type: ignore[no-untyped-def]
    x, grad, dx, mean, scale, shift, along, common, channels, first, last
):
    """Write dx = scale * gradient through the ReLU + along * (x - mean) + common for voxels first..last-1."""
    step = 4 * channels
    for start in range(first, last, SEGMENT):
        for c in range(0, channels, LANES):
            left = channels - c
            middle, factor, offset = get(mean + 4 * c, left), get(scale + 4 * c, left), get(shift + 4 * c, left)
            slope, constant = get(along + 4 * c, left), get(common + 4 * c, left)
            for i in range(start, min(start + SEGMENT, last)):
                at = i * step + 4 * c
                far = get(x + at, left) - middle
                given = _passed(fma(far, factor, offset), get(grad + at, left))
                put(dx + at, fma(given, factor, fma(far, slope, constant)), left)
