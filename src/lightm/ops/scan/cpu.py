"""The selective scan on the CPU: the Numba kernels, spread over batch entries and tiles of channels."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightm.ops.bounds import address
from lightm.ops.jit import LANES
from lightm.ops.scan.inputs import ScanGradients, ScanInputs, ScanResults, check_chunk, gradient_of
from lightm.ops.scan.kernels import backward_kernel, forward_kernel, scratch_floats, sum_kernel, summary_kernel
from lightm.ops.scan.layout import SEGMENT, Layout
from lightm.ops.scan.parts import carry_states, cut, part_count
from lightm.ops.scan.results import RESULTS
from lightm.ops.threads import parallel_for, worker_count
from lightm.ops.vector_math import LOG2E

PASS = 64  # tokens that the forward kernel takes at a time when no states are kept
_TILE = 4 * LANES  # bytes of one row of a tile


def layout_of(inputs: ScanInputs) -> Layout:
    """How the kernels see these inputs."""
    u, B = inputs.u, inputs.B
    layout = Layout(u.shape[0], u.shape[1], u.shape[2], B.shape[2], B.shape[3])
    return replace(layout, paired=layout.can_pair)


def strided_address(x: Tensor | None) -> tuple[int, int, int]:
    """(address, bytes between batch entries, bytes between tokens); zeros for None."""
    return (0, 0, 0) if x is None else (address(x), 4 * x.stride(0), 4 * x.stride(1))


def _parameters(layout: Layout, A: Tensor, rows: tuple[Tensor | None, ...]) -> tuple[Tensor, list[Tensor | None]]:
    """A times log2(e) and the vectors over channels, in tiles."""
    tiled = [None if x is None else layout.tile_rows(x.unsqueeze(-1)) for x in rows]
    return layout.tile_states(A.float() * LOG2E), tiled


def run_forward(inputs: ScanInputs, chunk: int) -> ScanResults:
    """Run the scan; states before every `chunk`-th token are kept, none when chunk is 0."""
    u, delta, A, B, C, d_skip, z, delta_bias, delta_softplus, initial_state = inputs
    layout = layout_of(inputs)
    y = RESULTS.empty(u.shape, u.dtype)
    decay, (skip, bias) = _parameters(layout, A, (d_skip, delta_bias))
    state = torch.zeros(layout.state_shape) if initial_state is None else layout.tile_states(initial_state)
    saved = torch.empty(layout.saved_shape(chunk))
    number = saved.shape[2]
    rows = [x for x in (u, delta, z, y) if x is not None]
    in_place = all(map(layout.channels_in_place, rows)) and all(map(layout.numbers_in_place, (B, C)))
    segment = max(layout.length, 1) if in_place else SEGMENT
    run = forward_kernel(layout.kernel_states, layout.groups_of_tile)
    items = layout.batch * layout.tiles
    pass_tokens = chunk or PASS
    most_parts = part_count(items, torch.get_num_threads(), min(segment, layout.length))
    scratch = torch.empty((worker_count(items * most_parts), pass_tokens * LANES))
    skip_at, bias_at = strided_address(skip)[0], strided_address(bias)[0]
    state_bytes = 4 * layout.kernel_states * LANES

    def sweep(start: int, stop: int) -> None:
        u_rows, delta_rows = (layout.channel_rows(x, start, stop) for x in (u, delta))
        z_rows = None if z is None else layout.channel_rows(z, start, stop)
        b_rows, c_rows = (layout.number_rows(x, start, stop) for x in (B, C))
        y_rows = layout.row_buffer(y, start, stop)
        spots = [strided_address(x) for x in (u_rows, delta_rows, b_rows, c_rows, z_rows, y_rows)]
        group_bytes = (4 * b_rows.stride(2), 4 * c_rows.stride(2))

        def where(item: int, first: int) -> list[int]:
            """Addresses and steps of the rows of a tile from token `first` on."""
            entry, tile = divmod(item, layout.tiles)
            group = layout.first_group(tile)
            across = [tile * _TILE] * 2 + [group * size for size in group_bytes] + [tile * _TILE] * 2
            found: list[int] = []
            for (at, entry_step, step), offset in zip(spots, across, strict=True):
                found += [at + entry * entry_step + offset + first * step if at else 0, step]
            return found

        def vectors(item: int) -> tuple[int, int, int]:
            """Addresses of a tile's A, d_skip and delta_bias."""
            tile = item % layout.tiles
            return (
                address(decay) + tile * state_bytes,
                skip_at + tile * _TILE if skip_at else 0,
                bias_at + tile * _TILE if bias_at else 0,
            )

        def scan(item: int, worker: int, first: int, last: int, state_at: int) -> None:
            number_before = item * number + (start + first) // pass_tokens
            run(
                *where(item, first),
                *vectors(item),
                int(delta_softplus),
                state_at + item * state_bytes,
                address(saved) + number_before * state_bytes if chunk else 0,
                state_bytes,
                pass_tokens,
                last - first,
                address(scratch[worker]),
                *group_bytes,
            )

        parts = part_count(items, torch.get_num_threads(), stop - start)
        if parts == 1:
            parallel_for(lambda item, worker: scan(item, worker, 0, stop - start, address(state)), items)
            layout.finish_rows(y_rows, y, start, stop)
            return

        borders = cut(stop - start, parts, pass_tokens)
        sum_up = summary_kernel(layout.kernel_states, layout.groups_of_tile)
        alone = torch.zeros((parts - 2, *state.shape))
        steps = torch.empty((parts - 2, layout.batch, layout.tiles, 1, LANES))

        def first_round(index: int, worker: int) -> None:
            part, item = divmod(index, items)
            if part == 0:
                scan(item, worker, 0, borders[1], address(state))
                return
            rows = where(item, borders[part])
            a_at, _, own_bias = vectors(item)
            sum_up(
                *rows[:6],
                a_at,
                own_bias,
                int(delta_softplus),
                address(alone[part - 1]) + item * state_bytes,
                address(steps[part - 1]) + item * _TILE,
                pass_tokens,
                borders[part + 1] - borders[part],
                address(scratch[worker]),
                group_bytes[0],
            )

        parallel_for(first_round, items * (parts - 1))
        between = carry_states(state, alone, steps, decay)

        def second_round(index: int, worker: int) -> None:
            part, item = divmod(index, items)
            scan(item, worker, borders[part + 1], borders[part + 2], address(between[part]))

        parallel_for(second_round, items * (parts - 1))
        state.copy_(between[-1])
        layout.finish_rows(y_rows, y, start, stop)

    for start in range(0, layout.length, segment):
        sweep(start, min(start + segment, layout.length))
    return y, layout.untile_states(state), saved


