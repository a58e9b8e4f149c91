"""One token of the SSD scan for one tile of channels of one head: the N states of each channel as N vectors.

As `ops/scan/step.py`, but the decay of a token is one vector for all states. Names: h states, du = dt * u,
x = exp(dt * A); rows of N vectors are stored one after the other; B and C are N floats shared by the tile.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lightm.ops.scan.step import emit_fold, emit_halve, emit_number, emit_row
from lightm.ops.vector import emit_fma, emit_offset, emit_shuffle, emit_store, splat


class _Sums:
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
            vector, owner = emit_fold(self.builder, first, of_first, vector, owner, width)
            width //= 2
        self.folded.append((vector, owner, width))
        self.count += 1

    def store(self, address: Any) -> None:
        """Write the sums in the order in which their vectors came."""
        at = 0
        for vector, owner, width in self.folded:
            while width > 1:
                vector, owner = emit_halve(self.builder, vector, owner, width)
                width //= 2
            order = sorted(range(len(owner)), key=owner.__getitem__)
            if order != list(range(len(owner))):
                vector = emit_shuffle(self.builder, vector, ir.Constant(vector.type, ir.Undefined), order)
            emit_store(self.builder, emit_offset(self.builder, address, 4 * at), vector)
            at += len(owner)


@intrinsic
def advance(typing: Any, h: Any, x: Any, du: Any, b: Any, c: Any) -> Any:
    """advance(h, x, du, b, c): (states after the token, sum over n of C[n] * h[n])."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        states, decay, dt_u, b_at, c_at = args
        lanes = decay.type.count
        after, sums = [], [splat(0.0, decay.type), splat(0.0, decay.type)]
        for n in range(h.count):
            inflow = builder.fmul(dt_u, emit_number(builder, b_at, n, lanes))
            state = emit_fma(builder, decay, builder.extract_value(states, n), inflow)
            sums[n % 2] = emit_fma(builder, state, emit_number(builder, c_at, n, lanes), sums[n % 2])
            after.append(state)
        total = builder.fadd(*sums)
        return context.make_tuple(builder, sig.return_type, [context.make_tuple(builder, h, after), total])

    return types.Tuple((h, x))(h, x, x, types.int64, types.int64), generate


@intrinsic
def record(typing: Any, h: Any, x: Any, du: Any, b: Any, h_out: Any) -> Any:
    """record(h, x, du, b, h_out): states after the token, which are also written as rows."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        states, decay, dt_u, b_at, h_at = args
        lanes = decay.type.count
        after = []
        for n in range(h.count):
            inflow = builder.fmul(dt_u, emit_number(builder, b_at, n, lanes))
            state = emit_fma(builder, decay, builder.extract_value(states, n), inflow)
            emit_store(builder, emit_offset(builder, h_at, 4 * lanes * n), state)
            after.append(state)
        return context.make_tuple(builder, sig.return_type, after)

    return h(h, x, x, types.int64, types.int64), generate


@intrinsic
def retreat(
    typing: Any, g: Any, x: Any, du: Any, dy: Any, b: Any, c: Any, h_after: Any, h_before: Any, db: Any, dc: Any
) -> Any:
    """One token of the reverse sweep.

    g holds the gradients that reach the token's states from later tokens. With G[n] = g[n] + dy * C[n] and
    q[n] = G[n] * x * h_before[n], returns (x * G[n] for the token before, sum of q[n], sum of B[n] * G[n],
    sum of C[n] * h_after[n]) and writes the N sums over the tile's channels of du * G and dy * h_after at `db`
    and `dc`.
    """

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        carried, decay, dt_u, grad, b_at, c_at, after_at, before_at, db_at, dc_at = args
        lanes = decay.type.count
        zero = splat(0.0, decay.type)
        sum_q, sum_b, sum_c = zero, zero, zero
        earlier, for_b, for_c = [], _Sums(builder), _Sums(builder)
        for n in range(g.count):
            c_n = emit_number(builder, c_at, n, lanes)
            state_grad = emit_fma(builder, grad, c_n, builder.extract_value(carried, n))
            after = emit_row(builder, after_at, n, lanes)
            sum_c = emit_fma(builder, after, c_n, sum_c)
            sum_b = emit_fma(builder, state_grad, emit_number(builder, b_at, n, lanes), sum_b)
            passed = builder.fmul(state_grad, decay)
            sum_q = emit_fma(builder, passed, emit_row(builder, before_at, n, lanes), sum_q)
            earlier.append(passed)
            for_b.add(builder.fmul(state_grad, dt_u))
            for_c.add(builder.fmul(grad, after))
        for_b.store(db_at)
        for_c.store(dc_at)
        states = context.make_tuple(builder, g, earlier)
        return context.make_tuple(builder, sig.return_type, [states, sum_q, sum_b, sum_c])

    return types.Tuple((g, x, x, x))(g, x, x, x, *[types.int64] * 6), generate


@intrinsic
def store_sum(typing: Any, address: Any, value: Any) -> Any:
    """store_sum(address, vector): write the sum of the lanes, one float."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        total = _Sums(builder)
        total.add(args[1])
        total.store(args[0])
        return context.get_dummy_value()

    return types.void(types.int64, value), generate
