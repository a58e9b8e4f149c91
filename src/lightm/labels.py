"""Label maps as every room counts them: the value to ignore, how far two masks overlap, the box around one."""

from __future__ import annotations

from typing import Any

import numpy as np

IGNORE_INDEX = 255
"""The class index of voxels that take no part in losses and scores; class indices are stored in bytes."""


def overlap_counts(pred: Any, label: Any, valid: Any = None) -> tuple[Any, Any, Any]:
    """Return |P & G|, |P| and |G|, from which DSC = 2|P & G| / (|P| + |G|) and IoU follow.

    pred, label: boolean masks of one shape, NumPy arrays, which give whole numbers, or tensors, which give tensors of
    one number on their device. valid: where to count, everywhere by default.

    >>> overlap_counts(np.array([True, True, False]), np.array([True, False, False]))
    (1, 2, 1)
    """
    if valid is not None:
        pred, label = pred & valid, label & valid
    masks = (pred & label, pred, label)
    if isinstance(pred, np.ndarray):
        common, in_pred, in_label = (int(np.count_nonzero(mask)) for mask in masks)
        return common, in_pred, in_label
    return masks[0].sum(), masks[1].sum(), masks[2].sum()


def bounding_box(mask: np.ndarray, margin: int = 0) -> tuple[slice, ...]:
    """Return the box around a boolean mask, `margin` voxels wider but inside the array; of an empty mask all of it.

    >>> bounding_box(np.array([False, True, True, False]))
    (slice(1, 3, None),)
    """
    box = []
    for axis, size in enumerate(mask.shape):
        (where,) = np.nonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        ends = (max(0, int(where[0]) - margin), min(size, int(where[-1]) + 1 + margin)) if where.size else (0, size)
        box.append(slice(*ends))
    return tuple(box)
