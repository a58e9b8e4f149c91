"""The SSD scan on the CPU: the Numba kernels, spread over batch entries and tiles of channels.

A head is what `Layout` calls a group: its P channels are padded to whole tiles. B and C have G groups of heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightm.ops.bounds import address, strided_address
from lightm.ops.jit import LANES
from lightm.ops.memory import RESULTS
from lightm.ops.scan.cpu import PASS, sum_tiles
from lightm.ops.scan.inputs import ScanGradients, ScanInputs, ScanResults, check_chunk, gradient_of
from lightm.ops.scan.layout import SEGMENT, Layout, places
from lightm.ops.ssd.kernels import backward_kernel, forward_kernel, scratch_floats
from lightm.ops.threads import parallel_for, worker_count
from lightm.ops.vector_math import LOG2E

_TILE = 4 * LANES  # bytes of one row of a tile


def layout_of(inputs: ScanInputs) -> Layout:
    """How the kernels see these inputs."""
    u = inputs.u
    return Layout(u.shape[0], u.shape[1], u.shape[2], inputs.A.shape[0], inputs.B.shape[3])


def _numbers(inputs: ScanInputs) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A times log2(e), d_skip and delta_bias: vectors over heads as consecutive float32 numbers."""
    skip, bias = (None if x is None else x.float().contiguous() for x in (inputs.d_skip, inputs.delta_bias))
    return inputs.A.float() * LOG2E, skip, bias


def _at(x: Tensor | None, head: int) -> int:
    """Address of a head's number; 0 for None."""
    return 0 if x is None else address(x) + 4 * head


def _input_rows(layout: Layout, inputs: ScanInputs, start: int, stop: int) -> tuple[list[Tensor | None], list[int]]:
    """Rows of (u, delta, B, C, z) of a segment, and the bytes between heads of delta and between groups of B and C."""
    u, z = (layout.channel_rows(x, start, stop) for x in (inputs.u, inputs.z))
    delta = inputs.delta[:, start:stop].float()
    b, c = (layout.number_rows(x, start, stop) for x in (inputs.B, inputs.C))
    return [u, delta, b, c, z], [4 * x.stride(2) for x in (delta, b, c)]


