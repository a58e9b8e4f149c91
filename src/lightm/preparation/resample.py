"""Resampling of images and label maps onto a grid of another spacing over the same space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

from lightm.images.disk_array import Spool

# Voxels of a slab that is resampled at once; in float64, with its copies, some 30 MB.
_SLAB_VOXELS = 1 << 19
# The recursive filter's memory of an edge: the pole -0.268 to the power of 12 is below 2e-7; as in scipy.
_EDGE = 12


def resampled_shape(shape: Sequence[int], spacing_mm: Sequence[float], target_mm: Sequence[float]) -> tuple[int, ...]:
    """Return the shape that covers the same space at the target spacing; at least one voxel on every axis."""
    return tuple(
        max(1, round(size * step / target)) for size, step, target in zip(shape, spacing_mm, target_mm, strict=True)
    )


def resample_image(image: np.ndarray, shape: Sequence[int], *, order: int = 3) -> np.ndarray:
    """Return the image (C, *spatial), float32, on another grid over the same space.

    Voxels are boxes: the outer edges of the first and last stay where they are. Splines of the given order (3:
    cubic), constant beyond the edges, no smoothing before making smaller. Equal shapes give the array back.
    """
    if tuple(image.shape[1:]) == tuple(shape):
        return image.astype(np.float32, copy=False)
    result = np.empty((image.shape[0], *shape), dtype=np.float32)
    for channel, output in zip(image, result, strict=True):
        _zoom(channel.astype(np.float32, copy=False), output, order)
    return result


def resample_stream(
    read: Callable[[int, int], np.ndarray],
    shape: Sequence[int],
    target: Sequence[int],
    folder: Path | None = None,
) -> Spool:
    """Resample one channel as `resample_image` does (order 3), slab by slab, into a `Spool` of shape `target`, float32.

    read(start, stop): slices of the image of `shape` along its first axis. folder: where temporary files go, None for
    memory. The spline is a product of splines along the axes, so that each line of voxels is filtered and evaluated
    by itself, in float64: the result does not depend on the slabs. It agrees with `resample_image` up to rounding to
    float32, once an axis.

    Cost: some 25 ns a voxel and axis. Memory: 30 MB and a few slices, and without `folder` the result and an image of
    the target's shape but the source's length.
    """
    shape, target = tuple(shape), tuple(target)
    across = Spool((shape[0], *target[1:]), np.float32, folder)
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
    result = Spool(target, np.float32, folder)
    step = _step((max(shape[0], target[0]), *target[2:]))
    for start in range(0, target[1], step):
        block = (slice(start, min(start + step, target[1])), *rest[1:])
        lines = across.read((slice(0, shape[0]), *block))
        result.write((slice(0, target[0]), *block), _spline(lines, 0, target[0]))
    across.close()
    return result


def stream_bytes(shape: Sequence[int], target: Sequence[int]) -> int:
    """Return what `resample_stream` needs at most beside what it keeps: float64 knots, taps and sum of one slab."""
    across = _step(shape[1:]) * _padded(shape[1:], target[1:])
    down = (
        _step((max(shape[0], target[0]), *target[2:])) * _padded((shape[0],), (target[0],)) * int(np.prod(target[2:]))
    )
    return 36 * max(across, down)


def _step(shape: Sequence[int]) -> int:
    return max(1, _SLAB_VOXELS // (int(np.prod(shape)) + _EDGE))


def _padded(shape: Sequence[int], target: Sequence[int]) -> int:
    """Voxels of an array at its largest while one axis after the other, with its margin, takes its new length."""
    return int(np.prod([max(old + 2 * _EDGE, new) for old, new in zip(shape, target, strict=True)]))


def _spline(values: np.ndarray, axis: int, length: int) -> np.ndarray:
    """Resample one axis to `length` by the cubic B-spline through all voxels, constant beyond the edges; float32."""
    old = values.shape[axis]
    if old == length:
        return values
    pads = [(_EDGE, _EDGE) if other == axis else (0, 0) for other in range(values.ndim)]
    # As `ndimage.zoom`: the filter's own boundary lies beyond a margin of repeated edge voxels.
    padded = np.pad(values, pads, mode="edge")
    knots = ndimage.spline_filter1d(padded, 3, axis=axis, output=np.float64, mode="nearest")
    centre = (np.arange(length) + 0.5) * (old / length) - 0.5 + _EDGE
    first = np.floor(centre).astype(np.int64)
    t = centre - first
    weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    along = [-1 if other == axis else 1 for other in range(values.ndim)]
    result = np.zeros([length if other == axis else size for other, size in enumerate(values.shape)])
    for shift, weight in enumerate(weights, -1):
        tap = np.take(knots, first + shift, axis=axis)
        tap *= (weight / 6).reshape(along)
        result += tap
    return result.astype(np.float32)


def resample_label(label: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return the label map (*spatial), same dtype, on another grid: in every voxel the class that covers most.

    Each class is interpolated linearly as a 0/1 map and the largest wins (the lower class when equal). Memory: three
    float32 maps, whatever the number of classes.
    """
    if tuple(label.shape) == tuple(shape):
        return label
    values = np.unique(label)
    result = np.full(tuple(shape), values[0], dtype=label.dtype)
    if len(values) == 1:
        return result
    best = np.full(tuple(shape), -1, dtype=np.float32)
    share = np.empty(tuple(shape), dtype=np.float32)
    for value in values:
        _zoom((label == value).astype(np.float32), share, 1)
        higher = share > best
        result[higher] = value
        np.maximum(best, share, out=best)
    return result


def _zoom(source: np.ndarray, output: np.ndarray, order: int) -> None:
    # A mean of 1e6 would cost float32 splines their digits; they are computed in float64 inside.
    factors = [new / old for new, old in zip(output.shape, source.shape, strict=True)]
    ndimage.zoom(source, factors, output=output, order=order, mode="nearest", grid_mode=True, prefilter=order > 1)
