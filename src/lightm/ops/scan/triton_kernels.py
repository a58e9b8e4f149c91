"""Triton kernels of the selective scan: equations in `ops/README.md`, launches and memory in `gpu.py`.

The tokens are cut into chunks. A chunk is one affine map of the state, h -> decay * h + end, with
decay = exp(A * sum of dt), so that chunks run side by side: `end_kernel` finds every chunk's end from a zero state,
`carry_kernel` passes the state over the chunks, `forward_kernel` runs each chunk again from its true first state.
Backward is the same in reverse for the gradient of the state: `triton_backward.py`.

One program is one warp and takes one chunk of `BLOCK_E` channels of one group: no barrier between warps, no atomics,
every sum in a fixed order. Padded channels, states and tokens are read as zeros, which leave the state as it is.
Tensors are addressed as base + index * stride in 64 bits. `a` is (E, N) by its strides, fastest with the channels side
by side; strides of absent tensors are 0.

Triton spreads a tile over the warp as its reads and writes are laid out in memory, not as the arithmetic wants it.
Tiles are (N, BLOCK_E) with one channel per lane and all its states in the lane's registers: sums over states need no
exchange, and tokens no shared memory. `multiple_of(e, 1)` asks for that: it keeps Triton from giving a lane four
neighbouring channels to read at once. `backward_kernel`, which sums over channels too, differs.
"""

# ruff: noqa: RUF005  (Triton adds tuples, it does not unpack them)
# mypy: ignore-errors
# (a kernel's arguments are pointers and numbers of the compiled program: Python's types do not describe them)

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

INTERPRETED = not isinstance(tl.sum, triton.JITFunction)
"""Whether TRITON_INTERPRET=1 was set when Triton was imported: the kernels then run on the CPU, in Python."""


