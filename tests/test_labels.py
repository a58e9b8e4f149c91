"""Counts of two masks and the box around one, by hand."""

from __future__ import annotations

import numpy as np
import torch

from lightm.labels import bounding_box, overlap_counts


def test_counts_by_hand_of_arrays_and_tensors() -> None:
    pred, label = np.array([[1, 1, 0], [1, 0, 0]], bool), np.array([[1, 0, 1], [1, 0, 1]], bool)
    valid = np.array([[1, 1, 1], [1, 1, 0]], bool)
    assert overlap_counts(pred, label) == (2, 3, 4)
    assert overlap_counts(pred, label, valid) == (2, 3, 3)
    counts = overlap_counts(*(torch.from_numpy(mask) for mask in (pred, label, valid)))
    assert [int(count) for count in counts] == [2, 3, 3]


def test_boxes_by_hand() -> None:
    mask = np.zeros((5, 6), bool)
    assert bounding_box(mask) == (slice(0, 5), slice(0, 6))
    mask[1, 2] = mask[3, 5] = True
    assert bounding_box(mask) == (slice(1, 4), slice(2, 6))
    assert bounding_box(mask, margin=1) == (slice(0, 5), slice(1, 6))
