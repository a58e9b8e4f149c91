"""Kernels of the fused norms: a block of tokens or voxels, all channels.

Addresses point to float32 data; `*_step` is in bytes from one token to the next. Sums over many tokens or voxels
leave a kernel as one row of float32 for every STRETCH of them and are added up in float64, in order.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lightm.ops.jit import LANES, device_function, kernel
from lightm.ops.vector import FLOAT, INT, V8, V16, call, emit_shuffle, fma, full, load, maximum, splat, store
from lightm.ops.vector_math import sigmoid

STRETCH = 256  # tokens or voxels that are summed in float32

_TILE = V16 if LANES == 16 else V8


@intrinsic(prefer_literal=True)
def _spread(typing: Any, vector: Any, width: Any) -> Any:
    """_spread(vector, width): in every lane the sum of its `width` neighbours, a power of two; width is a constant."""
    if not isinstance(width, types.IntegerLiteral):
        return None
    step = width.literal_value // 2

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value, half = args[0], step
        while half:
            value = builder.fadd(value, emit_shuffle(builder, value, value, [i ^ half for i in range(vector.lanes)]))
            half //= 2
        return value

    return vector(vector, width), generate


@intrinsic
def _root(typing: Any, vector: Any) -> Any:
    """The square root lane by lane."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return call(builder, f"llvm.sqrt.v{vector.lanes}f32", args[0].type, args[0])

    return vector(vector), generate


@intrinsic
def _number(typing: Any, address: Any) -> Any:
    """The float32 at an address as a float64."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = builder.load(builder.inttoptr(args[0], FLOAT.as_pointer()), align=4)
        return builder.fpext(value, ir.DoubleType())

    return types.float64(types.int64), generate


@intrinsic
def _passed(typing: Any, output: Any, gradient: Any) -> Any:
    """ReLU's gradient: 0 where its argument is <= 0, `gradient` elsewhere and where the argument is NaN."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        zero = splat(0.0, args[0].type)
        return builder.select(builder.fcmp_ordered("<=", args[0], zero), zero, args[1])

    return output(output, gradient), generate


def _lanes_below(builder: Any, count: Any) -> Any:
    """Which lanes have a number below `count` (64 bits)."""
    kind = ir.VectorType(INT, LANES)
    low = builder.trunc(count, INT)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), low, INT(0))
    counts = builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(kind, [0] * LANES))
    return builder.icmp_signed("<", ir.Constant(kind, list(range(LANES))), counts)


@intrinsic
def _keep(typing: Any, vector: Any, count: Any) -> Any:
    """The first `count` lanes, at least 1; 0 in the others."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(_lanes_below(builder, args[1]), args[0], splat(0.0, args[0].type))

    return vector(vector, types.int64), generate


@intrinsic
def _load_some(typing: Any, address: Any, count: Any) -> Any:
    """The vector whose first `count` lanes are at an address; 0 in the others, whose memory is not touched."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.VectorType(FLOAT, LANES)
        at = builder.inttoptr(args[0], kind.as_pointer())
        mask = _lanes_below(builder, args[1])
        name = f"llvm.masked.load.v{LANES}f32.p0v{LANES}f32"
        return call(builder, name, kind, at, INT(4), mask, splat(0.0, kind))

    return _TILE(types.int64, types.int64), generate


