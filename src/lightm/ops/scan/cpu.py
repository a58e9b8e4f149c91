"""The selective scan on the CPU: the Numba kernels, spread over batch entries and tiles of channels.

Where there are more threads than tiles, the tokens are cut into parts that threads take side by side, as README.md says
under "Threads and bits". What a part does to the states before it is h -> exp2(a * sum of dt) * h + h0, with h0 the
states it leaves when it begins with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightm.ops.bounds import address, strided_address
from lightm.ops.jit import LANES
from lightm.ops.memory import RESULTS
from lightm.ops.scan.inputs import ScanGradients, ScanInputs, ScanResults, check_chunk, gradient_of
from lightm.ops.scan.kernels import backward_kernel, forward_kernel, scratch_floats, sum_kernel, summary_kernel
from lightm.ops.scan.layout import SEGMENT, Layout, places
from lightm.ops.threads import for_blocks, parallel_for, worker_count
from lightm.ops.vector_math import LOG2E

PASS = 64  # tokens that the forward kernel takes at a time when no states are kept
SHORTEST = 2048
"""Tokens of a part that are worth handing to a thread."""
_TILE = 4 * LANES  # bytes of one row of a tile


def layout_of(inputs: ScanInputs) -> Layout:
    """How the kernels see these inputs."""
    u, B = inputs.u, inputs.B
    return Layout(u.shape[0], u.shape[1], u.shape[2], B.shape[2], B.shape[3], pair=True)


def part_count(items: int, threads: int, tokens: int) -> int:
    """Parts to cut the tokens of each of `items` tiles into; 1 where it would not pay."""
    for_one = min(threads // max(items, 1), tokens // SHORTEST - 1)
    return for_one + 1 if for_one >= 2 else 1


def cut(tokens: int, parts: int, chunk: int) -> list[int]:
    """parts + 1 borders from 0 to `tokens`, multiples of `chunk` but for the last."""
    chunks = -(-tokens // chunk)
    return [min(chunks * part // parts * chunk, tokens) for part in range(parts)] + [tokens]


def carry_states(first: Tensor, alone: Tensor, steps: Tensor, decay: Tensor) -> Tensor:
    """States before every part but the first, from those that the first one leaves (Bt, tiles, N, LANES).

    `alone` (parts - 2, Bt, tiles, N, LANES): what the second to last but one leave when they begin with zeros; `steps`
    (parts - 2, Bt, tiles, 1, LANES): their sums of dt; `decay` (tiles, N, LANES): A times log2(e).
    """
    states = [first]
    for left, total in zip(alone, steps, strict=True):
        states.append(left + torch.exp2(decay * total) * states[-1])
    return torch.stack(states)


def _parameters(layout: Layout, inputs: ScanInputs) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A times log2(e), d_skip and delta_bias, in tiles."""
    skip, bias = (None if x is None else layout.tile_rows(x.unsqueeze(-1)) for x in (inputs.d_skip, inputs.delta_bias))
    return layout.tile_states(inputs.A.float() * LOG2E), skip, bias


def _input_rows(layout: Layout, inputs: ScanInputs, start: int, stop: int) -> tuple[list[Tensor | None], list[int]]:
    """Rows of (u, delta, B, C, z) of a segment, and the bytes between the groups of B and of C."""
    u, delta, z = (layout.channel_rows(x, start, stop) for x in (inputs.u, inputs.delta, inputs.z))
    b, c = (layout.number_rows(x, start, stop) for x in (inputs.B, inputs.C))
    return [u, delta, b, c, z], [4 * b.stride(2), 4 * c.stride(2)]


