"""From tensors to what the kernels read: float32, channels in tiles of LANES, N one of the compiled sizes.

Rows (one token's channels) are used in place when they can be: float32, channels next to each other, whole tiles.
Otherwise a segment of tokens at a time is copied into that form, so that the copies stay in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lightm.ops.jit import LANES
from lightm.ops.scan.kernels import STATE_SIZES

SEGMENT = 8192
"""Tokens copied, or swept backward, at a time; a multiple of every chunk length."""


class Layout:
    """Sizes of one call.

    With `pair`, where groups are so small, and so many, that two fit in a tile, a tile holds two: one in each half of
    its lanes. Otherwise a group has tiles of its own, the last of which may be part padding.
    """

    def __init__(self, batch: int, length: int, channels: int, groups: int, states: int, pair: bool = False) -> None:
        self.batch, self.length, self.channels, self.groups, self.states = batch, length, channels, groups, states
        self.of_group = channels // groups  # channels of a group
        self.paired = pair and groups % 2 == 0 and self.of_group <= LANES // 2
        self.tiles_of_group = -(-self.of_group // LANES)  # where it shares none
        self.groups_of_tile = 2 if self.paired else 1
        self.group_width = LANES // 2 if self.paired else self.tiles_of_group * LANES  # with its padding
        self.tiles = groups * self.group_width // LANES
        self.width = self.tiles * LANES  # channels with the padding of every group
        self.kernel_states = next(size for size in STATE_SIZES if size >= states)  # the compiled size that holds N
        self.state_shape = (batch, self.tiles, self.kernel_states, LANES)
        self.state_bytes = 4 * self.kernel_states * LANES  # of one tile

    def first_group(self, tile: int) -> int:
        """The (first) group of a tile."""
        return 2 * tile if self.paired else tile // self.tiles_of_group

    def saved_shape(self, chunk: int) -> tuple[int, ...]:
        """The shape of the states kept before every `chunk`-th token; none where it is 0."""
        number = -(-self.length // chunk) if chunk else 0
        return self.batch, self.tiles, number, self.kernel_states, LANES

    def tile_rows(self, x: Tensor) -> Tensor:
        """(..., E, n) -> (..., tiles, n, LANES), float32, padded with zeros."""
        lead, n = x.shape[:-2], x.shape[-1]
        x = x.float().reshape(*lead, self.groups, self.of_group, n)
        x = functional.pad(x, (0, 0, 0, self.group_width - self.of_group))
        return x.reshape(*lead, self.tiles, LANES, n).transpose(-1, -2).contiguous()

    def untile_rows(self, x: Tensor) -> Tensor:
        """(..., tiles, n, LANES) -> (..., E, n): undoes `tile_rows`."""
        lead, n = x.shape[:-3], x.shape[-2]
        x = x.transpose(-1, -2).reshape(*lead, self.groups, self.group_width, n)
        return x[..., : self.of_group, :].reshape(*lead, self.channels, n)

    def tile_states(self, x: Tensor) -> Tensor:
        """(..., E, N) -> (..., tiles, kernel_states, LANES)."""
        return self.tile_rows(functional.pad(x, (0, self.kernel_states - self.states)))

    def untile_states(self, x: Tensor) -> Tensor:
        """(..., tiles, kernel_states, LANES) -> (..., E, N)."""
        return self.untile_rows(x)[..., : self.states].contiguous()

    def channels_in_place(self, x: Tensor) -> bool:
        """Whether the kernels can read or write the rows of x (Bt, L, E) where they are."""
        return x.dtype == torch.float32 and x.stride(-1) == 1 and self.width == self.channels

    def numbers_in_place(self, x: Tensor) -> bool:
        """Whether the kernels can read B or C (Bt, L, G, N) where they are."""
        return x.dtype == torch.float32 and x.stride(-1) == 1 and self.kernel_states == self.states

    def in_place(self, rows: Sequence[Tensor | None], numbers: Sequence[Tensor]) -> bool:
        """Whether nothing has to be copied, of rows (Bt, L, E) and of B and C."""
        return all(x is None or self.channels_in_place(x) for x in rows) and all(map(self.numbers_in_place, numbers))

    def channel_rows(self, x: Tensor | None, start: int, stop: int) -> Tensor | None:
        """Tokens start..stop-1 of x (Bt, L, E) as (Bt, stop - start, width) rows for the kernels."""
        if x is None:
            return None
        part = x[:, start:stop]
        if self.channels_in_place(x):
            return part
        part = part.float()
        if self.width != self.channels:
            part = part.reshape(self.batch, stop - start, self.groups, self.of_group)
            part = functional.pad(part, (0, self.group_width - self.of_group))
        return part.reshape(self.batch, stop - start, self.width).contiguous()

    def number_rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Tokens start..stop-1 of B or C as (Bt, stop - start, G, kernel_states)."""
        part = x[:, start:stop]
        if self.numbers_in_place(x):
            return part
        return functional.pad(part.float(), (0, self.kernel_states - self.states)).contiguous()

    def row_buffer(self, result: Tensor, start: int, stop: int) -> Tensor:
        """Where the kernels write rows start..stop-1 of a result (Bt, L, E): the result itself, or scratch."""
        if self.channels_in_place(result):
            return result[:, start:stop]
        return result.new_empty((self.batch, stop - start, self.width), dtype=torch.float32)

    def finish_rows(self, buffer: Tensor, result: Tensor, start: int, stop: int) -> None:
        """Copy scratch from `row_buffer` to its place; nothing to do when it is the place."""
        if self.channels_in_place(result):
            return
        part = buffer.reshape(self.batch, stop - start, self.groups, self.group_width)
        result[:, start:stop] = part[..., : self.of_group].reshape(self.batch, stop - start, self.channels)


def places(spots: Sequence[tuple[int, int, int]], across: Sequence[int], entry: int, first: int = 0) -> list[int]:
    """(address, bytes between tokens) of each tensor's rows of an entry from token `first` on, `across` bytes in."""
    found: list[int] = []
    for (at, entry_step, step), offset in zip(spots, across, strict=True):
        found += [at + entry * entry_step + offset + first * step if at else 0, step]
    return found
