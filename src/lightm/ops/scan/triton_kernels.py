"""Triton kernels of the selective scan: equations in `ops/README.md`, launches and memory in `gpu.py`.

The tokens are cut into chunks. A chunk is one affine map of the state, h -> decay * h + end, with
decay = exp(A * sum of dt), so that chunks run side by side: `end_kernel` finds every chunk's end from a zero state,
`carry_kernel` passes the state over the chunks, `forward_kernel` runs each chunk again from its true first state.

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


# Backward: S, the gradient of the state before a token, runs from the last token to the first: S = x * (g * C + S'),
# S' the next token's. `grad_end_kernel` finds what every chunk adds to it, `carry_kernel` passes it over the chunks,
# and `backward_kernel` recomputes each chunk's states from its first one and writes all gradients.


@triton.jit
def grad_end_kernel(
    dy, dy_b, dy_t, dy_e, delta, d_b, d_t, d_e, a, a_e, a_n, c, c_b, c_t, c_g, c_n, z, z_b, z_t, z_e, bias, bias_e,
    ends, sums, length, chunk, count, chunks, channels, blocks, group_blocks, of_group, states,
    SOFTPLUS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Of chunks 1 .. count: what the chunk's own outputs add to its first state's gradient, and sums of dt."""
    entry, index, group, e, live, n, kept, both, rate, shift = tile(
        a, a_e, a_n, bias, bias_e, count, blocks, group_blocks, of_group, states, BLOCK_E, BLOCK_N
    )
    index += 1
    dy_at = dy + entry * dy_b + e * dy_e
    d_at = delta + entry * d_b + e * d_e
    c_at = c + entry * c_b + group * c_g + n * c_n
    z_at = d_at
    if z is not None:
        z_at = z + entry * z_b + e * z_e
    s = tl.full((BLOCK_N, BLOCK_E), 0.0, tl.float32)
    total = tl.full((BLOCK_E,), 0.0, tl.float32)
    first = index * chunk
    stop = tl.minimum(first + chunk, length)
    for done in range(0, stop - first, UNROLL):
        for i in tl.static_range(UNROLL):
            t = stop - 1 - done - i
            there = live & (t >= first)
            dt = step(read(d_at + t * d_t, there) + shift, there, SOFTPLUS)
            g = read(dy_at + t * dy_t, there)
            if z is not None:
                gate = read(z_at + t * z_t, there)
                g = g * (gate * sigmoid(gate))
            c_row = read(c_at + t * c_t, kept & (t >= first))
            s = tl.exp2(dt[None, :] * rate) * (s + c_row[:, None] * g[None, :])
            total += dt
    base = entry * chunks + index
    tl.store(ends + (base * states + n)[:, None] * channels + e[None, :], s, mask=both)
    tl.store(sums + base * channels + e, total, mask=live)


