"""Channels-last images as planes of rows, and their rows spread over threads."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lightm.ops.threads import parallel_for

_BLOCK = 16  # rows of one work item in 2D; fixed, so that sums do not depend on the number of threads


def plane_sizes(x: Tensor) -> tuple[int, int, int]:
    """(depth, height, width) of x (Bt, *spatial, C); depth is 1 in 2D."""
    sizes = x.shape[1:-1]
    return (sizes[0], sizes[1], sizes[2]) if len(sizes) == 3 else (1, sizes[0], sizes[1])


def image_bytes(x: Tensor) -> int:
    """Bytes of one float32 image of x (Bt, *spatial, C)."""
    return 4 * x.shape[1:].numel()


def row_chunks(x: Tensor) -> int:
    """How many chunks `for_rows` cuts the rows of x into."""
    depth, height, _ = plane_sizes(x)
    return x.shape[0] * depth * (1 if x.dim() == 5 else -(-height // _BLOCK))


def for_rows(x: Tensor, work: Callable[[int, int, int, int, int], None]) -> None:
    """Call work(chunk, entry, z, first row, last row + 1) for all rows of x: by planes in 3D, by 16 rows in 2D."""
    depth, height, _ = plane_sizes(x)
    block = height if x.dim() == 5 else _BLOCK
    blocks = -(-height // block)

    def item(index: int, worker: int) -> None:
        plane, part = divmod(index, blocks)
        entry, z = divmod(plane, depth)
        work(index, entry, z, part * block, min((part + 1) * block, height))

    parallel_for(item, row_chunks(x))
