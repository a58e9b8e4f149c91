"""A whole state-space layer on the CPU without gradients: tokens stream through it in chunks that fit the cache.

A chunk is three work items, the third of which runs with the first of the next chunk: README.md says which. Nothing of
the inner width is ever there for more than two chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightm.ops.bounds import address
from lightm.ops.jit import LANES
from lightm.ops.layer import kernels
from lightm.ops.layer.kernels import BLOCK, scratch_floats
from lightm.ops.layer.parameters import LayerParameters
from lightm.ops.resample_cpu import pool_into
from lightm.ops.scan.kernels import STATE_SIZES, forward_kernel
from lightm.ops.threads import for_blocks, parallel_for, worker_count
from lightm.ops.vector_math import LOG2E

# their many arguments are handed on as tuples
_before: Callable[..., None] = kernels.before_scan
_after: Callable[..., None] = kernels.after_scan
_finish: Callable[..., None] = kernels.finish
_PIECE = 6 * BLOCK  # tokens of one call of a kernel: enough to make the call's own cost small
_CHUNK = 1 << 20  # numbers of the inner width in a chunk; see README.md for the choice
Order = tuple[int, ...]


def orders(sizes: tuple[int, ...], scan: str) -> list[Order]:
    """(base, n1, n2, s0, s1, s2) of every order of the tokens of an image of these sizes, see `kernels`."""
    tokens = math.prod(sizes)
    raster = (0, 1, tokens, 0, 0, 1)
    if scan == "raster":
        return [raster]
    if scan == "bidirectional":
        return [raster, (tokens - 1, 1, tokens, 0, 0, -1)]
    *_, height, width = sizes
    plane = height * width
    # the named axis runs fastest, the others keep their order
    along_y = (0, width, height, plane, 1, width)
    if len(sizes) == 2:
        return [raster, along_y]
    return [raster, along_y, (0, width, sizes[0], width, 1, plane)]


def _chunks(tokens: int, slab: int, longest: int) -> list[tuple[int, int]]:
    """(first, last + 1) of chunks of about equal length that do not cross a multiple of `slab`."""
    found = []
    for start in range(0, tokens, slab):
        stop = min(start + slab, tokens)
        number = -(-(stop - start) // longest)
        step = -(-(stop - start) // (number * BLOCK)) * BLOCK
        found += [(first, min(first + step, stop)) for first in range(start, stop, step)]
    return found


class _Run:
    """One layer on one batch entry."""

    def __init__(self, x: Tensor, p: LayerParameters) -> None:
        self.p, self.x = p, x
        self.keep: list[Tensor] = []  # vectors whose addresses the kernels are given
        self.row_out = 4 * p.out_channels
        packed = p.packed
        c, e, k = p.channels, p.inner, p.conv_weight.shape[1]
        self.low = 4 * 2 * p.groups * p.states
        numbers = packed["numbers"].columns
        self.numbers_row = 4 * -(-numbers // LANES) * LANES
        self.norm: tuple[Any, ...] = (self._at(p.norm[0]), self._at(p.norm[1]), p.norm[2])
        self.before: tuple[Any, ...] = (
            *packed["x"].arguments, *packed["z"].arguments, self._at(p.conv_weight.t()), self._at(p.conv_bias), k, e,
            *packed["numbers"].arguments, self.low, *packed["dt"].arguments,
        )  # fmt: skip
        gate: tuple[Any, ...] = (0, 0, 0, 0.0)
        if p.gate_norm is not None:
            gate = (e // p.groups, self._at(p.gate_norm[0]), self._at(p.gate_norm[1]), p.gate_norm[2])
        self.gate: tuple[Any, ...] = (e, *gate, *packed["out"].arguments)
        scale = self._at(p.scale.expand(c))
        out_norm = (self._at(p.out_norm[0]), self._at(p.out_norm[1]), p.out_norm[2])
        self.end: tuple[Any, ...] = (*self.norm, scale, int(p.of_norm), *out_norm, *packed["projection"].arguments)
        tiles = e // LANES
        decay = (p.A.float() * LOG2E).reshape(tiles, LANES, p.states).transpose(1, 2)
        self.decay, self.skip = self._at(decay), self._at(p.d_skip)
        self.tiles, self.state_bytes = tiles, 4 * p.states * LANES
        self.scan = forward_kernel(p.states, max(1, p.groups * LANES // e))
        self.scratch = torch.empty((worker_count(1 << 20), scratch_floats(c, e, k)))
        self.kept: dict[int, Tensor] = {}  # copies of the states before these tokens, (E, N), where asked for

    def _at(self, x: Tensor) -> int:
        self.keep.append(x.float().contiguous())
        return address(self.keep[-1])

    def along(
        self, order: Order, chunks: list[tuple[int, int]], mode: int, sums: int, out: Any, keep: int = 0
    ) -> Iterator[int]:
        """Run all tokens in one order; yields the number of tokens done after every chunk. `out(first)` is an address.

        With `keep` the states before every `keep`-th token are kept.
        """
        p, c = self.p, self.p.channels
        longest = max(last - first for first, last in chunks)
        inner = torch.empty((2, 3, longest, p.inner))
        numbers = torch.empty((2, longest, self.numbers_row // 4))
        state = torch.zeros((self.tiles, p.states, LANES))
        wide = 4 * p.inner

        def rows(k: int, which: int, t: int) -> int:
            return address(inner[k % 2, which]) + t * wide

        def before(k: int, block: int, worker: int) -> None:
            start, stop = chunks[k]
            t = block * _PIECE
            _before(
                address(self.x), c, *order, *self.norm, *self.before, start + t, min(start + t + _PIECE, stop),
                rows(k, 0, t), rows(k, 1, t), rows(k, 2, t), address(numbers[k % 2]) + t * self.numbers_row,
                self.numbers_row, address(self.scratch[worker]),
            )  # fmt: skip

        def after(k: int, block: int, worker: int) -> None:
            start, stop = chunks[k]
            t = block * _PIECE
            _after(
                rows(k, 2, t), rows(k, 1, t), *self.gate, address(self.x), c, *order, *self.end, mode, sums,
                out(start + t), self.row_out, start + t, min(start + t + _PIECE, stop), address(self.scratch[worker]),
            )  # fmt: skip

        def scan(k: int, tile: int, worker: int) -> None:
            across = tile * 4 * LANES
            at = address(numbers[k % 2]) + tile * p.groups // self.tiles * 4 * p.states
            tokens = chunks[k][1] - chunks[k][0]
            d = rows(k, 2, 0) + across
            self.scan(
                rows(k, 0, 0) + across, wide, d, wide, at, self.numbers_row,
                at + 4 * p.groups * p.states, self.numbers_row, 0, 0, d, wide,
                self.decay + tile * self.state_bytes, self.skip + across, 0, 0,
                address(state) + tile * self.state_bytes, 0, 0, tokens, tokens, 0, 4 * p.states, 4 * p.states,
            )  # fmt: skip

        def blocks(k: int) -> int:
            return -(-(chunks[k][1] - chunks[k][0]) // _PIECE) if 0 <= k < len(chunks) else 0

        for k in range(len(chunks) + 1):
            ends, starts = blocks(k - 1), blocks(k)

            def both(item: int, worker: int, k: int = k, ends: int = ends) -> None:
                if item < ends:
                    after(k - 1, item, worker)
                else:
                    before(k, item - ends, worker)

            parallel_for(both, ends + starts)
            if k:
                yield chunks[k - 1][1]
            if starts:
                if keep and chunks[k][0] % keep == 0:
                    self.kept[chunks[k][0] // keep] = state.transpose(1, 2).reshape(p.inner, p.states)
                parallel_for(partial(scan, k), self.tiles)

    def finish_rows(self, sums: int, first: int, last: int, out: Any) -> None:
        """The layer's end for rows first..last-1 of the sums over several orders."""

        def work(entry: int, begin: int, end: int, worker: int) -> None:
            _finish(
                sums, address(self.x), self.p.channels, *self.end, out(first + begin), self.row_out, first + begin,
                first + end, address(self.scratch[worker]),
            )  # fmt: skip

        for_blocks(1, last - first, _PIECE, work)


