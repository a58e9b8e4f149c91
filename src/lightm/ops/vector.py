"""Vectors of float32 as a Numba type, so that kernels are plain Python with SIMD values in registers.

A value of type `Vector(n)` is LLVM's `<n x float>`: `+ - * /` work lane by lane, tuples of vectors stay in
registers, and LLVM maps them to AVX-512, AVX2 or NEON. For rows of any width there are vectors of which only some lanes
are in use, and sums across lanes. Addresses are 64-bit integers and count bytes.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import errors
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from lightm.ops.jit import LANES, device_function

FLOAT = ir.FloatType()
INT = ir.IntType(32)


class Vector(types.Type):
    """Numba type of `<lanes x float>`."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(name=f"Vector{lanes}")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, ir.VectorType(FLOAT, kind.lanes))


BY_LANES = {lanes: Vector(lanes) for lanes in (1, 4, 8, 16)}


def _operator(symbol: Any, emit: str) -> None:
    """Let `symbol` work on two equal vectors."""

    class Template(ConcreteTemplate):
        cases = [signature(kind, kind, kind) for kind in BY_LANES.values()]  # noqa: RUF012

    infer_global(symbol)(Template)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return getattr(builder, emit)(*args, flags=("contract",))

    for kind in BY_LANES.values():
        lower_builtin(symbol, kind, kind)(lower)


_operator(operator.add, "fadd")
_operator(operator.sub, "fsub")
_operator(operator.mul, "fmul")
_operator(operator.truediv, "fdiv")


# What the intrinsics of this package emit ---------------------------------------------------------------------


def splat(value: float, like: ir.VectorType) -> ir.Constant:
    """The constant vector (value, value, ...)."""
    return ir.Constant(like, [value] * like.count)


def call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    """A call of an LLVM intrinsic, e.g. `llvm.fmuladd.v16f32`."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, args)


def emit_fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, fused where the processor can."""
    return call(builder, f"llvm.fmuladd.v{a.type.count}f32", a.type, a, b, c)


def emit_load(builder: Any, address: Any, lanes: int) -> Any:
    """The vector of `lanes` consecutive floats at an address."""
    return builder.load(builder.inttoptr(address, ir.VectorType(FLOAT, lanes).as_pointer()), align=4)


def emit_store(builder: Any, address: Any, value: Any) -> None:
    """Write the lanes of a vector one after the other."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=4)


def emit_broadcast(builder: Any, address: Any, lanes: int) -> Any:
    """The float at an address in every lane."""
    scalar = builder.load(builder.inttoptr(address, FLOAT.as_pointer()), align=4)
    return emit_splat(builder, scalar, lanes)


def emit_splat(builder: Any, scalar: Any, lanes: int) -> Any:
    """A number in every lane."""
    nothing = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    return emit_shuffle(builder, builder.insert_element(nothing, scalar, INT(0)), None, [0] * lanes)


def emit_select(builder: Any, symbol: str, x: Any, bound: Any) -> Any:
    """`bound` where x `symbol` bound, x elsewhere and where x is NaN."""
    return builder.select(builder.fcmp_ordered(symbol, x, bound), bound, x)


def emit_offset(builder: Any, address: Any, byte_count: int) -> Any:
    """address + byte_count."""
    return builder.add(address, ir.Constant(address.type, byte_count)) if byte_count else address


def emit_shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """Pick lanes out of a (numbers 0..) and b (numbers a.count.., where it is not None)."""
    other = ir.Constant(a.type, ir.Undefined) if b is None else b
    return builder.shuffle_vector(a, other, ir.Constant(ir.VectorType(INT, len(lanes)), lanes))


# Intrinsics ---------------------------------------------------------------------------------------------------


def literal(kind: Any) -> int:
    """The value of a constant argument; Numba tries other ways to compile a call where it is none."""
    if not isinstance(kind, types.IntegerLiteral):
        raise errors.RequireLiteralValue("this argument of a kernel's function has to be a constant")
    return int(kind.literal_value)


@intrinsic(prefer_literal=True)
def load(typing: Any, address: Any, lanes: Any) -> Any:
    """load(address, lanes): the vector at an address; `lanes` is a constant."""
    count = literal(lanes)
    return BY_LANES[count](types.int64, lanes), lambda context, builder, sig, args: emit_load(builder, args[0], count)


@intrinsic(prefer_literal=True)
def broadcast(typing: Any, address: Any, lanes: Any) -> Any:
    """broadcast(address, lanes): the float at an address in every lane."""
    count = literal(lanes)
    result = BY_LANES[count]
    return result(types.int64, lanes), lambda context, builder, sig, args: emit_broadcast(builder, args[0], count)


@intrinsic(prefer_literal=True)
def full(typing: Any, value: Any, lanes: Any) -> Any:
    """full(value, lanes): a number in every lane."""
    count = literal(lanes)
    result = BY_LANES[count]
    return result(types.float32, lanes), lambda context, builder, sig, args: emit_splat(builder, args[0], count)


@intrinsic
def store(typing: Any, address: Any, value: Any) -> Any:
    """store(address, vector): write the lanes at an address."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        emit_store(builder, args[0], args[1])
        return context.get_dummy_value()

    return types.void(types.int64, value), generate


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """fma(a, b, c): a * b + c."""
    return a(a, a, a), lambda context, builder, sig, args: emit_fma(builder, *args)


