"""Vectors of float32 as a Numba type, so that kernels are plain Python with SIMD values in registers.

A value of type `Vector(n)` is LLVM's `<n x float>`: `+ - * /` work lane by lane, tuples of vectors stay in
registers, and LLVM maps them to AVX-512, AVX2 or NEON. Addresses are 64-bit integers and count bytes.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

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


V1, V4, V8, V16 = (Vector(lanes) for lanes in (1, 4, 8, 16))
BY_LANES = {kind.lanes: kind for kind in (V1, V4, V8, V16)}


def _operator(symbol: Any, emit: str) -> None:
    """Let `symbol` work on two equal vectors."""

    class Template(ConcreteTemplate):
        cases = [signature(kind, kind, kind) for kind in BY_LANES.values()]  # noqa: RUF012

    infer_global(symbol)(Template)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return getattr(builder, emit)(*args, flags=("contract",))

    for kind in BY_LANES.values():
        lower_builtin(symbol, kind, kind)(lower)


for _symbol, _emit in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _operator(_symbol, _emit)


# What the intrinsics of this package emit ---------------------------------------------------------------------


def splat(value: float, like: ir.VectorType) -> ir.Constant:
    """The constant vector (value, value, ...)."""
    return ir.Constant(like, [value] * like.count)


def call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    """A call of an LLVM intrinsic, e.g. `llvm.fmuladd.v16f32`."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, kind, name)
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
    """A float value in every lane."""
    kind = ir.VectorType(FLOAT, lanes)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, INT(0))
    return builder.shuffle_vector(
        one, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(INT, lanes), [0] * lanes)
    )


def emit_select(builder: Any, symbol: str, x: Any, bound: Any) -> Any:
    """`bound` where x `symbol` bound, x elsewhere and where x is NaN."""
    return builder.select(builder.fcmp_ordered(symbol, x, bound), bound, x)


def emit_offset(builder: Any, address: Any, byte_count: int) -> Any:
    """address + byte_count."""
    return builder.add(address, ir.Constant(address.type, byte_count)) if byte_count else address


def emit_shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """Pick lanes out of a (numbers 0..) and b (numbers a.count..)."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT, len(lanes)), lanes))


# Intrinsics ---------------------------------------------------------------------------------------------------


def literal(kind: Any) -> int | None:
    return kind.literal_value if isinstance(kind, types.IntegerLiteral) else None


@intrinsic(prefer_literal=True)
def load(typing: Any, address: Any, lanes: Any) -> Any:
    """load(address, lanes): the vector at an address; `lanes` is a constant."""
    count = literal(lanes)
    if count is None:
        return None

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return emit_load(builder, args[0], count)

    return BY_LANES[count](types.int64, lanes), generate


@intrinsic(prefer_literal=True)
def broadcast(typing: Any, address: Any, lanes: Any) -> Any:
    """broadcast(address, lanes): the float at an address in every lane."""
    count = literal(lanes)
    if count is None:
        return None

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return emit_broadcast(builder, args[0], count)

    return BY_LANES[count](types.int64, lanes), generate


@intrinsic(prefer_literal=True)
def full(typing: Any, value: Any, lanes: Any) -> Any:
    """full(value, lanes): a number in every lane."""
    count = literal(lanes)
    if count is None:
        return None

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return emit_splat(builder, args[0], count)

    return BY_LANES[count](types.float32, lanes), generate


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

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return emit_fma(builder, *args)

    return a(a, a, a), generate


@intrinsic
def maximum(typing: Any, a: Any, b: Any) -> Any:
    """maximum(a, b) lane by lane; NaN where a is."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return emit_select(builder, "<", *args)

    return a(a, a), generate


@intrinsic(prefer_literal=True)
def load_rows(typing: Any, address: Any, count: Any, lanes: Any) -> Any:
    """load_rows(address, count, lanes): a tuple of `count` vectors stored one after the other."""
    rows, width = literal(count), literal(lanes)
    if rows is None or width is None:
        return None
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
            emit_store(
                builder, emit_offset(builder, args[0], 4 * rows.dtype.lanes * row), builder.extract_value(args[1], row)
            )
        return context.get_dummy_value()

    return types.void(types.int64, rows), generate