def run_forward(inputs: ScanInputs, chunk: int) -> ScanResults:
    """Run the scan; states before every `chunk`-th token are kept, none when chunk is 0.

    u, z and y are (Bt, L, H * P), delta (Bt, L, H), states (Bt, H * P, N).
    """
    u, delta, B, C, z, soft = inputs.u, inputs.delta, inputs.B, inputs.C, inputs.z, int(inputs.delta_softplus)
    layout, begin = layout_of(inputs), inputs.initial_state
    heads_of_group = layout.groups // B.shape[2]
    y = RESULTS.empty(u.shape, u.dtype)
    rate, skip, bias = _numbers(inputs)
    state = torch.zeros(layout.state_shape) if begin is None else layout.tile_states(begin)
    saved = torch.empty(layout.saved_shape(chunk))
    number = saved.shape[2]
    in_place = layout.in_place((u, z, y), (B, C)) and delta.dtype == torch.float32
    segment = max(layout.length, 1) if in_place else SEGMENT
    run = forward_kernel(layout.kernel_states)
    scratch = torch.empty((worker_count(layout.batch * layout.tiles), 2 * (chunk or PASS)))
    state_bytes = layout.state_bytes

    def sweep(start: int, stop: int) -> None:
        rows, (delta_bytes, *group_bytes) = _input_rows(layout, inputs, start, stop)
        y_rows = layout.row_buffer(y, start, stop)
        spots = [strided_address(x) for x in (*rows, y_rows)]

        def work(item: int, worker: int) -> None:
            entry, tile = divmod(item, layout.tiles)
            head, across = tile // layout.tiles_of_group, tile * _TILE
            in_group = [head // heads_of_group * size for size in group_bytes]
            run(
                *places(spots, [across, head * delta_bytes, *in_group, across, across], entry), _at(rate, head),
                _at(skip, head), _at(bias, head), soft, address(state) + item * state_bytes,
                address(saved) + (item * number + start // chunk) * state_bytes if chunk else 0, state_bytes,
                chunk or PASS, stop - start, address(scratch[worker]),
            )  # fmt: skip

        parallel_for(work, layout.batch * layout.tiles)
        layout.finish_rows(y_rows, y, start, stop)

    for start in range(0, layout.length, segment):
        sweep(start, min(start + segment, layout.length))
    return y, layout.untile_states(state), saved


def run_backward(grad_y: Tensor, grad_state: Tensor, inputs: ScanInputs, chunk: int, saved: Tensor) -> ScanGradients:
    """Return the gradients of all inputs."""
    check_chunk("ssd_scan", chunk)
    u, delta, A, B, C, d_skip, z, delta_bias, delta_softplus, initial_state = inputs
    layout, soft = layout_of(inputs), int(delta_softplus)
    heads_of_group = layout.groups // B.shape[2]
    # the same tiles, seen from the groups of B and C
    shared = Layout(layout.batch, layout.length, layout.width, B.shape[2], layout.states)
    rate, skip, bias = _numbers(inputs)
    du, ddelta = torch.empty(u.shape, dtype=u.dtype), torch.empty(delta.shape, dtype=delta.dtype)
    dz = torch.empty(0) if z is None else torch.empty(z.shape, dtype=z.dtype)
    dB, dC = torch.empty(B.shape, dtype=B.dtype), torch.empty(C.shape, dtype=C.dtype)
    n, items, number = layout.kernel_states, layout.batch * layout.tiles, saved.shape[2]
    carry = layout.tile_states(grad_state)
    sums = torch.zeros((3, layout.batch, layout.tiles, LANES))  # dA, dskip, dbias
    longest = -(-min(SEGMENT, layout.length) // LANES) * LANES
    parts_b, parts_c = (torch.empty((layout.batch, layout.tiles, longest, n)) for _ in range(2))
    parts_d = torch.empty((layout.batch, layout.groups, layout.tiles_of_group, longest))
    scratch = torch.empty((worker_count(items), scratch_floats(n, chunk)))
    run = backward_kernel(n)
    state_bytes, part_bytes = layout.state_bytes, 4 * longest * n
    results = (du,) if z is None else (du, dz)

    def sweep(start: int, stop: int) -> None:
        rows, (delta_bytes, *group_bytes) = _input_rows(layout, inputs, start, stop)
        dy_rows = layout.channel_rows(grad_y, start, stop)
        buffers = [layout.row_buffer(x, start, stop) for x in results]
        spots = [strided_address(x) for x in (*rows, dy_rows, *buffers, *[None] * (2 - len(buffers)))]

        def work(item: int, worker: int) -> None:
            entry, tile = divmod(item, layout.tiles)
            head, across = tile // layout.tiles_of_group, tile * _TILE
            in_group = [head // heads_of_group * size for size in group_bytes]
            where = places(spots, [across, head * delta_bytes, *in_group] + [across] * 4, entry)
            run(
                *where[:12], _at(rate, head), _at(skip, head), _at(bias, head), soft,
                address(saved) + (item * number + start // chunk) * state_bytes, state_bytes, chunk, stop - start,
                *where[12:], address(parts_d) + item * longest * 4, address(parts_b) + item * part_bytes,
                address(parts_c) + item * part_bytes, address(carry) + item * state_bytes,
                *(address(sums[i]) + item * _TILE for i in range(3)), address(scratch[worker]),
            )  # fmt: skip

        parallel_for(work, items)
        for buffer, result in zip(buffers, results, strict=True):
            layout.finish_rows(buffer, result, start, stop)
        ddelta[:, start:stop] = _in_order(parts_d)[..., : stop - start].transpose(1, 2)
        for parts, result in ((parts_b, dB), (parts_c, dC)):
            sum_tiles(shared, parts, result, start, stop)

    for start in reversed(range(0, layout.length, SEGMENT)):
        sweep(start, min(start + SEGMENT, layout.length))
    dA, dskip, dbias = (
        gradient_of(given, total.reshape(layout.batch, layout.groups, -1).sum((0, 2)))
        for given, total in zip((A, d_skip, delta_bias), sums.unbind(0), strict=True)
    )
    return du, ddelta, dA, dB, dC, dskip, dz, dbias, gradient_of(initial_state, layout.untile_states(carry))


def _in_order(parts: Tensor) -> Tensor:
    """Sum over the tiles of each head, always in the same order: (Bt, H, tiles, t) -> (Bt, H, t)."""
    total = parts[:, :, 0]
    for tile in range(1, parts.shape[2]):
        total = total + parts[:, :, tile]
    return total