def run_forward(inputs: ScanInputs, chunk: int) -> ScanResults:
    """Run the scan; states before every `chunk`-th token are kept, none when chunk is 0."""
    u, delta, B, C, z, soft = inputs.u, inputs.delta, inputs.B, inputs.C, inputs.z, int(inputs.delta_softplus)
    layout, begin = layout_of(inputs), inputs.initial_state
    y = RESULTS.empty(u.shape, u.dtype)
    decay, skip, bias = _parameters(layout, inputs)
    state = torch.zeros(layout.state_shape) if begin is None else layout.tile_states(begin)
    saved = torch.empty(layout.saved_shape(chunk))
    number = saved.shape[2]
    segment = max(layout.length, 1) if layout.in_place((u, delta, z, y), (B, C)) else SEGMENT
    run = forward_kernel(layout.kernel_states, layout.groups_of_tile)
    items = layout.batch * layout.tiles
    pass_tokens = chunk or PASS
    most_parts = part_count(items, torch.get_num_threads(), min(segment, layout.length))
    scratch = torch.empty((worker_count(items * most_parts), pass_tokens * LANES))
    skip_at, bias_at = strided_address(skip)[0], strided_address(bias)[0]
    state_bytes = layout.state_bytes

    def sweep(start: int, stop: int) -> None:
        rows, group_bytes = _input_rows(layout, inputs, start, stop)
        y_rows = layout.row_buffer(y, start, stop)
        spots = [strided_address(x) for x in (*rows, y_rows)]

        def where(item: int, first: int) -> list[int]:
            """Addresses and steps of the rows of a tile from token `first` on."""
            entry, tile = divmod(item, layout.tiles)
            group = layout.first_group(tile)
            across = [tile * _TILE] * 2 + [group * size for size in group_bytes] + [tile * _TILE] * 2
            return places(spots, across, entry, first)

        def vectors(item: int) -> tuple[int, int, int]:
            """Addresses of a tile's A, d_skip and delta_bias."""
            tile = item % layout.tiles
            across = tile * _TILE
            a_at = address(decay) + tile * state_bytes
            return a_at, skip_at + across if skip_at else 0, bias_at + across if bias_at else 0

        def scan(item: int, worker: int, first: int, last: int, state_at: int) -> None:
            number_before = item * number + (start + first) // pass_tokens
            run(
                *where(item, first), *vectors(item), soft, state_at + item * state_bytes,
                address(saved) + number_before * state_bytes if chunk else 0, state_bytes, pass_tokens, last - first,
                address(scratch[worker]), *group_bytes,
            )  # fmt: skip

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
            a_at, _, own_bias = vectors(item)
            sum_up(
                *where(item, borders[part])[:6], a_at, own_bias, soft, address(alone[part - 1]) + item * state_bytes,
                address(steps[part - 1]) + item * _TILE, pass_tokens, borders[part + 1] - borders[part],
                address(scratch[worker]), group_bytes[0],
            )  # fmt: skip

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
    n, tokens = layout.kernel_states, stop - start
    if layout.paired:  # one tile per group: nothing to add
        own = parts[:, :, :tokens].unflatten(-1, (2, n))[..., : layout.states]  # (Bt, tiles, tokens, 2, N)
        result[:, start:stop] = own.movedim(2, 1).reshape(layout.batch, tokens, layout.groups, layout.states)
        return
    in_place = layout.numbers_in_place(result)
    total = result[:, start:stop] if in_place else torch.empty((layout.batch, tokens, layout.groups, n))
    run, part_bytes = sum_kernel(n), 4 * parts.stride(1)

    def work(row: int, first: int, last: int, worker: int) -> None:
        entry, group = divmod(row, layout.groups)
        first_tile = entry * layout.tiles + group * layout.tiles_of_group
        to = address(total) + 4 * (entry * total.stride(0) + group * n)
        of = address(parts) + first_tile * part_bytes
        run(of, part_bytes, layout.tiles_of_group, to, 4 * layout.groups * n, first, last)

    for_blocks(layout.batch * layout.groups, tokens, 1024, work)
    if not in_place:
        result[:, start:stop] = total[..., : layout.states]


def run_backward(grad_y: Tensor, grad_state: Tensor, inputs: ScanInputs, chunk: int, saved: Tensor) -> ScanGradients:
    """Return the gradients of all inputs."""
    check_chunk("selective_scan", chunk)
    u, delta, A, B, C, d_skip, z, delta_bias, delta_softplus, initial_state = inputs
    layout, soft = layout_of(inputs), int(delta_softplus)
    decay, skip, bias = _parameters(layout, inputs)
    du, ddelta = torch.empty(u.shape, dtype=u.dtype), torch.empty(delta.shape, dtype=delta.dtype)
    dz = torch.empty(0) if z is None else torch.empty(z.shape, dtype=z.dtype)
    dB, dC = torch.empty(B.shape, dtype=B.dtype), torch.empty(C.shape, dtype=C.dtype)
    n, number = layout.kernel_states, saved.shape[2]
    items = layout.batch * layout.tiles
    carry = layout.tile_states(grad_state)
    dA = torch.zeros((layout.batch, layout.tiles, n, LANES))
    dskip, dbias = (torch.zeros((layout.batch, layout.tiles, 1, LANES)) for _ in range(2))
    longest, sums = min(SEGMENT, layout.length), layout.groups_of_tile * n
    parts_b, parts_c = (torch.empty((layout.batch, layout.tiles, longest, sums)) for _ in range(2))
    part_bytes = 4 * longest * sums
    scratch = torch.empty((worker_count(items), scratch_floats(n, chunk)))
    run = backward_kernel(n, layout.groups_of_tile)
    skip_at, bias_at = strided_address(skip)[0], strided_address(bias)[0]
    state_bytes = layout.state_bytes
    results = (du, ddelta) if z is None else (du, ddelta, dz)

    def sweep(start: int, stop: int) -> None:
        rows, group_bytes = _input_rows(layout, inputs, start, stop)
        dy_rows = layout.channel_rows(grad_y, start, stop)
        buffers = [layout.row_buffer(x, start, stop) for x in results]
        spots = [strided_address(x) for x in (*rows, dy_rows, *buffers, *[None] * (3 - len(buffers)))]

        def work(item: int, worker: int) -> None:
            entry, tile = divmod(item, layout.tiles)
            group, across = layout.first_group(tile), tile * _TILE
            where = places(spots, [across] * 2 + [group * size for size in group_bytes] + [across] * 5, entry)
            run(
                *where[:12], address(decay) + tile * state_bytes, skip_at + across if skip_at else 0,
                bias_at + across if bias_at else 0, soft,
                address(saved) + (item * number + start // chunk) * state_bytes, state_bytes, chunk, stop - start,
                *where[12:], address(parts_b) + item * part_bytes, address(parts_c) + item * part_bytes,
                address(carry) + item * state_bytes, address(dA) + item * state_bytes, address(dskip) + item * _TILE,
                address(dbias) + item * _TILE, address(scratch[worker]), *group_bytes,
            )  # fmt: skip

        parallel_for(work, items)
        for buffer, result in zip(buffers, results, strict=True):
            layout.finish_rows(buffer, result, start, stop)
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
