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
from lightm.ops.vector import emit_broadcast, emit_fma, emit_load, emit_offset, emit_shuffle, emit_store, splat
from lightm.ops.vector_math import emit_exp2


def emit_row(builder: Any, address: Any, row: int, lanes: int) -> Any:
    return emit_load(builder, emit_offset(builder, address, 4 * lanes * row), lanes)


def emit_store_row(builder: Any, address: Any, row: int, value: Any) -> None:
    emit_store(builder, emit_offset(builder, address, 4 * value.type.count * row), value)


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


def _step(builder: Any, dt: Any, dt_u: Any, states: Any, row: int, a: Any, b: Any, gap: Any) -> tuple[Any, Any]:
    """(decay, state after the token) of state number `row`."""
    lanes, state = dt.type.count, builder.extract_value(states, row)
    decay = emit_exp2(builder, builder.fmul(dt, emit_row(builder, a, row, lanes)))
    return decay, emit_fma(builder, decay, state, builder.fmul(dt_u, _shared(builder, b, row, lanes, gap)))


def _generate_advance(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    states, dt, dt_u, a_at, b_at, c_at, *gaps = args
    b_gap, c_gap = gaps[:2] if gaps and sig.args[-1].literal_value == 2 else (None, None)
    lanes = dt.type.count
    after, sums = [], [splat(0.0, dt.type), splat(0.0, dt.type)]
    for n in range(sig.args[0].count):
        _, state = _step(builder, dt, dt_u, states, n, a_at, b_at, b_gap)
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
    return types.Tuple((h, d))(h, d, d, *[types.int64] * 3), _generate_advance


@intrinsic(prefer_literal=True)
def advance_groups(
    typing: Any, h: Any, d: Any, du: Any, a: Any, b: Any, c: Any, b_gap: Any, c_gap: Any, groups: Any
) -> Any:
    """advance_groups(h, d, du, a, b, c, b_gap, c_gap, groups): `advance` with one or two groups in the tile."""
    return types.Tuple((h, d))(h, d, d, *[types.int64] * 5, groups), _generate_advance


@intrinsic(prefer_literal=True)
def absorb(typing: Any, h: Any, d: Any, du: Any, a: Any, b: Any, b_gap: Any, groups: Any) -> Any:
    """absorb(h, d, du, a, b, b_gap, groups): states after the token, without its output."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        states, dt, dt_u, a_at, b_at, gap, _ = args
        after = []
        for n in range(h.count):
            _, state = _step(builder, dt, dt_u, states, n, a_at, b_at, gap if _two(groups) else None)
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
        after = []
        for n in range(h.count):
            decay, state = _step(builder, dt, dt_u, states, n, a_at, b_at, gap if _two(groups) else None)
            emit_store_row(builder, h_at, n, state)
            emit_store_row(builder, x_at, n, decay)
            after.append(state)
        return context.make_tuple(builder, sig.return_type, after)

    return h(h, d, d, *[types.int64] * 5, groups), generate


@intrinsic(prefer_literal=True)
def retreat(
    typing: Any, g: Any, d: Any, du: Any, dy: Any, a: Any, b: Any, c: Any, h_after: Any, h_before: Any, x: Any, da: Any,
    db: Any, dc: Any, b_gap: Any, c_gap: Any, groups: Any,
) -> Any:  # fmt: skip
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
            emit_store_row(builder, da_at, n, emit_fma(builder, dt, q, emit_row(builder, da_at, n, lanes)))
            earlier.append(passed)
            for_b.append(builder.fmul(state_grad, dt_u))
            for_c.append(builder.fmul(grad, after))
        for vectors, address in ((for_b, db_at), (for_c, dc_at)):
            for part in range(2 if _two(groups) else 1):
                sums = Sums(builder)
                for vector in vectors:
                    sums.add(_half(builder, vector, part) if _two(groups) else vector)
                sums.store(emit_offset(builder, address, 4 * len(vectors) * part))
        states = context.make_tuple(builder, g, earlier)
        return context.make_tuple(builder, sig.return_type, [states, sum_a, sum_b, sum_c])

    return types.Tuple((g, d, d, d))(g, d, d, d, *[types.int64] * 11, groups), generate


def _half(builder: Any, vector: Any, part: int) -> Any:
    """The lower (0) or upper (1) lanes."""
    half = vector.type.count // 2
    return emit_shuffle(builder, vector, None, list(range(part * half, (part + 1) * half)))


class Sums:
    """The sums of the lanes of vectors that come one after the other, a power of two of them.

    Two vectors are folded into one with half the lanes for each as soon as there are two of a kind, so that only a few
    are alive and the others' registers are free for states.
    """

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self.count = 0
        self.folded: list[tuple[Any, list[int], int]] = []  # vector, whose sum a lane belongs to, lanes of a sum

    def add(self, vector: Any) -> None:
        """Take one more vector."""
        lanes = vector.type.count
        owner, width = [self.count] * lanes, lanes
        while width > 1 and self.folded and self.folded[-1][2] == width:
            first, of_first, _ = self.folded.pop()
            vector, owner = _fold(self.builder, first, of_first, vector, owner, width)
            width //= 2
        self.folded.append((vector, owner, width))
        self.count += 1

    def store(self, address: Any) -> None:
        """Write the sums in the order in which their vectors came."""
        at = 0
        for vector, owner, width in self.folded:
            while width > 1:
                vector, owner = _halve(self.builder, vector, owner, width)
                width //= 2
            order = sorted(range(len(owner)), key=owner.__getitem__)
            if order != list(range(len(owner))):
                vector = emit_shuffle(self.builder, vector, None, order)
            emit_store(self.builder, emit_offset(self.builder, address, 4 * at), vector)
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
    total = builder.fadd(emit_shuffle(builder, a, b, low), emit_shuffle(builder, a, b, high))
    return total, [owner[lane] for lane in low]


def _halve(builder: Any, a: Any, of_a: list[int], width: int) -> tuple[Any, list[int]]:
    """Add the two halves of every block of `width` lanes of a."""
    half = width // 2
    low = [block + lane for block in range(0, len(of_a), width) for lane in range(half)]
    high = emit_shuffle(builder, a, None, [lane + half for lane in low])
    return builder.fadd(emit_shuffle(builder, a, None, low), high), [of_a[lane] for lane in low]