@intrinsic
def maximum(typing: Any, a: Any, b: Any) -> Any:
    """maximum(a, b) lane by lane; NaN where a is."""
    return a(a, a), lambda context, builder, sig, args: emit_select(builder, "<", *args)


@intrinsic
def root(typing: Any, vector: Any) -> Any:
    """The square root lane by lane."""
    name = f"llvm.sqrt.v{vector.lanes}f32"
    return vector(vector), lambda context, builder, sig, args: call(builder, name, args[0].type, args[0])


@intrinsic(prefer_literal=True)
def load_rows(typing: Any, address: Any, count: Any, lanes: Any) -> Any:
    """load_rows(address, count, lanes): a tuple of `count` vectors stored one after the other."""
    rows, width = literal(count), literal(lanes)
    result = types.UniTuple(BY_LANES[width], rows)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values = [emit_load(builder, emit_offset(builder, args[0], 4 * width * row), width) for row in range(rows)]
        return context.make_tuple(builder, sig.return_type, values)

    return result(types.int64, count, lanes), generate


@intrinsic
def store_rows(typing: Any, address: Any, rows: Any) -> Any:
    """store_rows(address, tuple of vectors): write the vectors one after the other."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        for row in range(rows.count):
            at = emit_offset(builder, args[0], 4 * rows.dtype.lanes * row)
            emit_store(builder, at, builder.extract_value(args[1], row))
        return context.get_dummy_value()

    return types.void(types.int64, rows), generate


# Lanes: some of them, and sums across them ----------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def spread(typing: Any, vector: Any, width: Any) -> Any:
    """spread(vector, width): in every lane the sum of its `width` neighbours, a power of two; width is a constant."""
    count = literal(width)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value, half = args[0], count // 2
        while half:
            value = builder.fadd(value, emit_shuffle(builder, value, value, [i ^ half for i in range(vector.lanes)]))
            half //= 2
        return value

    return vector(vector, width), generate


@intrinsic
def number(typing: Any, address: Any) -> Any:
    """The float32 at an address as a float64."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = builder.load(builder.inttoptr(args[0], FLOAT.as_pointer()), align=4)
        return builder.fpext(value, ir.DoubleType())

    return types.float64(types.int64), generate


def _lanes_below(builder: Any, count: Any) -> Any:
    """Which lanes have a number below `count` (64 bits)."""
    counts = emit_splat(builder, builder.trunc(count, INT), LANES)
    return builder.icmp_signed("<", ir.Constant(counts.type, list(range(LANES))), counts)


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

    return BY_LANES[LANES](types.int64, types.int64), generate


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
