"""Resampling of images and label maps onto a grid of another spacing over the same space, slab by slab.

Voxels are boxes: the outer edges of the first and last stay where they are, and beyond the outermost centres values
stay constant. Interpolation is a product of interpolations along the axes, so that no slab changes the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

from lightm.images.lazy import DiskArray

# Voxels of a slab that is resampled at once; in float64, with its copies, some 30 MB.
_SLAB_VOXELS = 1 << 19
# The recursive filter's memory of an edge: the pole -0.268 to the power of 12 is below 2e-7; as in scipy.
_EDGE = 12


def resampled_shape(shape: Sequence[int], spacing_mm: Sequence[float], target_mm: Sequence[float]) -> tuple[int, ...]:
    """Return the shape that covers the same space at the target spacing; at least one voxel on every axis.

    >>> resampled_shape((10, 20), (2.0, 1.0), (1.0, 2.0))
    (20, 10)
    """
    return tuple(
        max(1, round(size * step / target)) for size, step, target in zip(shape, spacing_mm, target_mm, strict=True)
    )


def resample_image(
    read: Callable[[int, int], np.ndarray], shape: Sequence[int], target: Sequence[int], folder: Path | None = None
) -> DiskArray:
    """Resample one channel by cubic splines, slab by slab, into a `DiskArray` of shape `target`, float32.

    read(start, stop): slices of the image of `shape` along its first axis. folder: where temporary files go, None for
    memory. No smoothing before downsampling. Computed in float64, rounded to float32 once per axis.

    Cost: some 25 ns per voxel and axis. Memory: 30 MB and a few slices, and without `folder` the result and an image of
    the target's shape but the source's length.
    """
    shape, target = tuple(shape), tuple(target)
    across = DiskArray((shape[0], *target[1:]), np.float32, folder)
    rest = tuple(slice(0, size) for size in target[1:])
    step = _step(shape[1:])
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        slab = read(start, stop).astype(np.float32, copy=False)
        for axis in range(len(shape) - 1, 0, -1):
            slab = _spline(slab, axis, target[axis])
        across.write((slice(start, stop), *rest), slab)
    if shape[0] == target[0]:
        return across
    result = DiskArray(target, np.float32, folder)
    step = _step((max(shape[0], target[0]), *target[2:]))
    for start in range(0, target[1], step):
        block = (slice(start, min(start + step, target[1])), *rest[1:])
        lines = across.read((slice(0, shape[0]), *block))
        result.write((slice(0, target[0]), *block), _spline(lines, 0, target[0]))
    across.close()
    return result


def resample_bytes(shape: Sequence[int], target: Sequence[int]) -> int:
    """Return what `resample_image` needs at most beside what it keeps: float64 knots, products and sum of one slab."""
    across = _step(shape[1:]) * _padded(shape[1:], target[1:])
    down = _padded(shape[:1], target[:1]) * int(np.prod(target[2:]))
    return 36 * max(across, _step((max(shape[0], target[0]), *target[2:])) * down)


def _step(shape: Sequence[int]) -> int:
    return max(1, _SLAB_VOXELS // (int(np.prod(shape)) + _EDGE))


def _padded(shape: Sequence[int], target: Sequence[int]) -> int:
    """Voxels of an array at its largest while one axis after the other, with its margin, takes its new length."""
    return int(np.prod([max(old + 2 * _EDGE, new) for old, new in zip(shape, target, strict=True)]))


def _centres(old: int, new: int) -> np.ndarray:
    """Where the centres of `new` voxels lie, counted in `old` voxels of the same length."""
    return (np.arange(new) + 0.5) * (old / new) - 0.5


def _spline(values: np.ndarray, axis: int, length: int) -> np.ndarray:
    """Resample one axis to `length` by the cubic B-spline through all voxels, constant beyond the edges; float32."""
    old = values.shape[axis]
    if old == length:
        return values
    pads = [(_EDGE, _EDGE) if other == axis else (0, 0) for other in range(values.ndim)]
    # As `ndimage.zoom`: the filter's own boundary lies beyond a margin of repeated edge voxels.
    padded = np.pad(values, pads, mode="edge")
    knots = ndimage.spline_filter1d(padded, 3, axis=axis, output=np.float64, mode="nearest")
    centre = _centres(old, length) + _EDGE
    first = np.floor(centre).astype(np.int64)
    t = centre - first
    weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    along = [-1 if other == axis else 1 for other in range(values.ndim)]
    result = np.zeros([length if other == axis else size for other, size in enumerate(values.shape)])
    for shift, weight in enumerate(weights, -1):
        part = np.take(knots, first + shift, axis=axis)
        part *= (weight / 6).reshape(along)
        result += part
    return result.astype(np.float32)


def linear_neighbours(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `new` voxels: the two of `old` around its centre, and how far it lies towards the second, 0 to 1."""
    centre = np.clip(_centres(old, new), 0, old - 1)
    low = np.floor(centre).astype(np.int64)
    share = centre - low
    # A voxel on a centre needs no second neighbour, which may belong to a slab that is not there yet.
    return low, np.where(share > 0, low + 1, low), share


def resample_label(label: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return the label map (*spatial), same dtype, on another grid: in every voxel the class that covers most.

    Each class is interpolated linearly as a 0/1 map and the largest wins (the lower class when equal to float32's
    precision). Equal shapes give the array back. Memory: the result and some 30 MB, or a few slices in float64.
    """
    shape = tuple(shape)
    if tuple(label.shape) == shape:
        return label
    result = np.empty(shape, dtype=label.dtype)
    low, high, share = linear_neighbours(label.shape[0], shape[0])
    step = _step([max(pair) for pair in zip(label.shape[1:], shape[1:], strict=True)])
    for start in range(0, shape[0], step):
        part = slice(start, min(start + step, shape[0]))
        first, last = int(low[part.start]), int(high[part.stop - 1]) + 1
        slab, output = label[first:last], result[part]
        values = np.unique(slab)
        output[...] = values[0]
        if len(values) == 1:
            continue
        best = np.full(output.shape, -1, dtype=np.float32)
        for value in values:
            cover = _blend((slab == value).astype(np.float64), 0, low[part] - first, high[part] - first, share[part])
            for axis in range(1, label.ndim):
                if label.shape[axis] != shape[axis]:
                    cover = _blend(cover, axis, *linear_neighbours(label.shape[axis], shape[axis]))
            rounded = cover.astype(np.float32)
            output[rounded > best] = value
            np.maximum(best, rounded, out=best)
    return result


def _blend(values: np.ndarray, axis: int, low: np.ndarray, high: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Interpolate linearly along one axis."""
    weight = share.reshape([-1 if other == axis else 1 for other in range(values.ndim)])
    result = np.take(values, low, axis=axis)
    result += (np.take(values, high, axis=axis) - result) * weight
    return result