@triton.jit
def backward_kernel(
    dy, dy_b, dy_t, dy_e, u, u_b, u_t, u_e, delta, d_b, d_t, d_e, a, a_e, a_n, b, b_b, b_t, b_g, b_n,
    c, c_b, c_t, c_g, c_n, skip, skip_e, z, z_b, z_t, z_e, bias, bias_e,
    starts, arriving, scratch, du, ddelta, dz, db, dc, da, dskip, dbias, dbegin,
    items, length, chunk, chunks, channels, blocks, group_blocks, groups, of_group, states,
    SOFTPLUS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """All gradients of every chunk from its starts and the gradient of its last state (both (Bt, chunks, N, E)).

    The states before every UNROLL-th token go to the program's own scratch, those between stay in registers. Written:
    du, ddelta, dz (Bt, L, E); db, dc (blocks of a group, Bt, L, G, N) and da (Bt, chunks, N, E), dskip, dbias
    (Bt, chunks, E), to be summed; dbegin (Bt, N, E).
    """
    WIDTH: tl.constexpr = 8 if BLOCK_E >= 8 else BLOCK_E
    EACH: tl.constexpr = BLOCK_E // WIDTH
    ROWS: tl.constexpr = BLOCK_N * WIDTH
    # A tile is (N, WIDTH, EACH), channel = EACH * second + third, so that with 32 channels and 16 states a lane holds
    # 4 states of 4 channels and a warp is 4 x 8 lanes: the sums over states (2 exchanges) and channels (3) are then the
    # cheapest together. Tiles are read and written as (N * WIDTH, EACH): that is how Triton comes to spread them so.
    across = tl.arange(0, WIDTH)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    flat_row = tl.arange(0, ROWS)[:, None]
    flat_n = (flat_row // WIDTH).to(tl.int64)
    flat_across = flat_row % WIDTH * EACH + tl.arange(0, EACH)[None, :]
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    kept = n < states
    programs = tl.num_programs(0)
    slot = tl.program_id(0).to(tl.int64)
    own = scratch + slot * (chunk // UNROLL) * (BLOCK_E * BLOCK_N) + flat_row * EACH + tl.arange(0, EACH)[None, :]
    for item in range(slot, items, programs):
        entry, index, group, within, channel = locate(item, chunks, blocks, group_blocks, of_group)
        inner = within * BLOCK_E + across
        live = inner < of_group
        e = channel + inner
        flat_e = channel + within * BLOCK_E + flat_across
        both = (within * BLOCK_E + flat_across < of_group) & (flat_n < states)
        rate = tl.reshape(read(a + flat_n * a_n + flat_e * a_e, both), (BLOCK_N, WIDTH, EACH)) * LOG2E
        shift = tl.full((WIDTH, EACH), 0.0, tl.float32)
        direct = tl.full((WIDTH, EACH), 0.0, tl.float32)
        if bias is not None:
            shift = read(bias + e * bias_e, live)
        if skip is not None:
            direct = read(skip + e * skip_e, live)
        u_at = u + entry * u_b + e * u_e
        d_at = delta + entry * d_b + e * d_e
        dy_at = dy + entry * dy_b + e * dy_e
        b_at = b + entry * b_b + group * b_g + n * b_n
        c_at = c + entry * c_b + group * c_g + n * c_n
        z_at = u_at
        if z is not None:
            z_at = z + entry * z_b + e * z_e
        rows_at = entry * length * channels + e
        parts_at = (((within * (items // (chunks * blocks)) + entry) * length) * groups + group) * states + n
        base = entry * chunks + index
        states_at = (base * states + flat_n) * channels + flat_e
        first = index * chunk
        stop = tl.minimum(first + chunk, length)
        segments = (stop - first + UNROLL - 1) // UNROLL

        h = tl.reshape(read(starts + states_at, both), (BLOCK_N, WIDTH, EACH))
        for segment in range(0, segments):
            tl.store(own + segment * (BLOCK_E * BLOCK_N), tl.reshape(h, (ROWS, EACH)))
            for i in tl.static_range(UNROLL):
                t = first + segment * UNROLL + i
                there = live & (t < stop)
                dt = step(read(d_at + t * d_t, there) + shift, there, SOFTPLUS)
                x = read(u_at + t * u_t, there)
                b_row = read(b_at + t * b_t, kept & (t < stop))
                h = tl.exp2(dt[None] * rate) * h + b_row[:, None, None] * (dt * x)[None]
        tl.debug_barrier()  # what one lane wrote another may read

        s = tl.reshape(read(arriving + states_at, both), (BLOCK_N, WIDTH, EACH))
        da_sum = tl.full((BLOCK_N, WIDTH, EACH), 0.0, tl.float32)
        dskip_sum = tl.full((WIDTH, EACH), 0.0, tl.float32)
        dbias_sum = tl.full((WIDTH, EACH), 0.0, tl.float32)
        for done in range(0, segments):
            segment = segments - 1 - done
            h = tl.reshape(tl.load(own + segment * (BLOCK_E * BLOCK_N)), (BLOCK_N, WIDTH, EACH))
            before = (h,)
            for i in tl.static_range(UNROLL):
                t = first + segment * UNROLL + i
                there = live & (t < stop)
                dt = step(read(d_at + t * d_t, there) + shift, there, SOFTPLUS)
                x = read(u_at + t * u_t, there)
                b_row = read(b_at + t * b_t, kept & (t < stop))
                h = tl.exp2(dt[None] * rate) * h + b_row[:, None, None] * (dt * x)[None]
                before = before + (h,)
            for back in tl.static_range(UNROLL):
                t = first + segment * UNROLL + (UNROLL - 1 - back)
                there = live & (t < stop)
                kept_there = kept & (t < stop)
                raw = read(d_at + t * d_t, there) + shift
                dt = step(raw, there, SOFTPLUS)
                x = read(u_at + t * u_t, there)
                b_row = read(b_at + t * b_t, kept_there)
                c_row = read(c_at + t * c_t, kept_there)
                g = read(dy_at + t * dy_t, there)
                if z is not None:
                    gate = read(z_at + t * z_t, there)
                    part = sigmoid(gate)
                    row = tl.sum(before[UNROLL - back] * c_row[:, None, None], axis=0) + direct * x
                    dgate = g * row * part * (1.0 + gate * (1.0 - part))
                    tl.store(dz + rows_at + t * channels, dgate.to(dz.dtype.element_ty), mask=there)
                    g = g * (gate * part)
                decay = tl.exp2(dt[None] * rate)
                total = s + c_row[:, None, None] * g[None]
                s = decay * total
                q = s * before[UNROLL - 1 - back]
                from_b = tl.sum(total * b_row[:, None, None], axis=0)
                from_decay = tl.sum(q * rate, axis=0) * LN2
                dx = dt * from_b + direct * g
                draw = x * from_b + from_decay
                if SOFTPLUS:
                    draw = draw * sigmoid(raw)
                draw = tl.where(there, draw, 0.0)
                tl.store(du + rows_at + t * channels, dx.to(du.dtype.element_ty), mask=there)
                tl.store(ddelta + rows_at + t * channels, draw.to(ddelta.dtype.element_ty), mask=there)
                db_row = tl.sum(tl.sum(total * (dt * x)[None], axis=2), axis=1)
                dc_row = tl.sum(tl.sum(before[UNROLL - back] * g[None], axis=2), axis=1)
                tl.store(db + parts_at + t * (groups * states), db_row, mask=kept_there)
                tl.store(dc + parts_at + t * (groups * states), dc_row, mask=kept_there)
                da_sum += dt[None] * q
                dskip_sum += g * x
                dbias_sum += draw
        tl.debug_barrier()  # the next item writes the scratch again
        tl.store(da + states_at, tl.reshape(da_sum, (ROWS, EACH)), mask=both)
        tl.store(dskip + base * channels + e, dskip_sum, mask=live)
        tl.store(dbias + base * channels + e, dbias_sum, mask=live)
        if index == 0:
            tl.store(dbegin + (entry * states + flat_n) * channels + flat_e, tl.reshape(s, (ROWS, EACH)), mask=both)
