"""One token of the scan for one tile of channels: the N states of the tile's channels as N vectors.

Written as LLVM code because the states must stay in registers, which loops over arrays do not give. Names:
h states, d = dt, du = dt * u, x = exp(dt * A) = exp2(d * a) with a = A * log2(e); rows of N vectors are stored
one after the other; B and C are N floats shared by the channels of the tile, or, where `groups` is 2, by each half
of its channels: those of the upper half lie `*_gap` bytes further.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lightm.ops.jit import AVX512
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


def emit_row(builder: Any, address: Any, row: int, lanes: int) -> Any:
    return emit_load(builder, emit_offset(builder, address, 4 * lanes * row), lanes)


def emit_number(builder: Any, address: Any, row: int, lanes: int) -> Any:
    return emit_broadcast(builder, emit_offset(builder, address, 4 * row), lanes)


def _shared(builder: Any, address: Any, row: int, lanes: int, gap: Any) -> Any:
    """A float of B or C in every lane; with a gap, the float so many bytes further in the upper half of the lanes."""
    low = emit_number(builder, address, row, lanes)
    if gap is None:
        return low
    high = emit_number(builder, builder.add(address, gap), row, lanes)
    half = lanes // 2
    return emit_shuffle(builder, low, high, [*range(half), *range(lanes + half, 2 * lanes)])


def _two(groups: Any) -> bool:
    """Whether the literal type `groups` says two."""
    return bool(groups.literal_value == 2)


def _step(builder: Any, dt: Any, dt_u: Any, state: Any, row: int, a: Any, b: Any, gap: Any) -> tuple[Any, Any]:
    """(decay, state after the token) of state number `row`."""
    lanes = dt.type.count
    decay = emit_exp2(builder, builder.fmul(dt, emit_row(builder, a, row, lanes)))
    return decay, emit_fma(builder, decay, state, builder.fmul(dt_u, _shared(builder, b, row, lanes, gap)))


def _generate_advance(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    states, dt, dt_u, a_at, b_at, c_at, *gaps = args
    b_gap, c_gap = gaps[:2] if gaps and sig.args[-1].literal_value == 2 else (None, None)
    lanes = dt.type.count
    after, sums = [], [splat(0.0, dt.type), splat(0.0, dt.type)]
    for n in range(sig.args[0].count):
        _, state = _step(builder, dt, dt_u, builder.extract_value(states, n), n, a_at, b_at, b_gap)
        sums[n % 2] = emit_fma(builder, state, _shared(builder, c_at, n, lanes, c_gap), sums[n % 2])
        after.append(state)
        dt, sums[n % 2] = _in_order(builder, dt, sums[n % 2])
    total = builder.fadd(*sums)
    return context.make_tuple(builder, sig.return_type, [context.make_tuple(builder, sig.args[0], after), total])


def _in_order(builder: Any, dt: Any, done: Any) -> tuple[Any, Any]:
    """(dt, done), where this dt exists only after `done`: LLVM cannot mix what follows with what came before.

    Mixed, the work of the N states needs more registers than there are, and some states stay in memory. There is no
    instruction in it, and the processor, which sees no dependence, still overlaps the states. For AVX-512 alone: with
    fewer registers states are in memory anyway.
    """
    if not (AVX512 and dt.type.count == 16):
        return dt, done
    both = ir.LiteralStructType([dt.type, done.type])
    nothing = ir.InlineAsm(ir.FunctionType(both, [dt.type, done.type]), "", "=v,=v,0,1")
    pair = builder.call(nothing, [dt, done])
    return builder.extract_value(pair, 0), builder.extract_value(pair, 1)


@intrinsic
def advance(typing: Any, h: Any, d: Any, du: Any, a: Any, b: Any, c: Any) -> Any:
    """advance(h, d, du, a, b, c): (states after the token, sum over n of C[n] * h[n])."""
    result = types.Tuple((h, d))
    return result(h, d, d, types.int64, types.int64, types.int64), _generate_advance


@intrinsic(prefer_literal=True)
def advance_groups(
    typing: Any, h: Any, d: Any, du: Any, a: Any, b: Any, c: Any, b_gap: Any, c_gap: Any, groups: Any
) -> Any:
    """advance_groups(h, d, du, a, b, c, b_gap, c_gap, groups): `advance` with one or two groups in the tile."""
    result = types.Tuple((h, d))
    return result(h, d, d, *[types.int64] * 5, groups), _generate_advance


@intrinsic(prefer_literal=True)
def absorb(typing: Any, h: Any, d: Any, du: Any, a: Any, b: Any, b_gap: Any, groups: Any) -> Any:
    """absorb(h, d, du, a, b, b_gap, groups): states after the token, without its output."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        states, dt, dt_u, a_at, b_at, gap, _ = args
        after = []
        for n in range(h.count):
            _, state = _step(
                builder, dt, dt_u, builder.extract_value(states, n), n, a_at, b_at, gap if _two(groups) else None
            )
            dt, state = _in_order(builder, dt, state)
            after.append(state)
        return context.make_tuple(builder, sig.return_type, after)

    return h(h, d, d, *[types.int64] * 3, groups), generate