def sum_tiles(layout: Layout, parts: Tensor, result: Tensor, start: int, stop: int) -> None:
    """Tokens start..stop-1 of dB or dC (Bt, L, G, N) from the tiles' shares (Bt, tiles, longest, kernel_states)."""
    n, tokens, block = layout.kernel_states, stop - start, 1024
    if layout.paired:  # one tile per group: nothing to add
        own = parts[:, :, :tokens].unflatten(-1, (2, n))[..., : layout.states]  # (Bt, tiles, tokens, 2, N)
        result[:, start:stop] = own.movedim(2, 1).reshape(layout.batch, tokens, layout.groups, layout.states)
        return
    in_place = layout.numbers_in_place(result)
    total = result[:, start:stop] if in_place else torch.empty((layout.batch, tokens, layout.groups, n))
    run = sum_kernel(n)
    blocks = -(-tokens // block)
    part_bytes = 4 * parts.stride(1)

    def work(item: int, worker: int) -> None:
        row, index = divmod(item, blocks)
        entry, group = divmod(row, layout.groups)
        first_tile = entry * layout.tiles + group * layout.tiles_of_group
        run(
            address(parts) + first_tile * part_bytes,
            part_bytes,
            layout.tiles_of_group,
            address(total) + 4 * (entry * total.stride(0) + group * n),
            4 * layout.groups * n,
            index * block,
            min((index + 1) * block, tokens),
        )

    parallel_for(work, layout.batch * layout.groups * blocks)
    if not in_place:
        result[:, start:stop] = total[..., : layout.states]


def run_backward(grad_y: Tensor, grad_state: Tensor, inputs: ScanInputs, chunk: int, saved: Tensor) -> ScanGradients:
    """Return the gradients of all inputs."""
    check_chunk("selective_scan", chunk)
    u, delta, A, B, C, d_skip, z, delta_bias, delta_softplus, initial_state = inputs
    layout = layout_of(inputs)
    decay, (skip, bias) = _parameters(layout, A, (d_skip, delta_bias))
    du, ddelta = torch.empty(u.shape, dtype=u.dtype), torch.empty(delta.shape, dtype=delta.dtype)
    dz = torch.empty(0) if z is None else torch.empty(z.shape, dtype=z.dtype)
    dB, dC = torch.empty(B.shape, dtype=B.dtype), torch.empty(C.shape, dtype=C.dtype)
    n = layout.kernel_states
    items = layout.batch * layout.tiles
    carry = layout.tile_states(grad_state)
    dA = torch.zeros((layout.batch, layout.tiles, n, LANES))
    dskip, dbias = (torch.zeros((layout.batch, layout.tiles, 1, LANES)) for _ in range(2))
    number = saved.shape[2]
    longest = min(SEGMENT, layout.length)
    sums = layout.groups_of_tile * n
    parts_b, parts_c = (torch.empty((layout.batch, layout.tiles, longest, sums)) for _ in range(2))
    scratch = torch.empty((worker_count(items), scratch_floats(n, chunk)))
    run = backward_kernel(n, layout.groups_of_tile)
    skip_at, bias_at = strided_address(skip)[0], strided_address(bias)[0]
    state_bytes = 4 * n * LANES

    def sweep(start: int, stop: int) -> None:
        tokens = stop - start
        rows = [layout.channel_rows(x, start, stop) for x in (u, delta)]
        rows += [layout.number_rows(x, start, stop) for x in (B, C)]
        z_rows = None if z is None else layout.channel_rows(z, start, stop)
        dy_rows = layout.channel_rows(grad_y, start, stop)
        outputs = [layout.row_buffer(x, start, stop) for x in (du, ddelta)]
        dz_rows = None if z is None else layout.row_buffer(dz, start, stop)
        spots_in = [strided_address(x) for x in (*rows, z_rows, dy_rows)]
        spots_out = [strided_address(x) for x in (*outputs, dz_rows)]
        group_bytes = [4 * x.stride(2) for x in rows[2:]]

        def work(item: int, worker: int) -> None:
            entry, tile = divmod(item, layout.tiles)
            group = layout.first_group(tile)
            across = [tile * _TILE] * 2 + [group * size for size in group_bytes] + [tile * _TILE] * 5
            where: list[int] = []
            for (at, entry_step, step), offset in zip(spots_in + spots_out, across, strict=True):
                where += [at + entry * entry_step + offset if at else 0, step]
            run(
                *where[:12],
                address(decay) + tile * state_bytes,
                skip_at + tile * _TILE if skip_at else 0,
                bias_at + tile * _TILE if bias_at else 0,
                int(delta_softplus),
                address(saved) + (item * number + start // chunk) * state_bytes,
                state_bytes,
                chunk,
                tokens,
                *where[12:],
                address(parts_b) + item * longest * sums * 4,
                address(parts_c) + item * longest * sums * 4,
                address(carry) + item * state_bytes,
                address(dA) + item * state_bytes,
                address(dskip) + item * _TILE,
                address(dbias) + item * _TILE,
                address(scratch[worker]),
                *group_bytes,
            )

        parallel_for(work, items)
        for buffer, result in zip(outputs, (du, ddelta), strict=True):
            layout.finish_rows(buffer, result, start, stop)
        if dz_rows is not None:
            layout.finish_rows(dz_rows, dz, start, stop)
        for parts, result in ((parts_b, dB), (parts_c, dC)):
            sum_tiles(layout, parts, result, start, stop)

    for start in reversed(range(0, layout.length, SEGMENT)):
        sweep(start, min(start + SEGMENT, layout.length))
    dskip, dbias = (
        gradient_of(given, layout.untile_rows(total.sum(0)).squeeze(-1))
        for given, total in ((d_skip, dskip), (delta_bias, dbias))
    )
    dA = layout.untile_states(dA.sum(0)).to(A.dtype)
    return du, ddelta, dA, dB, dC, dskip, dz, dbias, gradient_of(initial_state, layout.untile_states(carry))
