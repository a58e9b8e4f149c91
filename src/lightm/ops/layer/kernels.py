"""Kernels of a whole state-space layer: what comes before the scan of a chunk of tokens, and what comes after it.

Addresses point to float32 data; `*_row` is in bytes from one token to the next. Tokens are numbered in the order of
the scan; the rows of the image that they lie in follow by index arithmetic from (base, n1, n2, s0, s1, s2): token
(i0 * n1 + i1) * n2 + i2 is row base + i0 * s0 + i1 * s1 + i2 * s2.
"""

from __future__ import annotations

import numpy as np

from lightm.ops.bounds import NOTHING, Extent, each
from lightm.ops.jit import LANES, device_function, kernel
from lightm.ops.matmul_cpu import SCRATCH, multiply, multiply_extents
from lightm.ops.vector import fma, full, get, load, put, store
from lightm.ops.vector_math import lane_moments, moments, sigmoid, softplus

HALF = LANES // 2
BLOCK = 192
"""Tokens of one call: their intermediate rows stay in the first cache levels."""


@device_function
def _row_of(t, base, n1, n2, s0, s1, s2):  # type: ignore[no-untyped-def]
    """The image's row of token t."""
    i2 = t % n2
    rest = t // n2
    return base + (rest // n1) * s0 + (rest % n1) * s1 + i2 * s2


@device_function
def _normalise(x, out, channels, weight, bias, eps):  # type: ignore[no-untyped-def]
    """LayerNorm of one row."""
    mean, inverse = moments(x, channels, eps)
    for c in range(0, channels, LANES):
        left = channels - c
        normed = (get(x + 4 * c, left) - mean) * inverse
        put(out + 4 * c, fma(normed, get(weight + 4 * c, left), get(bias + 4 * c, left)), left)


def _image_rows(begin: int, end: int, order: tuple[int, ...], row: int) -> Extent:
    """The extent of the image's rows of tokens begin..end-1."""
    if begin >= end:
        return NOTHING
    base, n1, n2, s0, s1, s2 = order
    t = np.arange(begin, end)
    places = base + t // n2 // n1 * s0 + t // n2 % n1 * s1 + t % n2 * s2
    return int(places.min()) * row, (int(places.max()) + 1) * row


def _matmul_extents(
    name: str, plan: int, blocks: int, out_row: int, tokens: int
) -> tuple[dict[str, Extent], Extent, Extent]:
    """(extents of the weights of a matmul named by its prefix, the rows it reads, the rows it writes)."""
    found = multiply_extents(plan, blocks, 0, out_row, tokens)
    zero = {"dt": "dt_bias", "p": "p_bias"}.get(name, f"{name}_zero")
    weights = {f"{name}_plan": found["plan"], f"{name}_weight": found["w"], zero: found["bias"]}
    return weights, found["a"], found["out"]


def _before_extents(
    channels: int, base: int, n1: int, n2: int, s0: int, s1: int, s2: int, x_plan: int, x_blocks: int, z_plan: int,
    z_blocks: int, d_conv: int, inner: int, m_plan: int, m_blocks: int, low: int, dt_plan: int, dt_blocks: int,
    begin: int, end: int, numbers_row: int,
) -> dict[str, Extent]:  # fmt: skip
    tokens, row, wide = end - begin, 4 * channels, 4 * inner
    of_x, _, _ = _matmul_extents("x", x_plan, x_blocks, wide, tokens)
    of_z, _, _ = _matmul_extents("z", z_plan, z_blocks, wide, tokens)
    of_m, _, made = _matmul_extents("m", m_plan, m_blocks, numbers_row, tokens)
    of_dt, (first, last), _ = _matmul_extents("dt", dt_plan, dt_blocks, wide, tokens)
    last_row = (tokens - 1) * numbers_row
    return {
        "x": _image_rows(max(begin - d_conv + 1, 0), end, (base, n1, n2, s0, s1, s2), row),
        **each((0, row), "norm_weight", "norm_bias"),
        **of_x,
        **of_z,
        "conv": (0, d_conv * wide),
        "conv_bias": (0, wide),
        **of_m,
        **of_dt,
        **each((0, tokens * wide), "u", "z", "d"),
        "numbers": (min(made[0], low + first), max(made[1], last_row + low + last)) if tokens else NOTHING,
        "scratch": (0, SCRATCH + (BLOCK + d_conv) * row + (min(BLOCK, tokens) + d_conv - 1) * wide),
    }


@kernel(_before_extents)
def before_scan(  # type: ignore[no-untyped-def]
    x, channels, base, n1, n2, s0, s1, s2, norm_weight, norm_bias, eps,
    x_plan, x_blocks, x_weight, x_zero, z_plan, z_blocks, z_weight, z_zero, conv, conv_bias, d_conv, inner,
    m_plan, m_blocks, m_weight, m_zero, low, dt_plan, dt_blocks, dt_weight, dt_bias,
    begin, end, u, z, d, numbers, numbers_row, scratch,
):  # fmt: skip
    """Write u, z and dt (rows of `inner` channels) and B, C (rows of `numbers_row` bytes) of tokens begin..end-1.

    u = silu(causal convolution of x), (x, z) = LayerNorm(tokens) @ in_proj, (B, C, low) = u @ x_proj,
    dt = softplus(low @ dt_proj + bias); `low` is the offset in bytes of its numbers in their row. The convolution sees
    up to d_conv - 1 tokens before a block, whose x is computed again; before token 0 there is nothing, so 0.
    u, z, d and numbers are the rows of token `begin`.
    """
    row = 4 * channels
    wide = 4 * inner
    normed = scratch + SCRATCH
    for first in range(begin, end, BLOCK):
        last = min(first + BLOCK, end)
        halo = min(d_conv - 1, first)
        total = last - first + halo
        xs = normed + (BLOCK + d_conv) * row
        for i in range(total):
            at = x + row * _row_of(first - halo + i, base, n1, n2, s0, s1, s2)
            _normalise(at, normed + i * row, channels, norm_weight, norm_bias, eps)
        missing = d_conv - 1 - halo
        for i in range(missing):
            for c in range(0, inner, LANES):
                store(xs + i * wide + 4 * c, full(0.0, LANES))
        multiply(x_plan, x_blocks, normed, row, x_weight, x_zero, xs + missing * wide, wide, total, scratch)
        multiply(z_plan, z_blocks, normed + halo * row, row, z_weight, z_zero, z, wide, last - first, scratch)
        for c in range(0, inner, LANES):
            shift = load(conv_bias + 4 * c, LANES)
            for t in range(last - first):
                value = shift
                for k in range(d_conv):
                    value = fma(load(conv + k * wide + 4 * c, LANES), load(xs + (t + k) * wide + 4 * c, LANES), value)
                store(u + t * wide + 4 * c, value * sigmoid(value, LANES))
        multiply(m_plan, m_blocks, u, wide, m_weight, m_zero, numbers, numbers_row, last - first, scratch)
        multiply(dt_plan, dt_blocks, numbers + low, numbers_row, dt_weight, dt_bias, d, wide, last - first, scratch)
        for i in range(0, (last - first) * wide, 4 * LANES):
            store(d + i, softplus(load(d + i, LANES), LANES))
        u += (last - first) * wide
        z += (last - first) * wide
        d += (last - first) * wide
        numbers += (last - first) * numbers_row


@device_function
def _gate(y, z, out, inner, width, weight, bias, eps):  # type: ignore[no-untyped-def]
    """LayerNorm of each part of `width` channels (half a vector, or whole ones; 0: none), times silu(z), of one row."""
    if width == 0:
        for c in range(0, inner, LANES):
            gate = load(z + 4 * c, LANES)
            store(out + 4 * c, load(y + 4 * c, LANES) * (gate * sigmoid(gate, LANES)))
    elif width <= LANES:
        for c in range(0, 4 * inner, 4 * LANES):
            values = load(y + c, LANES)
            far, inverse = lane_moments(values, eps, LANES) if width == LANES else lane_moments(values, eps, HALF)
            gate = load(z + c, LANES)
            value = fma(far * inverse, load(weight + c, LANES), load(bias + c, LANES))
            store(out + c, value * (gate * sigmoid(gate, LANES)))
    else:
        for part in range(0, inner, width):
            mean, inverse = moments(y + 4 * part, width, eps)
            for k in range(0, width, LANES):
                c = 4 * (part + k)
                gate = load(z + c, LANES)
                value = fma((load(y + c, LANES) - mean) * inverse, load(weight + c, LANES), load(bias + c, LANES))
                store(out + c, value * (gate * sigmoid(gate, LANES)))


@device_function
def _finish_row(  # type: ignore[no-untyped-def]
    mixed, x, channels, norm_weight, norm_bias, eps, scale, of_norm, out_weight, out_bias, out_eps, spare
):
    """mixed = LayerNorm(mixed + scale * residual); the residual is x, or LayerNorm(x) if `of_norm`."""
    residual = x
    if of_norm != 0:
        _normalise(x, spare, channels, norm_weight, norm_bias, eps)
        residual = spare
    for c in range(0, channels, LANES):
        left = channels - c
        value = fma(get(residual + 4 * c, left), get(scale + 4 * c, left), get(mixed + 4 * c, left))
        put(mixed + 4 * c, value, left)
    _normalise(mixed, mixed, channels, out_weight, out_bias, out_eps)


def _after_extents(
    inner: int, width: int, o_plan: int, o_blocks: int, channels: int, base: int, n1: int, n2: int, s0: int, s1: int,
    s2: int, p_plan: int, p_blocks: int, mode: int, out_row: int, begin: int, end: int,
) -> dict[str, Extent]:  # fmt: skip
    tokens, row, wide = end - begin, 4 * channels, 4 * inner
    of_o, _, _ = _matmul_extents("o", o_plan, o_blocks, row, tokens)
    of_p, _, made = _matmul_extents("p", p_plan, p_blocks, out_row, tokens if mode == 0 else 0)
    places = _image_rows(begin, end, (base, n1, n2, s0, s1, s2), row)
    return {
        **each((0, tokens * wide), "y", "z"),
        **each((0, wide if width else 0), "gate_weight", "gate_bias"),
        **of_o,
        "x": places if mode == 0 else NOTHING,
        **each((0, row if mode == 0 else 0), "norm_weight", "norm_bias", "scale", "out_weight", "out_bias"),
        **of_p,
        "sums": NOTHING if mode == 0 else places,
        "out": made,
        "scratch": (0, SCRATCH + BLOCK * wide + (BLOCK + 1) * row),
    }


@kernel(_after_extents)
def after_scan(  # type: ignore[no-untyped-def]
    y, z, inner, width, gate_weight, gate_bias, gate_eps, o_plan, o_blocks, o_weight, o_zero,
    x, channels, base, n1, n2, s0, s1, s2, norm_weight, norm_bias, eps, scale, of_norm, out_weight, out_bias, out_eps,
    p_plan, p_blocks, p_weight, p_bias, mode, sums, out, out_row, begin, end, scratch,
):  # fmt: skip
    """From the scan's y (rows of `inner` channels) of tokens begin..end-1 to rows of the layer's result.

    mixed = (LayerNorm(y) * silu(z)) @ out_proj, then LayerNorm(mixed + scale * residual) @ projection + bias. With
    `mode` 0 all of it, to the image's rows of `out`; 1 and 2: mixed alone is written or added to the image's rows of
    `sums`, for several orders of the scan. y and z are the rows of token `begin`.
    """
    row = 4 * channels
    wide = 4 * inner
    gated = scratch + SCRATCH
    mixed = gated + BLOCK * wide
    spare = mixed + BLOCK * row
    for first in range(begin, end, BLOCK):
        last = min(first + BLOCK, end)
        for i in range(last - first):
            _gate(y + i * wide, z + i * wide, gated + i * wide, inner, width, gate_weight, gate_bias, gate_eps)
        multiply(o_plan, o_blocks, gated, wide, o_weight, o_zero, mixed, row, last - first, scratch)
        if mode == 0:
            for i in range(last - first):
                at = x + row * _row_of(first + i, base, n1, n2, s0, s1, s2)
                _finish_row(
                    mixed + i * row, at, channels, norm_weight, norm_bias, eps, scale, of_norm, out_weight, out_bias,
                    out_eps, spare,
                )  # fmt: skip
            # in this mode tokens are in raster order, so their rows follow each other
            multiply(p_plan, p_blocks, mixed, row, p_weight, p_bias, out, out_row, last - first, scratch)
        else:
            for i in range(last - first):
                at = sums + row * _row_of(first + i, base, n1, n2, s0, s1, s2)
                for c in range(0, channels, LANES):
                    left = channels - c
                    value = get(mixed + i * row + 4 * c, left)
                    put(at + 4 * c, value if mode == 1 else value + get(at + 4 * c, left), left)
        y += (last - first) * wide
        z += (last - first) * wide
        out += (last - first) * out_row


def _finish_extents(channels: int, p_plan: int, p_blocks: int, out_row: int, begin: int, end: int) -> dict[str, Extent]:
    row = 4 * channels
    of_p, _, made = _matmul_extents("p", p_plan, p_blocks, out_row, end - begin)
    return {
        **each((begin * row, end * row), "sums", "x"),
        **each((0, row), "norm_weight", "norm_bias", "scale", "out_weight", "out_bias"),
        **of_p,
        "out": made,
        "scratch": (0, SCRATCH + (BLOCK + 1) * row),
    }


@kernel(_finish_extents)
def finish(  # type: ignore[no-untyped-def]
    sums, x, channels, norm_weight, norm_bias, eps, scale, of_norm, out_weight, out_bias, out_eps,
    p_plan, p_blocks, p_weight, p_bias, out, out_row, begin, end, scratch,
):  # fmt: skip
    """The end of `after_scan` for rows begin..end-1 of the sums over the orders of the scan."""
    row = 4 * channels
    mixed = scratch + SCRATCH
    spare = mixed + BLOCK * row
    for first in range(begin, end, BLOCK):
        last = min(first + BLOCK, end)
        for i in range(last - first):
            at = (first + i) * row
            for c in range(0, channels, LANES):
                put(mixed + i * row + 4 * c, get(sums + at + 4 * c, channels - c), channels - c)
            _finish_row(
                mixed + i * row, x + at, channels, norm_weight, norm_bias, eps, scale, of_norm, out_weight, out_bias,
                out_eps, spare,
            )  # fmt: skip
        multiply(p_plan, p_blocks, mixed, row, p_weight, p_bias, out, out_row, last - first, scratch)
        out += (last - first) * out_row


def scratch_floats(channels: int, inner: int, d_conv: int) -> int:
    """Floats of scratch memory that a thread needs."""
    return SCRATCH // 4 + (BLOCK + d_conv) * channels + (BLOCK + d_conv) * inner + (BLOCK + 1) * channels
