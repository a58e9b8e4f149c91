"""The SSD scan's kernels: a segment of tokens for one tile of channels of one head, forward and backward.

A token's step is LLVM code as in `ops/scan/step.py`, but its decay is one vector for all states. Names: h states,
du = dt * u, x = exp(dt * A); rows of N vectors are stored one after the other; B and C are N floats shared by the tile.

All arguments are integers: addresses of float32 data, strides and sizes in bytes or tokens as named. A tile is
LANES channels; `*_step` is the distance in bytes from one token to the next; `chunk` is a multiple of LANES.
A head's numbers (delta, A, bias, skip) are single floats. Steps dt and decays exp(dt * A) depend on the token and the
head alone: they are computed with LANES tokens per vector, one exponential per token for the whole tile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from numba import types
from numba.extending import intrinsic

from lightm.ops.bounds import Extent, each, row_extents
from lightm.ops.bounds import rows as rows_of
from lightm.ops.jit import LANES, device_function, kernel
from lightm.ops.scan.step import Sums, emit_number, emit_row, emit_store_row
from lightm.ops.vector import broadcast, emit_fma, fma, full, load, load_rows, splat, store, store_rows
from lightm.ops.vector_math import LN2, exp2, sigmoid, softplus

_ROW = 4 * LANES


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
            emit_store_row(builder, h_at, n, state)
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
        earlier, for_b, for_c = [], Sums(builder), Sums(builder)
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
        total = Sums(builder)
        total.add(args[1])
        total.store(args[0])
        return context.get_dummy_value()

    return types.void(types.int64, value), generate


@device_function
def _gather(delta, delta_step, bias, first, last, target):  # type: ignore[no-untyped-def]
    """Write delta + bias of tokens first..last-1 as consecutive floats, and zeros up to a whole vector."""
    whole = (last - first + LANES - 1) // LANES * LANES
    for t in range(first, last):
        store(target + 4 * (t - first), load(delta + t * delta_step, 1))
    for i in range(last - first, whole):
        store(target + 4 * i, full(0.0, 1))
    for i in range(0, whole, LANES):
        store(target + 4 * i, load(target + 4 * i, LANES) + bias)
    return whole


@device_function
def _steps(raw, soft, rate, whole, steps, decays):  # type: ignore[no-untyped-def]
    """dt from what `_gather` wrote, and exp2(dt * rate): `whole` floats each; `steps` may be `raw`."""
    for i in range(0, whole, LANES):
        d = load(raw + 4 * i, LANES)
        if soft != 0:
            d = softplus(d, LANES)
        store(steps + 4 * i, d)
        store(decays + 4 * i, exp2(d * rate))


@cache
def forward_kernel(states: int) -> Callable[..., Any]:
    """The forward kernel for N = `states`."""

    def extents(
        u_step: int, delta_step: int, b_step: int, c_step: int, z: int, z_step: int, y_step: int, skip: int, bias: int,
        saved: int, saved_step: int, chunk: int, tokens: int,
    ) -> dict[str, Extent]:  # fmt: skip
        whole = -(-min(chunk, tokens) // LANES) * LANES
        return {
            **row_extents(0, tokens, _ROW, u=u_step, y=y_step),
            **row_extents(0, tokens if z else 0, _ROW, z=z_step),
            **row_extents(0, tokens, 4, delta=delta_step),
            **row_extents(0, tokens, 4 * states, b=b_step, c=c_step),
            "a": (0, 4),
            "skip": (0, 4 if skip else 0),
            "bias": (0, 4 if bias else 0),
            "state": (0, _ROW * states),
            "saved": rows_of(0, -(-tokens // chunk) if saved else 0, saved_step, _ROW * states),
            "scratch": (0, 4 * (chunk + whole) if tokens else 0),
        }

    @kernel(extents)
    def ssd_forward(  # type: ignore[no-untyped-def]
        u, u_step, delta, delta_step, b, b_step, c, c_step, z, z_step, y, y_step,
        a, skip, bias, soft, state, saved, saved_step, chunk, tokens, scratch,
    ):  # fmt: skip
        """Advance `state` (N rows) over `tokens` tokens and write y.

        `a` is where the head's A * log2(e) is; z, skip and bias are 0 where there is none; `soft` is 1 to apply
        softplus; with `saved` not 0, the states before every `chunk`-th token are kept there, `saved_step` bytes
        apart. `scratch` holds a chunk's dt and decays: 2 chunk floats.
        """
        zero = full(0.0, LANES)
        d_skip = broadcast(skip, LANES) if skip != 0 else zero
        d_bias = broadcast(bias, LANES) if bias != 0 else zero
        rate = broadcast(a, LANES)
        decays = scratch + 4 * chunk
        h = load_rows(state, states, LANES)
        for start in range(0, tokens, chunk):
            stop = min(start + chunk, tokens)
            if saved != 0:
                store_rows(saved, h)
                saved += saved_step
            whole = _gather(delta, delta_step, d_bias, start, stop, scratch)
            _steps(scratch, soft, rate, whole, scratch, decays)
            for t in range(start, stop):
                at = 4 * (t - start)
                u_t = load(u + t * u_step, LANES)
                du = broadcast(scratch + at, LANES) * u_t
                h, total = advance(h, broadcast(decays + at, LANES), du, b + t * b_step, c + t * c_step)
                store(y + t * y_step, fma(d_skip, u_t, total))
            if z != 0:
                for t in range(start, stop):
                    z_t = load(z + t * z_step, LANES)
                    store(y + t * y_step, load(y + t * y_step, LANES) * (z_t * sigmoid(z_t, LANES)))
        store_rows(state, h)

    return ssd_forward


@cache
def backward_kernel(states: int) -> Callable[..., Any]:
    """The backward kernel for N = `states`."""
    rows = _ROW * states

    def extents(
        u_step: int, delta_step: int, b_step: int, c_step: int, z: int, z_step: int, dy_step: int, skip: int, bias: int,
        saved_step: int, chunk: int, tokens: int, du_step: int, dz_step: int,
    ) -> dict[str, Extent]:  # fmt: skip
        return {
            **row_extents(0, tokens, _ROW, u=u_step, dy=dy_step, du=du_step),
            **row_extents(0, tokens if z else 0, _ROW, z=z_step, dz=dz_step),
            **row_extents(0, tokens, 4, delta=delta_step),
            **row_extents(0, tokens, 4 * states, b=b_step, c=c_step),
            "a": (0, 4),
            "skip": (0, 4 if skip else 0),
            "bias": (0, 4 if bias else 0),
            "saved": rows_of(0, -(-tokens // chunk), saved_step, _ROW * states),
            "ddelta": (0, -(-tokens // LANES) * _ROW),
            **each((0, 4 * states * tokens), "db", "dc"),
            "carry": (0, _ROW * states),
            **each((0, _ROW), "da", "dskip", "dbias"),
            "scratch": (0, 4 * scratch_floats(states, chunk)),
        }

    @kernel(extents)
    def ssd_backward(  # type: ignore[no-untyped-def]
        u, u_step, delta, delta_step, b, b_step, c, c_step, z, z_step, dy, dy_step,
        a, skip, bias, soft, saved, saved_step, chunk, tokens,
        du, du_step, dz, dz_step, ddelta, db, dc, carry, da, dskip, dbias, scratch,
    ):  # fmt: skip
        """Sweep a segment of tokens (its first one at a chunk's start) from last to first.

        `carry` (N rows) comes in as the gradient of the states after the segment and leaves as that of the states
        before it; da, dskip and dbias (one row each, whose sum counts) are added to; ddelta (a float a token, written
        up to a whole vector), db and dc (tokens, N) are written: sums over this tile alone. `scratch` holds a chunk's
        states (chunk + 1 times N rows), the gradient before the gate (chunk rows), and four floats per token.
        """
        zero = full(0.0, LANES)
        one = full(1.0, LANES)
        d_skip = broadcast(skip, LANES) if skip != 0 else zero
        d_bias = broadcast(bias, LANES) if bias != 0 else zero
        rate = broadcast(a, LANES)
        natural = rate * full(LN2, LANES)  # A itself
        da_sum = zero
        skip_sum = zero
        bias_sum = zero
        hs = scratch
        inner = hs + (chunk + 1) * rows
        raw = inner + chunk * _ROW
        ds = raw + 4 * chunk
        xs = ds + 4 * chunk
        dds = xs + 4 * chunk
        g = load_rows(carry, states, LANES)
        number = (tokens + chunk - 1) // chunk
        for k in range(number - 1, -1, -1):
            start = k * chunk
            stop = min(start + chunk, tokens)
            whole = _gather(delta, delta_step, d_bias, start, stop, raw)
            _steps(raw, soft, rate, whole, ds, xs)
            for t in range(start, stop):
                out = load(dy + t * dy_step, LANES)
                if z != 0:
                    z_t = load(z + t * z_step, LANES)
                    s = sigmoid(z_t, LANES)
                    # the factor of the output before the gate; the sweep below multiplies that in
                    store(dz + t * dz_step, out * s * fma(z_t, one - s, one))
                    out = out * (z_t * s)
                store(inner + (t - start) * _ROW, out)
            h = load_rows(saved + k * saved_step, states, LANES)
            store_rows(hs, h)
            for t in range(start, stop):
                i = t - start
                du_t = broadcast(ds + 4 * i, LANES) * load(u + t * u_step, LANES)
                h = record(h, broadcast(xs + 4 * i, LANES), du_t, b + t * b_step, hs + (i + 1) * rows)
            for i in range(stop - start, whole):
                store(dds + 4 * i, full(0.0, 1))
            # sums of a chunk, then of chunks: far smaller rounding errors than one long sum
            da_part = zero
            skip_part = zero
            bias_part = zero
            for t in range(stop - 1, start - 1, -1):
                i = t - start
                d = broadcast(ds + 4 * i, LANES)
                u_t = load(u + t * u_step, LANES)
                out = load(inner + i * _ROW, LANES)
                g, sum_q, sum_b, sum_c = retreat(
                    g, broadcast(xs + 4 * i, LANES), d * u_t, out, b + t * b_step, c + t * c_step,
                    hs + (i + 1) * rows, hs + i * rows, db + t * (4 * states), dc + t * (4 * states),
                )  # fmt: skip
                if z != 0:
                    store(dz + t * dz_step, load(dz + t * dz_step, LANES) * fma(d_skip, u_t, sum_c))
                store(du + t * du_step, fma(d, sum_b, d_skip * out))
                skip_part = fma(out, u_t, skip_part)
                da_part = fma(d, sum_q, da_part)
                store_sum(dds + 4 * i, fma(natural, sum_q, u_t * sum_b))
            for i in range(0, whole, LANES):
                dd = load(dds + 4 * i, LANES)
                if soft != 0:
                    dd = dd * sigmoid(load(raw + 4 * i, LANES), LANES)
                bias_part = bias_part + dd
                store(ddelta + 4 * (start + i), dd)
            da_sum = da_sum + da_part
            skip_sum = skip_sum + skip_part
            bias_sum = bias_sum + bias_part
        store_rows(carry, g)
        store(da, load(da, LANES) + da_sum)
        store(dskip, load(dskip, LANES) + skip_sum)
        store(dbias, load(dbias, LANES) + bias_sum)

    return ssd_backward


def scratch_floats(states: int, chunk: int) -> int:
    """Floats of scratch memory that a thread's backward kernel needs."""
    return LANES * (states * (chunk + 1) + chunk) + 4 * chunk