@intrinsic(prefer_literal=True)
def record(
    typing: Any, h: Any, d: Any, du: Any, a: Any, b: Any, h_out: Any, x_out: Any, b_gap: Any, groups: Any
) -> Any:
    """record(h, d, du, a, b, h_out, x_out, b_gap, groups): states after the token; they and the decays are
    written as rows."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        states, dt, dt_u, a_at, b_at, h_at, x_at, gap, _ = args
        lanes = dt.type.count
        after = []
        for n in range(h.count):
            decay, state = _step(
                builder, dt, dt_u, builder.extract_value(states, n), n, a_at, b_at, gap if _two(groups) else None
            )
            emit_store(builder, emit_offset(builder, h_at, 4 * lanes * n), state)
            emit_store(builder, emit_offset(builder, x_at, 4 * lanes * n), decay)
            after.append(state)
        return context.make_tuple(builder, sig.return_type, after)

    return h(h, d, d, *[types.int64] * 5, groups), generate


@intrinsic(prefer_literal=True)
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
    b_gap: Any,
    c_gap: Any,
    groups: Any,
) -> Any:
    """One token of the reverse sweep.

    g holds the gradients that reach the token's states from later tokens. With G[n] = g[n] + dy * C[n] and
    q[n] = G[n] * x[n] * h_before[n], returns (x[n] * G[n] for the token before, sum of a[n] * q[n],
    sum of B[n] * G[n], sum of C[n] * h_after[n]); adds dt * q to the rows at `da` and writes the N sums over
    the tile's channels of du * G and dy * h_after at `db` and `dc`; with two groups N sums for each, side by side.
    """

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        carried, dt, dt_u, grad, a_at, b_at, c_at, after_at, before_at, x_at, da_at, db_at, dc_at, *gaps = args
        b_far, c_far = gaps[:2] if _two(groups) else (None, None)
        lanes = dt.type.count
        zero = splat(0.0, dt.type)
        sum_a, sum_b, sum_c = zero, zero, zero
        earlier, for_b, for_c = [], [], []
        for n in range(g.count):
            c_n = _shared(builder, c_at, n, lanes, c_far)
            state_grad = emit_fma(builder, grad, c_n, builder.extract_value(carried, n))
            after = emit_row(builder, after_at, n, lanes)
            sum_c = emit_fma(builder, after, c_n, sum_c)
            sum_b = emit_fma(builder, state_grad, _shared(builder, b_at, n, lanes, b_far), sum_b)
            passed = builder.fmul(state_grad, emit_row(builder, x_at, n, lanes))
            q = builder.fmul(passed, emit_row(builder, before_at, n, lanes))
            sum_a = emit_fma(builder, q, emit_row(builder, a_at, n, lanes), sum_a)
            emit_store(
                builder,
                emit_offset(builder, da_at, 4 * lanes * n),
                emit_fma(builder, dt, q, emit_row(builder, da_at, n, lanes)),
            )
            earlier.append(passed)
            for_b.append(builder.fmul(state_grad, dt_u))
            for_c.append(builder.fmul(grad, after))
        for vectors, address in ((for_b, db_at), (for_c, dc_at)):
            if _two(groups):
                _store_half_sums(builder, vectors, address)
            else:
                _store_sums(builder, vectors, address)
        states = context.make_tuple(builder, g, earlier)
        return context.make_tuple(builder, sig.return_type, [states, sum_a, sum_b, sum_c])

    result = types.Tuple((g, d, d, d))
    return result(g, d, d, d, *[types.int64] * 11, groups), generate


def _store_half_sums(builder: Any, vectors: list[Any], address: Any) -> None:
    """Write the sum of the lower lanes of each vector, N floats, and then those of the upper lanes."""
    half = vectors[0].type.count // 2
    nothing = ir.Constant(vectors[0].type, ir.Undefined)
    for part in range(2):
        lanes = list(range(part * half, (part + 1) * half))
        halves = [emit_shuffle(builder, vector, nothing, lanes) for vector in vectors]
        _store_sums(builder, halves, emit_offset(builder, address, 4 * len(vectors) * part))


def _store_sums(builder: Any, vectors: list[Any], address: Any) -> None:
    """Write the sum of the lanes of each vector, N floats.

    Pairs of vectors are folded into one with half the lanes for each, until a lane is a sum: about three
    instructions per vector instead of four shuffles and four additions. `owner[lane]` is the vector that a lane
    of the folded vectors belongs to.
    """
    lanes = vectors[0].type.count
    folded = [(vector, [n] * lanes) for n, vector in enumerate(vectors)]
    width = lanes  # lanes that still belong to one sum
    while width > 1 and len(folded) > 1:
        folded = [emit_fold(builder, *folded[i], *folded[i + 1], width) for i in range(0, len(folded), 2)]
        width //= 2
    while width > 1:
        folded = [emit_halve(builder, *folded[0], width)]
        width //= 2
    at = 0
    for vector, owner in folded:
        order = sorted(range(len(owner)), key=owner.__getitem__)
        if owner != sorted(owner):
            vector = emit_shuffle(builder, vector, ir.Constant(vector.type, ir.Undefined), order)
        emit_store(builder, emit_offset(builder, address, 4 * at), vector)
        at += len(owner)


def emit_fold(builder: Any, a: Any, of_a: list[int], b: Any, of_b: list[int], width: int) -> tuple[Any, list[int]]:
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


def emit_halve(builder: Any, a: Any, of_a: list[int], width: int) -> tuple[Any, list[int]]:
    """Add the two halves of every block of `width` lanes of a."""
    half = width // 2
    low = [block + lane for block in range(0, len(of_a), width) for lane in range(half)]
    nothing = ir.Constant(a.type, ir.Undefined)
    high = emit_shuffle(builder, a, nothing, [lane + half for lane in low])
    return builder.fadd(emit_shuffle(builder, a, nothing, low), high), [of_a[lane] for lane in low]
