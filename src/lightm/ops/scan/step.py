"""One token of the scan for one tile of channels: the N states of the tile's channels as N vectors.

Written as LLVM code because the states must stay in registers, which loops over arrays do not give. Names:
h states, d = dt, du = dt * u, x = exp(dt * A) = exp2(d * a) with a = A * log2(e); rows of N vectors are stored
one after the other; B and C are N floats shared by the channels of the tile.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lightm.ops.vector import (
    emit_broadcast,
    emit_fma,
    emit_load,
    emit_offset,
    emit_shuffle,
    emit_store,
    splat,
)
from lightm.ops.vector_math import emit_exp2


def _row(builder: Any, address: Any, row: int, lanes: int) -> Any:
    return emit_load(builder, emit_offset(builder, address, 4 * lanes * row), lanes)


def _number(builder: Any, address: Any, row: int, lanes: int) -> Any:
    return emit_broadcast(builder, emit_offset(builder, address, 4 * row), lanes)


@intrinsic
def advance(typing: Any, h: Any, d: Any, du: Any, a: Any, b: Any, c: Any) -> Any:
    """advance(h, d, du, a, b, c): (states after the token, sum over n of C[n] * h[n])."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        states, dt, dt_u, a_at, b_at, c_at = args
        lanes = dt.type.count
        after, sums = [], [splat(0.0, dt.type), splat(0.0, dt.type)]
        for n in range(h.count):
            decay = emit_exp2(builder, builder.fmul(dt, _row(builder, a_at, n, lanes)))
            inflow = builder.fmul(dt_u, _number(builder, b_at, n, lanes))
            state = emit_fma(builder, decay, builder.extract_value(states, n), inflow)
            sums[n % 2] = emit_fma(builder, state, _number(builder, c_at, n, lanes), sums[n % 2])
            after.append(state)
        total = builder.fadd(*sums)
        return context.make_tuple(builder, sig.return_type, [context.make_tuple(builder, h, after), total])

    result = types.Tuple((h, d))
    return result(h, d, d, types.int64, types.int64, types.int64), generate


