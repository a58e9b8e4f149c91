"""Pieces of kernels for rows of any width: vectors of which only some lanes are in use, sums across lanes."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lightm.ops.jit import LANES, device_function
from lightm.ops.vector import FLOAT, INT, V8, V16, call, emit_shuffle, fma, full, load, splat, store

_TILE = V16 if LANES == 16 else V8


@intrinsic(prefer_literal=True)
def spread(typing: Any, vector: Any, width: Any) -> Any:
    """spread(vector, width): in every lane the sum of its `width` neighbours, a power of two; width is a constant."""
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
def root(typing: Any, vector: Any) -> Any:
    """The square root lane by lane."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return call(builder, f"llvm.sqrt.v{vector.lanes}f32", args[0].type, args[0])

    return vector(vector), generate


@intrinsic
def number(typing: Any, address: Any) -> Any:
    """The float32 at an address as a float64."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = builder.load(builder.inttoptr(args[0], FLOAT.as_pointer()), align=4)
        return builder.fpext(value, ir.DoubleType())

    return types.float64(types.int64), generate


def _lanes_below(builder: Any, count: Any) -> Any:
    """Which lanes have a number below `count` (64 bits)."""
    kind = ir.VectorType(INT, LANES)
    low = builder.trunc(count, INT)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), low, INT(0))
    counts = builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(kind, [0] * LANES))
    return builder.icmp_signed("<", ir.Constant(kind, list(range(LANES))), counts)


@intrinsic
def keep(typing: Any, vector: Any, count: Any) -> Any:
    """The first `count` lanes, at least 1; 0 in the others."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(_lanes_below(builder, args[1]), args[0], splat(0.0, args[0].type))

    return vector(vector, types.int64), generate


@intrinsic
def load_some(typing: Any, address: Any, count: Any) -> Any:
    """The vector whose first `count` lanes are at an address; 0 in the others, whose memory is not touched."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.VectorType(FLOAT, LANES)
        at = builder.inttoptr(args[0], kind.as_pointer())
        mask = _lanes_below(builder, args[1])
        name = f"llvm.masked.load.v{LANES}f32.p0v{LANES}f32"
        return call(builder, name, kind, at, INT(4), mask, splat(0.0, kind))

    return _TILE(types.int64, types.int64), generate


@intrinsic
def store_some(typing: Any, address: Any, vector: Any, count: Any) -> Any:
    """Write the first `count` lanes at an address."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = builder.inttoptr(args[0], args[1].type.as_pointer())
        name = f"llvm.masked.store.v{LANES}f32.p0v{LANES}f32"
        call(builder, name, ir.VoidType(), args[1], at, INT(4), _lanes_below(builder, args[2]))
        return context.get_dummy_value()

    return types.void(types.int64, vector, types.int64), generate


@device_function
def get(address, count):  # type: ignore[no-untyped-def]
    """A vector, or its first `count` lanes when they are fewer than LANES."""
    return load(address, LANES) if count >= LANES else load_some(address, count)


@device_function
def put(address, vector, count):  # type: ignore[no-untyped-def]
    """Write a vector, or its first `count` lanes when they are fewer than LANES."""
    if count >= LANES:
        store(address, vector)
    else:
        store_some(address, vector, count)


@device_function
def clear(address, count):  # type: ignore[no-untyped-def]
    for c in range(count):
        store(address + 4 * c, full(0.0, 1))


@device_function
def moments(y, width, eps):  # type: ignore[no-untyped-def]
    """(mean, 1 / deviation) of `width` channels at y, in every lane."""
    scale = full(1.0 / width, LANES)
    total = full(0.0, LANES)
    for c in range(0, width, LANES):
        total = total + get(y + 4 * c, width - c)
    mean = spread(total, LANES) * scale
    total = full(0.0, LANES)
    for c in range(0, width, LANES):
        far = keep(get(y + 4 * c, width - c) - mean, width - c)
        total = fma(far, far, total)
    return mean, full(1.0, LANES) / root(fma(spread(total, LANES), scale, full(eps, LANES)))


@device_function
def lane_moments(values, eps, width):  # type: ignore[no-untyped-def]
    """(values - mean, 1 / deviation) of every `width` neighbouring lanes."""
    scale = full(1.0 / width, LANES)
    far = values - spread(values, width) * scale
    return far, full(1.0, LANES) / root(fma(spread(far * far, width), scale, full(eps, LANES)))