@triton.jit
def step(raw, there, SOFTPLUS: tl.constexpr):
    """dt from delta + bias; 0 where no token or channel is."""
    if SOFTPLUS:
        # log(1 + s) * s / ((1 + s) - 1) is log1p(s): the rounding error of 1 + s cancels
        s = tl.exp(-tl.abs(raw))
        near = 1.0 + s
        log1p = tl.where(near == 1.0, s, tl.log(near) * s / tl.where(near == 1.0, 1.0, near - 1.0))
        raw = tl.maximum(raw, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p
    return tl.where(there, raw, 0.0)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def read(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def locate(item, chunks, blocks, group_blocks, of_group):
    """(batch entry, chunk, group, block within the group, first channel) of a numbered work item."""
    block = item % blocks
    rest = item // blocks
    group = block // group_blocks
    within = block % group_blocks
    return rest // chunks, rest % chunks, group, within, group * of_group


@triton.jit
def tile(
    a, a_e, a_n, bias, bias_e, chunks, blocks, group_blocks, of_group, states,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """This program's tile, one channel per lane.

    Returns (batch entry, chunk, group, channels e, which of them exist, states n, which of them exist, which pairs of
    both exist, A * log2(e), bias).
    """
    entry, index, group, within, channel = locate(tl.program_id(0).to(tl.int64), chunks, blocks, group_blocks, of_group)
    inner = within * BLOCK_E + tl.arange(0, BLOCK_E)
    live = inner < of_group
    e = tl.multiple_of(channel + inner, 1)  # one channel per lane, see the module's text
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    kept = n < states
    both = kept[:, None] & live[None, :]
    rate = read(a + n[:, None] * a_n + e[None, :] * a_e, both) * LOG2E
    shift = tl.full((BLOCK_E,), 0.0, tl.float32)
    if bias is not None:
        shift = read(bias + e * bias_e, live)
    return entry, index, group, e, live, n, kept, both, rate, shift


@triton.jit
def end_kernel(
    u, u_b, u_t, u_e, delta, d_b, d_t, d_e, a, a_e, a_n, b, b_b, b_t, b_g, b_n, bias, bias_e,
    ends, sums, length, chunk, count, chunks, channels, blocks, group_blocks, of_group, states,
    SOFTPLUS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Of chunks 0 .. count - 1: ends (Bt, chunks, N, E) from a zero state, sums (Bt, chunks, E) of dt."""
    entry, index, group, e, live, n, kept, both, rate, shift = tile(
        a, a_e, a_n, bias, bias_e, count, blocks, group_blocks, of_group, states, BLOCK_E, BLOCK_N
    )
    u_at = u + entry * u_b + e * u_e
    d_at = delta + entry * d_b + e * d_e
    b_at = b + entry * b_b + group * b_g + n * b_n
    h = tl.full((BLOCK_N, BLOCK_E), 0.0, tl.float32)
    total = tl.full((BLOCK_E,), 0.0, tl.float32)
    first = index * chunk  # never the last chunk: all its tokens are there
    for token in range(first, first + chunk, UNROLL):
        for i in tl.static_range(UNROLL):
            t = token + i
            dt = step(read(d_at + t * d_t, live) + shift, live, SOFTPLUS)
            x = read(u_at + t * u_t, live)
            b_row = read(b_at + t * b_t, kept)
            h = tl.exp2(dt[None, :] * rate) * h + b_row[:, None] * (dt * x)[None, :]
            total += dt
    base = entry * chunks + index
    tl.store(ends + (base * states + n)[:, None] * channels + e[None, :], h, mask=both)
    tl.store(sums + base * channels + e, total, mask=live)


@triton.jit
def carry_kernel(
    ends, sums, a, a_e, a_n, begin, begin_b, begin_e, begin_n, chunks, channels, size, programs,
    REVERSE: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Replace every chunk's end (Bt, chunks, N, E), in order, by the state that arrives at the chunk."""
    program = tl.program_id(0).to(tl.int64)
    entry = program // programs
    place = (program % programs) * BLOCK + tl.arange(0, BLOCK)
    live = place < size
    n = place // channels
    e = place % channels
    rate = read(a + n * a_n + e * a_e, live) * LOG2E
    state = tl.full((BLOCK,), 0.0, tl.float32)
    if begin is not None:
        state = read(begin + entry * begin_b + e * begin_e + n * begin_n, live)
    for start in range(0, chunks, UNROLL):
        found = ()
        decays = ()
        for i in tl.static_range(UNROLL):  # all reads before the dependent steps
            there = live & (start + i < chunks - 1)  # nothing is carried out of the last one, nor written there
            base = entry * chunks + ((chunks - 1 - start - i) if REVERSE else (start + i))
            found = found + (read(ends + base * size + place, there),)
            decays = decays + (tl.exp2(read(sums + base * channels + e, there) * rate),)
        for i in tl.static_range(UNROLL):
            base = entry * chunks + ((chunks - 1 - start - i) if REVERSE else (start + i))
            tl.store(ends + base * size + place, state, mask=live & (start + i < chunks))
            # a decay may overflow where A * dt > 0: a state of zero stays zero all the same
            state = tl.where(state == 0.0, 0.0, decays[i] * state) + found[i]


@triton.jit
def forward_kernel(
    u, u_b, u_t, u_e, delta, d_b, d_t, d_e, a, a_e, a_n, b, b_b, b_t, b_g, b_n, c, c_b, c_t, c_g, c_n,
    skip, skip_e, z, z_b, z_t, z_e, bias, bias_e, starts, y, last,
    length, chunk, chunks, channels, blocks, group_blocks, of_group, states,
    SOFTPLUS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """y (Bt, L, E) of every chunk from its starts (Bt, chunks, N, E); last (Bt, N, E) from the last chunk."""
    entry, index, group, e, live, n, kept, both, rate, shift = tile(
        a, a_e, a_n, bias, bias_e, chunks, blocks, group_blocks, of_group, states, BLOCK_E, BLOCK_N
    )
    direct = tl.full((BLOCK_E,), 0.0, tl.float32)
    if skip is not None:
        direct = read(skip + e * skip_e, live)
    u_at = u + entry * u_b + e * u_e
    d_at = delta + entry * d_b + e * d_e
    b_at = b + entry * b_b + group * b_g + n * b_n
    c_at = c + entry * c_b + group * c_g + n * c_n
    z_at = u_at
    if z is not None:
        z_at = z + entry * z_b + e * z_e
    y_at = y + entry * length * channels + e
    base = entry * chunks + index
    h = read(starts + (base * states + n)[:, None] * channels + e[None, :], both)
    first = index * chunk
    stop = tl.minimum(first + chunk, length)
    for token in range(first, stop, UNROLL):
        rows = ()
        for i in tl.static_range(UNROLL):
            t = token + i
            there = live & (t < stop)
            dt = step(read(d_at + t * d_t, there) + shift, there, SOFTPLUS)
            x = read(u_at + t * u_t, there)
            b_row = read(b_at + t * b_t, kept & (t < stop))
            c_row = read(c_at + t * c_t, kept & (t < stop))
            h = tl.exp2(dt[None, :] * rate) * h + b_row[:, None] * (dt * x)[None, :]
            row = tl.sum(h * c_row[:, None], axis=0) + direct * x
            if z is not None:
                gate = read(z_at + t * z_t, there)
                row = row * (gate * sigmoid(gate))
            rows = rows + (row,)
        for i in tl.static_range(UNROLL):  # a store between the reads would hold the next ones back
            t = token + i
            tl.store(y_at + t * channels, rows[i].to(y.dtype.element_ty), mask=live & (t < stop))
    if index == chunks - 1:
        tl.store(last + (entry * states + n)[:, None] * channels + e[None, :], h, mask=both)