@intrinsic
def _store_some(typing: Any, address: Any, vector: Any, count: Any) -> Any:
    """Write the first `count` lanes at an address."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = builder.inttoptr(args[0], args[1].type.as_pointer())
        name = f"llvm.masked.store.v{LANES}f32.p0v{LANES}f32"
        call(builder, name, ir.VoidType(), args[1], at, INT(4), _lanes_below(builder, args[2]))
        return context.get_dummy_value()

    return types.void(types.int64, vector, types.int64), generate


@device_function
def _get(address, count):  # type: ignore[no-untyped-def]
    """A vector, or its first `count` lanes when they are fewer than LANES."""
    return load(address, LANES) if count >= LANES else _load_some(address, count)


@device_function
def _put(address, vector, count):  # type: ignore[no-untyped-def]
    """Write a vector, or its first `count` lanes when they are fewer than LANES."""
    if count >= LANES:
        store(address, vector)
    else:
        _store_some(address, vector, count)


@device_function
def _clear(address, count):  # type: ignore[no-untyped-def]
    for c in range(count):
        store(address + 4 * c, full(0.0, 1))


# The gated LayerNorm: parts of 8 or 16 channels fill vectors, any other width is taken a part at a time -----------


@device_function
def _moments(y, width, eps):  # type: ignore[no-untyped-def]
    """(mean, 1 / deviation) of `width` channels at y, in every lane."""
    scale = full(1.0 / width, LANES)
    total = full(0.0, LANES)
    for c in range(0, width, LANES):
        total = total + _get(y + 4 * c, width - c)
    mean = _spread(total, LANES) * scale
    total = full(0.0, LANES)
    for c in range(0, width, LANES):
        far = _keep(_get(y + 4 * c, width - c) - mean, width - c)
        total = fma(far, far, total)
    return mean, full(1.0, LANES) / _root(fma(_spread(total, LANES), scale, full(eps, LANES)))


@device_function
def _lane_moments(values, eps, width):  # type: ignore[no-untyped-def]
    """(values - mean, 1 / deviation) of every `width` neighbouring lanes."""
    scale = full(1.0 / width, LANES)
    far = values - _spread(values, width) * scale
    return far, full(1.0, LANES) / _root(fma(_spread(far * far, width), scale, full(eps, LANES)))


@device_function
def _forward_lanes(  # type: ignore[no-untyped-def]
    y, y_step, z, z_step, out, weight, bias, channels, eps, first, last, width
):
    for t in range(first, last):
        for c in range(0, channels, LANES):
            far, inverse = _lane_moments(load(y + t * y_step + 4 * c, LANES), eps, width)
            gate = load(z + t * z_step + 4 * c, LANES)
            value = fma(far * inverse, load(weight + 4 * c, LANES), load(bias + 4 * c, LANES))
            store(out + 4 * (t * channels + c), value * (gate * sigmoid(gate, LANES)))


@device_function
def _forward_parts(  # type: ignore[no-untyped-def]
    y, y_step, z, z_step, out, weight, bias, channels, width, eps, first, last
):
    for t in range(first, last):
        for part in range(0, channels, width):
            mean, inverse = _moments(y + t * y_step + 4 * part, width, eps)
            for k in range(0, width, LANES):
                c, left = part + k, width - k
                gate = _get(z + t * z_step + 4 * c, left)
                normed = (_get(y + t * y_step + 4 * c, left) - mean) * inverse
                value = fma(normed, _get(weight + 4 * c, left), _get(bias + 4 * c, left))
                _put(out + 4 * (t * channels + c), value * (gate * sigmoid(gate, LANES)), left)


@kernel
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
            far, inverse = _lane_moments(load(y + t * y_step + 4 * c, LANES), eps, width)
            normed = far * inverse
            factor = load(weight + 4 * c, LANES)
            gate, given = load(z + t * z_step + 4 * c, LANES), load(grad + t * grad_step + 4 * c, LANES)
            change, gate_change = _ungate(given, gate, normed, factor, load(bias + 4 * c, LANES))
            store(dz + 4 * (t * channels + c), gate_change)
            at = sums + 4 * c
            store(at, fma(change, normed, load(at, LANES)))
            store(at + 4 * channels, load(at + 4 * channels, LANES) + change)
            change = change * factor
            common, along = _spread(change, width) * scale, _spread(change * normed, width) * scale
            store(dy + 4 * (t * channels + c), (change - common - normed * along) * inverse)


@device_function
def _backward_parts(  # type: ignore[no-untyped-def]
    y, y_step, z, z_step, grad, grad_step, dy, dz, weight, bias, channels, width, eps, first, last, sums
):
    scale = full(1.0 / width, LANES)
    for t in range(first, last):
        for part in range(0, channels, width):
            mean, inverse = _moments(y + t * y_step + 4 * part, width, eps)
            common, along = full(0.0, LANES), full(0.0, LANES)
            for k in range(0, width, LANES):
                c, left = part + k, width - k
                normed = (_get(y + t * y_step + 4 * c, left) - mean) * inverse
                factor = _get(weight + 4 * c, left)
                gate, given = _get(z + t * z_step + 4 * c, left), _get(grad + t * grad_step + 4 * c, left)
                change, gate_change = _ungate(given, gate, normed, factor, _get(bias + 4 * c, left))
                _put(dz + 4 * (t * channels + c), gate_change, left)
                at = sums + 4 * c
                _put(at, fma(change, normed, _get(at, left)), left)
                _put(at + 4 * channels, _get(at + 4 * channels, left) + change, left)
                change = _keep(change * factor, left)
                common, along = common + change, along + _keep(change * normed, left)
                _put(dy + 4 * (t * channels + c), change, left)
            common, along = _spread(common, LANES) * scale, _spread(along, LANES) * scale
            for k in range(0, width, LANES):
                c, left = part + k, width - k
                at = dy + 4 * (t * channels + c)
                normed = (_get(y + t * y_step + 4 * c, left) - mean) * inverse
                _put(at, (_get(at, left) - common - normed * along) * inverse, left)


@kernel
def gated_backward(  # type: ignore[no-untyped-def]
    y, y_step, z, z_step, grad, grad_step, dy, dz, weight, bias, channels, width, eps, first, last, sums
):
    """Write dy, dz (contiguous) for tokens first..last-1 and the sums of these tokens.

    `first` is a multiple of STRETCH; `sums` has a row of (dweight, dbias) for every STRETCH tokens from 0 on.
    """
    for start in range(first, last, STRETCH):
        stop = min(start + STRETCH, last)
        row = sums + start // STRETCH * (8 * channels)
        _clear(row, 2 * channels)
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


@kernel
def sum_rows(rows, count, width, out):  # type: ignore[no-untyped-def]
    """Write the sum of `count` rows of `width` numbers, added in order in float64."""
    for c in range(width):
        total = 0.0
        for row in range(count):
            total += _number(rows + 4 * (row * width + c))
        store(out + 4 * c, full(total, 1))


# GroupNorm and ReLU of one image (voxels, C) -----------------------------------------------------------------------


@kernel
def group_moments(x, channels, first, last, moments):  # type: ignore[no-untyped-def]
    """Mean of, and sum of squares around it, of every channel and STRETCH voxels from `first`, a multiple, to last-1.

    `moments` has a row of (means, sums) for every STRETCH voxels from 0 on.
    """
    step = 4 * channels
    for start in range(first, last, STRETCH):
        stop = min(start + STRETCH, last)
        row = moments + start // STRETCH * (2 * step)
        scale = full(1.0 / (stop - start), LANES)
        for c in range(0, channels, LANES):
            left = channels - c
            total = full(0.0, LANES)
            for i in range(start, stop):
                total = total + _get(x + i * step + 4 * c, left)
            mean = total * scale
            _put(row + 4 * c, mean, left)
            total = full(0.0, LANES)
            for i in range(start, stop):
                far = _get(x + i * step + 4 * c, left) - mean
                total = fma(far, far, total)
            _put(row + step + 4 * c, total, left)


@kernel
def join_moments(moments, voxels, channels, groups, eps, mean, inverse):  # type: ignore[no-untyped-def]
    """Write mean and 1 / deviation of every group from the rows of `group_moments`, added in order in float64."""
    width = channels // groups
    step = 4 * channels
    stretches = (voxels + STRETCH - 1) // STRETCH
    for group in range(groups):
        total = 0.0
        for s in range(stretches):
            part = 0.0
            for c in range(group * width, (group + 1) * width):
                part += _number(moments + 2 * s * step + 4 * c)
            total += part * min(STRETCH, voxels - s * STRETCH)
        middle = total / (voxels * width)
        total = 0.0
        for s in range(stretches):
            size = min(STRETCH, voxels - s * STRETCH)
            for c in range(group * width, (group + 1) * width):
                far = _number(moments + 2 * s * step + 4 * c) - middle
                total += _number(moments + (2 * s + 1) * step + 4 * c) + size * far * far
        store(mean + 4 * group, full(middle, 1))
        store(inverse + 4 * group, full(1.0 / math.sqrt(total / (voxels * width) + eps), 1))


@kernel
def group_forward(x, out, mean, scale, shift, channels, first, last):  # type: ignore[no-untyped-def]
    """Write relu((x - mean) * scale + shift) for voxels first..last-1; mean, scale and shift are of channels."""
    step = 4 * channels
    for start in range(first, last, STRETCH):
        for c in range(0, channels, LANES):
            left = channels - c
            middle, factor, offset = _get(mean + 4 * c, left), _get(scale + 4 * c, left), _get(shift + 4 * c, left)
            for i in range(start, min(start + STRETCH, last)):
                at = i * step + 4 * c
                value = fma(_get(x + at, left) - middle, factor, offset)
                _put(out + at, maximum(value, full(0.0, LANES)), left)


@kernel
def group_sums(x, grad, mean, inverse, scale, shift, channels, first, last, sums):  # type: ignore[no-untyped-def]
    """Shares of dweight and dbias of every STRETCH voxels from `first`, a multiple, to last-1.

    `sums` has a row of (dweight, dbias) for every STRETCH voxels from 0 on.
    """
    step = 4 * channels
    for start in range(first, last, STRETCH):
        row = sums + start // STRETCH * (2 * step)
        for c in range(0, channels, LANES):
            left = channels - c
            middle, factor, offset = _get(mean + 4 * c, left), _get(scale + 4 * c, left), _get(shift + 4 * c, left)
            along, common = full(0.0, LANES), full(0.0, LANES)
            for i in range(start, min(start + STRETCH, last)):
                at = i * step + 4 * c
                far = _get(x + at, left) - middle
                given = _passed(fma(far, factor, offset), _get(grad + at, left))
                along, common = fma(given, far, along), common + given
            _put(row + 4 * c, along * _get(inverse + 4 * c, left), left)
            _put(row + step + 4 * c, common, left)


@kernel
def group_backward(  # type: ignore[no-untyped-def]
    x, grad, dx, mean, scale, shift, along, common, channels, first, last
):
    """Write dx = scale * gradient through the ReLU + along * (x - mean) + common for voxels first..last-1."""
    step = 4 * channels
    for start in range(first, last, STRETCH):
        for c in range(0, channels, LANES):
            left = channels - c
            middle, factor, offset = _get(mean + 4 * c, left), _get(scale + 4 * c, left), _get(shift + 4 * c, left)
            slope, constant = _get(along + 4 * c, left), _get(common + 4 * c, left)
            for i in range(start, min(start + STRETCH, last)):
                at = i * step + 4 * c
                far = _get(x + at, left) - middle
                given = _passed(fma(far, factor, offset), _get(grad + at, left))
                _put(dx + at, fma(given, factor, fma(far, slope, constant)), left)
