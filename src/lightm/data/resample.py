"""Resampling of images and label maps onto a grid of another spacing over the same space."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage


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
