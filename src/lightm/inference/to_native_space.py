"""From logits on the network's grid to class indices on the image's own grid, slab by slab."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lightm.preparation.resample import linear_neighbours

# Upsampled logits held at once, in values: 8 MB of float32.
_VALUES_AT_ONCE = 2_000_000

LogitSink = Callable[[Tensor], None]


def class_indices(
    slabs: Iterable[Tensor],
    grid_shape: Sequence[int],
    shape: Sequence[int],
    *,
    values: Sequence[int] | None = None,
    out: np.ndarray | None = None,
    sink: LogitSink | None = None,
) -> np.ndarray:
    """Return the class of largest logit (*shape) uint8, logits interpolated linearly from `grid_shape` to `shape`.

    slabs: logits (K, depth, *rest), which joined along axis 1 have `grid_shape`; at most 256 classes. Both grids cover
    the same space and voxels are boxes, as in `lightm.preparation.preprocess`; beyond the outermost centres logits
    stay constant. Equal shapes are not interpolated. Between two classes this puts the border where their
    logits meet, finer than the voxels of the network's grid.

    values: the number written for each class, 0, 1, 2, ... by default. out: where to write, of `shape`, such as a view
    of a map in another orientation. sink: given the logits (K, n, *rest) of the next n slices of `shape`, in order.
    The pieces that are computed together depend on the shapes alone, not on the slabs.

    Memory: the result unless `out`, and a few times 8 MB or one slice of all classes.
    """
    grid_shape, shape = tuple(grid_shape), tuple(shape)
    result = np.empty(shape, dtype=np.uint8) if out is None else out
    written = None if values is None else np.asarray(values, result.dtype)
    low, high, share = linear_neighbours(grid_shape[0], shape[0])
    held: Tensor | None = None  # the slices of the network's grid that are still needed, from `first` on
    first = done = 0
    for slab in slabs:
        held = slab if held is None or not held.shape[1] else torch.cat([held, slab], dim=1)
        step = _slices_at_once(held.shape[0], shape)
        while done < shape[0]:
            stop = min(done + step, shape[0])
            if high[stop - 1] >= first + held.shape[1]:
                break
            piece = slice(done, stop)
            logits = _blend(held, low[piece] - first, high[piece] - first, share[piece])
            if grid_shape[1:] != shape[1:]:
                mode = "bilinear" if len(shape) == 3 else "linear"
                logits = functional.interpolate(logits, shape[1:], mode=mode, align_corners=False)
            # Twenty times as fast as argmax here, which gives the same: the first of the largest.
            indices = logits.max(0).indices.to(torch.uint8).numpy()
            result[piece] = indices if written is None else written[indices]
            if sink is not None:
                sink(logits)
            done = stop
        kept = min(int(low[done]), first + held.shape[1]) if done < len(low) else first + held.shape[1]
        held = held[:, kept - first :]
        first = kept
    return result


def class_indices_bytes(
    classes: int, grid: Sequence[int], shape: Sequence[int], slab_values: int, resampled: bool
) -> int:
    """What `class_indices` needs at most beside its result, where slabs of so many values come."""
    slices = min(_slices_at_once(classes, shape), shape[0])
    held = classes * prod(grid[1:]) * (-(-slices * grid[0] // shape[0]) + 2) + slab_values
    return 8 * held + piece_bytes(classes, shape) * (4 if resampled else 2)


def piece_bytes(classes: int, shape: Sequence[int]) -> int:
    """Bytes of the logits that a sink is given at once."""
    return 4 * classes * prod(shape[1:]) * min(_slices_at_once(classes, shape), shape[0])


def _slices_at_once(classes: int, shape: Sequence[int]) -> int:
    return max(1, _VALUES_AT_ONCE // (classes * prod(shape[1:])))


def _blend(held: Tensor, low: np.ndarray, high: np.ndarray, share: np.ndarray) -> Tensor:
    if not share.any():
        return held if len(low) == held.shape[1] and low[0] == 0 else held[:, torch.from_numpy(low)]
    weight = torch.from_numpy(share).to(held.dtype).view(1, -1, *(1,) * (held.ndim - 2))
    return torch.lerp(held[:, torch.from_numpy(low)], held[:, torch.from_numpy(high)], weight)