@intrinsic
def record(typing: Any, h: Any, d: Any, du: Any, a: Any, b: Any, h_out: Any, x_out: Any) -> Any:
    """record(h, d, du, a, b, h_out, x_out): states after the token; they and the decays are written as rows."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        states, dt, dt_u, a_at, b_at, h_at, x_at = args
        lanes = dt.type.count
        after = []
        for n in range(h.count):
            decay = emit_exp2(builder, builder.fmul(dt, _row(builder, a_at, n, lanes)))
            inflow = builder.fmul(dt_u, _number(builder, b_at, n, lanes))
            state = emit_fma(builder, decay, builder.extract_value(states, n), inflow)
            emit_store(builder, emit_offset(builder, h_at, 4 * lanes * n), state)
            emit_store(builder, emit_offset(builder, x_at, 4 * lanes * n), decay)
            after.append(state)
        return context.make_tuple(builder, sig.return_type, after)

    address = types.int64
    return h(h, d, d, address, address, address, address), generate


@intrinsic
def retreat(
    typing: Any,
    g: Any,
    d: Any,
    du: Any,
    dy: Any,
    a: Any,
    b: Any,
    c: Any,
    h_after: Any,
    h_before: Any,
    x: Any,
    da: Any,
    db: Any,
    dc: Any,
) -> Any:
    """One token of the reverse sweep.

    g holds the gradients that reach the token's states from later tokens. With G[n] = g[n] + dy * C[n] and
    q[n] = G[n] * x[n] * h_before[n], returns (x[n] * G[n] for the token before, sum of a[n] * q[n],
    sum of B[n] * G[n], sum of C[n] * h_after[n]); adds dt * q to the rows at `da` and writes the N sums over
    the tile's channels of du * G and dy * h_after at `db` and `dc`.
    """

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        carried, dt, dt_u, grad, a_at, b_at, c_at, after_at, before_at, x_at, da_at, db_at, dc_at = args
        lanes = dt.type.count
        zero = splat(0.0, dt.type)
        sum_a, sum_b, sum_c = zero, zero, zero
        earlier, for_b, for_c = [], [], []
        for n in range(g.count):
            c_n = _number(builder, c_at, n, lanes)
            state_grad = emit_fma(builder, grad, c_n, builder.extract_value(carried, n))
            after = _row(builder, after_at, n, lanes)
            sum_c = emit_fma(builder, after, c_n, sum_c)
            sum_b = emit_fma(builder, state_grad, _number(builder, b_at, n, lanes), sum_b)
            passed = builder.fmul(state_grad, _row(builder, x_at, n, lanes))
            q = builder.fmul(passed, _row(builder, before_at, n, lanes))
            sum_a = emit_fma(builder, q, _row(builder, a_at, n, lanes), sum_a)
            emit_store(
                builder,
                emit_offset(builder, da_at, 4 * lanes * n),
                emit_fma(builder, dt, q, _row(builder, da_at, n, lanes)),
            )
            earlier.append(passed)
            for_b.append(builder.fmul(state_grad, dt_u))
            for_c.append(builder.fmul(grad, after))
        _store_sums(builder, for_b, db_at)
        _store_sums(builder, for_c, dc_at)
        states = context.make_tuple(builder, g, earlier)
        return context.make_tuple(builder, sig.return_type, [states, sum_a, sum_b, sum_c])

    result = types.Tuple((g, d, d, d))
    return result(g, d, d, d, *[types.int64] * 9), generate


def _store_sums(builder: Any, vectors: list[Any], address: Any) -> None:
    """Write the sum of the lanes of each vector, N floats.

    Pairs of vectors are folded into one with half the lanes for each, until a lane is a sum: about three
    instructions a vector instead of four shuffles and four additions. `owner[lane]` is the vector that a lane
    of the folded vectors belongs to.
    """
    lanes = vectors[0].type.count
    folded = [(vector, [n] * lanes) for n, vector in enumerate(vectors)]
    width = lanes  # lanes that still belong to one sum
    while width > 1 and len(folded) > 1:
        folded = [_fold(builder, *folded[i], *folded[i + 1], width) for i in range(0, len(folded), 2)]
        width //= 2
    while width > 1:
        folded = [_halve(builder, *folded[0], width)]
        width //= 2
    at = 0
    for vector, owner in folded:
        order = sorted(range(len(owner)), key=owner.__getitem__)
        if owner != sorted(owner):
            vector = emit_shuffle(builder, vector, ir.Constant(vector.type, ir.Undefined), order)
        emit_store(builder, emit_offset(builder, address, 4 * at), vector)
        at += len(owner)


def _fold(builder: Any, a: Any, of_a: list[int], b: Any, of_b: list[int], width: int) -> tuple[Any, list[int]]:
    """Add the two halves of every block of `width` lanes of a and b, side by side in one vector."""
    lanes = len(of_a)
    group = max(width, 4)  # shuffles within four lanes, or of whole groups of four, are the cheap ones
    half = width // 2
    low: list[int] = []
    for start in range(0, lanes, group):
        for base in (start, lanes + start):
            low += [base + block + lane for block in range(0, group, width) for lane in range(half)]
    high = [lane + half for lane in low]
    owner = of_a + of_b
    return (
        builder.fadd(emit_shuffle(builder, a, b, low), emit_shuffle(builder, a, b, high)),
        [owner[lane] for lane in low],
    )


def _halve(builder: Any, a: Any, of_a: list[int], width: int) -> tuple[Any, list[int]]:
    """Add the two halves of every block of `width` lanes of a."""
    half = width // 2
    low = [block + lane for block in range(0, len(of_a), width) for lane in range(half)]
    nothing = ir.Constant(a.type, ir.Undefined)
    high = emit_shuffle(builder, a, nothing, [lane + half for lane in low])
    return builder.fadd(emit_shuffle(builder, a, nothing, low), high), [of_a[lane] for lane in low]
