"""The scan's kernels: a segment of tokens for one tile of channels, forward and backward.

All arguments are integers: addresses of float32 data, strides and sizes in bytes or tokens as named. A tile is
LANES channels of one group, or half of them of one and half of the next (`groups` = 2, the second group's B and C
`*_gap` bytes after the first's); `*_step` is the distance in bytes from one token to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from lightm.ops.bounds import Extent, each, row_extents
from lightm.ops.bounds import rows as rows_of
from lightm.ops.jit import LANES, device_function, kernel
from lightm.ops.scan.step import absorb, advance_groups, record, retreat
from lightm.ops.vector import fma, full, load, load_rows, store, store_rows
from lightm.ops.vector_math import LN2, sigmoid, softplus

STATE_SIZES = (4, 8, 16)
_ROW = 4 * LANES


@device_function
def _steps(delta, delta_step, bias, soft, first, last, target):  # type: ignore[no-untyped-def]
    """Write dt of tokens first..last-1 as rows at `target`."""
    for t in range(first, last):
        d = load(delta + t * delta_step, LANES) + bias
        if soft != 0:
            d = softplus(d, LANES)
        store(target + (t - first) * _ROW, d)


def _numbers(tokens: int, step: int, states: int, gap: int, groups: int) -> Extent:
    """The extent of a tile's B or C."""
    low, high = rows_of(0, tokens, step, 4 * states)
    return (low + min(gap, 0), high + max(gap, 0)) if groups == 2 and high else (low, high)