def run_layer(
    x: Tensor, p: LayerParameters, scan: str, pooling: str | None, keep_states: int = 0
) -> tuple[Tensor, Tensor | None]:
    """See `state_space_layer`; x is contiguous."""
    batch, sizes = x.shape[0], tuple(x.shape[1:-1])
    halved = sizes if pooling is None else tuple(size // 2 for size in sizes)
    result = x.new_empty((batch, *halved, p.out_channels))
    tokens = x[0, ..., 0].numel()
    plane = tokens // sizes[0]
    longest = max(BLOCK, _CHUNK // p.inner // BLOCK * BLOCK)
    rows = sizes[0] if pooling is None else min(sizes[0], 2 * max(1, longest // (2 * plane)))
    if keep_states:
        rows = keep_states
    kept = []
    slab_tokens = rows * plane
    slab = None if pooling is None else x.new_empty((rows, *sizes[1:], p.out_channels))
    for entry in range(batch):
        run = _Run(x[entry], p)
        base = address(result[entry]) if slab is None else address(slab)

        def out(t: int, base: int = base, row: int = run.row_out) -> int:
            return base + (t if slab is None else t % slab_tokens) * row

        def pool(done: int, entry: int = entry) -> None:
            if slab is not None and (done % slab_tokens == 0 or done == tokens):
                first = (done - 1) // slab_tokens * rows
                part = slab[: done // plane - first]
                pool_into(str(pooling), part, result[entry, first // 2 : done // plane // 2])

        ways = orders(sizes, scan)
        if len(ways) == 1:
            keep = keep_states * plane
            for done in run.along(ways[0], _chunks(tokens, slab_tokens, longest), 0, 0, out, keep):
                pool(done)
            kept.append(torch.stack([run.kept[index] for index in sorted(run.kept)]) if keep else None)
            continue
        sums = x.new_empty((tokens, p.channels))
        for number, order in enumerate(ways):
            for _ in run.along(order, _chunks(tokens, tokens, longest), 2 if number else 1, address(sums), out):
                pass
        for first, last in _chunks(tokens, slab_tokens, longest):
            run.finish_rows(address(sums), first, last, out)
            pool(last)
    return result, torch.stack([states for states in kept if states is not None], dim=1) if keep_states else None


def can_run(p: LayerParameters) -> bool:
    """Whether the kernels take these sizes: whole vectors a group, or two groups a vector; a compiled N."""
    width = p.inner // p.groups
    paired = 2 * width == LANES and p.groups % 2 == 0
    return (width % LANES == 0 or paired) and p.states in STATE_SIZES
