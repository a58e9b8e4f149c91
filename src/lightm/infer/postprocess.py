"""Removal of stray components from label maps, chosen on validation cases and kept with the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

Rule = tuple[int, ...]


def keep_largest(labels: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Return the label map with only the largest component of the voxels that hold one of `values`.

    Components are joined over faces, all `values` taken together; voxels outside the largest become 0. Other values
    are left alone. Of equally large ones the first in raster order stays.
    """
    components, count = ndimage.label(np.isin(labels, values))
    if count < 2:
        return labels
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    cleaned = labels.copy()
    cleaned[(components > 0) & (components != sizes.argmax())] = 0
    return cleaned


def apply_rules(labels: np.ndarray, rules: Sequence[Sequence[int]]) -> np.ndarray:
    """Apply `keep_largest` for one rule after the other."""
    for values in rules:
        labels = keep_largest(labels, values)
    return labels


def choose_rules(
    predictions: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    values: Sequence[int],
    *,
    ignore_label: int | None = None,
) -> list[Rule]:
    """Return the rules that help on these cases: all foreground `values` together first, then each by itself.

    A rule is taken when it raises the mean DSC over cases and classes and lowers that of no class. A class that is
    absent in label and prediction counts as 1 here, so that removing what is spurious counts as a gain.
    """
    rules: list[Rule] = []
    if not predictions:
        return rules
    current = list(predictions)
    before = _mean_dice(current, truths, values, ignore_label)
    for rule in [tuple(values), *((value,) for value in values if len(values) > 1)]:
        trial = [keep_largest(labels, rule) for labels in current]
        after = _mean_dice(trial, truths, values, ignore_label)
        if after.mean() > before.mean() and (after >= before).all():
            rules.append(rule)
            current, before = trial, after
    return rules


def _mean_dice(
    predictions: Sequence[np.ndarray], truths: Sequence[np.ndarray], values: Sequence[int], ignore_label: int | None
) -> np.ndarray:
    """Mean DSC over the cases, one for each value."""
    scores = np.ones((len(predictions), len(values)))
    for row, predicted, truth in zip(scores, predictions, truths, strict=True):
        kept = np.ones(truth.shape, bool) if ignore_label is None else truth != ignore_label
        for column, value in enumerate(values):
            p, g = (predicted == value) & kept, (truth == value) & kept
            total = int(p.sum()) + int(g.sum())
            if total:
                row[column] = 2 * int((p & g).sum()) / total
    return scores.mean(0)