@cache
def forward_kernel(states: int, groups: int = 1) -> Callable[..., Any]:
    """The forward kernel for N = `states` and so many groups in a tile."""

    def extents(
        u_step: int, delta_step: int, b_step: int, c_step: int, z: int, z_step: int, y_step: int, skip: int, bias: int,
        soft: int, saved: int, saved_step: int, chunk: int, tokens: int, b_gap: int, c_gap: int,
    ) -> dict[str, Extent]:  # fmt: skip
        return {
            **row_extents(0, tokens, _ROW, u=u_step, delta=delta_step, y=y_step),
            **row_extents(0, tokens if z else 0, _ROW, z=z_step),
            "b": _numbers(tokens, b_step, states, b_gap, groups),
            "c": _numbers(tokens, c_step, states, c_gap, groups),
            **each((0, _ROW * states), "a", "state"),
            "skip": (0, _ROW if skip else 0),
            "bias": (0, _ROW if bias else 0),
            "saved": rows_of(0, -(-tokens // chunk) if saved else 0, saved_step, _ROW * states),
            "scratch": (0, _ROW * min(chunk, tokens) if soft or bias else 0),
        }

    @kernel(extents)
    def scan_forward(  # type: ignore[no-untyped-def]
        u, u_step, delta, delta_step, b, b_step, c, c_step, z, z_step, y, y_step,
        a, skip, bias, soft, state, saved, saved_step, chunk, tokens, scratch, b_gap, c_gap,
    ):  # fmt: skip
        """Advance `state` (N rows) over `tokens` tokens and write y.

        z, skip and bias are 0 where there is none; `soft` is 1 to apply softplus; with `saved` not 0, the states
        before every `chunk`-th token are kept there, `saved_step` bytes apart. `scratch` holds a chunk's dt: chunk
        rows. Steps and gates have loops of their own: in the scan's they would push states out of registers.
        """
        zero = full(0.0, LANES)
        d_skip = load(skip, LANES) if skip != 0 else zero
        d_bias = load(bias, LANES) if bias != 0 else zero
        h = load_rows(state, states, LANES)
        for start in range(0, tokens, chunk):
            stop = min(start + chunk, tokens)
            if saved != 0:
                store_rows(saved, h)
                saved += saved_step
            ds, ds_step = delta + start * delta_step, delta_step
            if soft != 0 or bias != 0:
                _steps(delta, delta_step, d_bias, soft, start, stop, scratch)
                ds, ds_step = scratch, _ROW
            for t in range(start, stop):
                u_t = load(u + t * u_step, LANES)
                d = load(ds + (t - start) * ds_step, LANES)
                h, total = advance_groups(h, d, d * u_t, a, b + t * b_step, c + t * c_step, b_gap, c_gap, groups)
                store(y + t * y_step, fma(d_skip, u_t, total))
            if z != 0:
                for t in range(start, stop):
                    z_t = load(z + t * z_step, LANES)
                    store(y + t * y_step, load(y + t * y_step, LANES) * (z_t * sigmoid(z_t, LANES)))
        store_rows(state, h)

    return scan_forward


@cache
def summary_kernel(states: int, groups: int = 1) -> Callable[..., Any]:
    """The kernel that says what a part of the tokens does to the states, for N = `states`."""

    def extents(
        u_step: int, delta_step: int, b_step: int, bias: int, chunk: int, tokens: int, b_gap: int
    ) -> dict[str, Extent]:
        return {
            **row_extents(0, tokens, _ROW, u=u_step, delta=delta_step),
            "b": _numbers(tokens, b_step, states, b_gap, groups),
            **each((0, _ROW * states), "a", "state"),
            "bias": (0, _ROW if bias else 0),
            "steps": (0, _ROW),
            "scratch": (0, _ROW * min(chunk, tokens)),
        }

    @kernel(extents)
    def scan_summary(  # type: ignore[no-untyped-def]
        u, u_step, delta, delta_step, b, b_step, a, bias, soft, state, steps, chunk, tokens, scratch, b_gap,
    ):  # fmt: skip
        """Write the states (N rows) that `tokens` tokens leave when they begin with zeros, and the sum of their dt.

        Whatever they begin with, h, they leave exp2(a * sum of dt) * h + these states. The sum is taken chunk by
        chunk, which keeps its rounding small.
        """
        zero = full(0.0, LANES)
        d_bias = load(bias, LANES) if bias != 0 else zero
        h = load_rows(state, states, LANES)
        total = zero
        for start in range(0, tokens, chunk):
            stop = min(start + chunk, tokens)
            _steps(delta, delta_step, d_bias, soft, start, stop, scratch)
            part = zero
            for t in range(start, stop):
                d = load(scratch + (t - start) * _ROW, LANES)
                part = part + d
                h = absorb(h, d, d * load(u + t * u_step, LANES), a, b + t * b_step, b_gap, groups)
            total = total + part
        store_rows(state, h)
        store(steps, total)

    return scan_summary


@cache
def backward_kernel(states: int, groups: int = 1) -> Callable[..., Any]:
    """The backward kernel for N = `states` and so many groups in a tile."""
    rows = _ROW * states
    sums = 4 * states * groups

    def extents(
        u_step: int, delta_step: int, b_step: int, c_step: int, z: int, z_step: int, dy_step: int, skip: int, bias: int,
        saved_step: int, chunk: int, tokens: int, du_step: int, ddelta_step: int, dz_step: int, b_gap: int, c_gap: int,
    ) -> dict[str, Extent]:  # fmt: skip
        return {
            **row_extents(0, tokens, _ROW, u=u_step, delta=delta_step, dy=dy_step, du=du_step, ddelta=ddelta_step),
            **row_extents(0, tokens if z else 0, _ROW, z=z_step, dz=dz_step),
            "b": _numbers(tokens, b_step, states, b_gap, groups),
            "c": _numbers(tokens, c_step, states, c_gap, groups),
            "skip": (0, _ROW if skip else 0),
            "bias": (0, _ROW if bias else 0),
            "saved": rows_of(0, -(-tokens // chunk), saved_step, _ROW * states),
            **each((0, 4 * states * groups * tokens), "db", "dc"),
            **each((0, _ROW * states), "a", "carry", "da"),
            **each((0, _ROW), "dskip", "dbias"),
            "scratch": (0, 4 * scratch_floats(states, chunk)),
        }

    @kernel(extents)
    def scan_backward(  # type: ignore[no-untyped-def]
        u, u_step, delta, delta_step, b, b_step, c, c_step, z, z_step, dy, dy_step,
        a, skip, bias, soft, saved, saved_step, chunk, tokens,
        du, du_step, ddelta, ddelta_step, dz, dz_step, db, dc, carry, da, dskip, dbias, scratch,
        b_gap, c_gap,
    ):  # fmt: skip
        """Sweep a segment of tokens (its first one at a chunk's start) from last to first.

        `carry` (N rows) comes in as the gradient of the states after the segment and leaves as that of the states
        before it; da (N rows), dskip and dbias (one row) are added to; db and dc (tokens, groups, N) are written: sums
        over this tile alone. `scratch` holds a chunk's states (chunk + 1 times N rows), decays (chunk times N rows), dt
        and the gradient before the gate (chunk rows each) and N rows of da.
        """
        zero = full(0.0, LANES)
        one = full(1.0, LANES)
        d_skip = load(skip, LANES) if skip != 0 else zero
        d_bias = load(bias, LANES) if bias != 0 else zero
        skip_sum = zero
        bias_sum = zero
        hs = scratch
        xs = hs + (chunk + 1) * rows
        ds = xs + chunk * rows
        inner = ds + chunk * _ROW
        da_sum = inner + chunk * _ROW
        for n in range(states):
            store(da_sum + n * _ROW, zero)
        g = load_rows(carry, states, LANES)
        number = (tokens + chunk - 1) // chunk
        for k in range(number - 1, -1, -1):
            start = k * chunk
            stop = min(start + chunk, tokens)
            _steps(delta, delta_step, d_bias, soft, start, stop, ds)
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
                d = load(ds + i * _ROW, LANES)
                du_t = d * load(u + t * u_step, LANES)
                h = record(h, d, du_t, a, b + t * b_step, hs + (i + 1) * rows, xs + i * rows, b_gap, groups)
            for t in range(stop - 1, start - 1, -1):
                i = t - start
                d = load(ds + i * _ROW, LANES)
                u_t = load(u + t * u_step, LANES)
                out = load(inner + i * _ROW, LANES)
                g, sum_a, sum_b, sum_c = retreat(
                    g, d, d * u_t, out, a, b + t * b_step, c + t * c_step,
                    hs + (i + 1) * rows, hs + i * rows, xs + i * rows, da_sum,
                    db + t * sums, dc + t * sums, b_gap, c_gap, groups,
                )  # fmt: skip
                if z != 0:
                    store(dz + t * dz_step, load(dz + t * dz_step, LANES) * fma(d_skip, u_t, sum_c))
                store(du + t * du_step, fma(d, sum_b, d_skip * out))
                skip_sum = fma(out, u_t, skip_sum)
                store(ddelta + t * ddelta_step, fma(u_t, sum_b, full(LN2, LANES) * sum_a))
            for t in range(start, stop):
                dd = load(ddelta + t * ddelta_step, LANES)
                if soft != 0:
                    dd = dd * sigmoid(load(delta + t * delta_step, LANES) + d_bias, LANES)
                    store(ddelta + t * ddelta_step, dd)
                bias_sum = bias_sum + dd
        store_rows(carry, g)
        for n in range(states):
            at = da + n * _ROW
            store(at, load(at, LANES) + load(da_sum + n * _ROW, LANES))
        store(dskip, load(dskip, LANES) + skip_sum)
        store(dbias, load(dbias, LANES) + bias_sum)

    return scan_backward


@cache
def sum_kernel(states: int) -> Callable[..., Any]:
    """The kernel that adds the tiles' shares of dB or dC for N = `states`."""

    def extents(part_step: int, tiles: int, out_step: int, first: int, last: int) -> dict[str, Extent]:
        low, high = rows_of(first, last, 4 * states, 4 * states)
        parts = (low, high + (tiles - 1) * part_step if high else 0)
        return {"parts": parts, "out": rows_of(first, last, out_step, 4 * states)}

    @kernel(extents)
    def scan_sum(parts, part_step, tiles, out, out_step, first, last):  # type: ignore[no-untyped-def]
        """out[t] = sum over tiles, in order, of parts[tile][t] for tokens first..last-1; N floats per token."""
        for t in range(first, last):
            total = load(parts + t * (4 * states), states)
            for tile in range(1, tiles):
                total = total + load(parts + tile * part_step + t * (4 * states), states)
            store(out + t * out_step, total)

    return scan_sum


def scratch_floats(states: int, chunk: int) -> int:
    """Floats of scratch memory that a thread's backward kernel needs."""
    return LANES * (states * (2 * chunk + 1) + 2 * chunk + states)
