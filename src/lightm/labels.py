"""Label maps as every room counts them: what to ignore, classes and regions, overlap of masks, boxes around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightm.errors import InputError

IGNORE_INDEX = 255
"""The class index of voxels that take no part in losses and scores; class indices are stored in bytes."""

MAX_REGIONS = 62
"""Regions of a data set; in which of them a voxel lies is kept as the bits of one number."""

Values = int | Sequence[int]
"""What stands for a class in a label map, one value, or for a region, several."""


def mask_of(array: Any, values: Values) -> Any:
    """Return where an array or tensor holds a value, or one of several: a boolean mask of its shape.

    >>> mask_of(np.array([0, 1, 2, 3]), (1, 3))
    array([False,  True, False,  True])
    """
    if isinstance(values, int | np.integer):
        return array == values
    mask = array == values[0]
    for value in values[1:]:
        mask |= array == value
    return mask


def each_value(values: Values) -> tuple[int, ...]:
    """Return the label values of a class or a region.

    >>> each_value(3), each_value([1, 2])
    ((3,), (1, 2))
    """
    return (int(values),) if isinstance(values, int | np.integer) else tuple(values)


def targets_of(labels: Mapping[str, int], regions: Mapping[str, Sequence[int]]) -> dict[str, Values]:
    """Return what is trained, found and scored, name to value: the regions, or else all labels but the background.

    >>> targets_of({"background": 0, "liver": 1}, {})
    {'liver': 1}
    """
    if regions:
        return {name: tuple(values) for name, values in regions.items()}
    return {name: value for name, value in labels.items() if value != 0}


def check_regions(regions: Mapping[str, Sequence[int]], order: Sequence[int]) -> dict[int, int]:
    """Check nnU-Net's regions; return the values that a label map cannot give back, each with what stands in its place.

    regions: name to label values. order: nnU-Net's regions_class_order, the value that is written where a region is
    found, in the order of the regions; later ones replace earlier ones. A value that is not given back belongs to
    other regions than what is written for it, as where two regions overlap and neither holds the other.
    Raises InputError for no or doubled values, equal regions, an order of another length or of values outside of
    their regions, and for a region that others always replace.

    >>> check_regions({"whole": [1, 2], "core": [2]}, [1, 2])
    {}
    """
    if len(regions) > MAX_REGIONS:
        raise InputError(f"{len(regions)} regions; at most {MAX_REGIONS} are possible")
    sets: dict[frozenset[int], str] = {}
    for name, values in regions.items():
        held = frozenset(values)
        if not values or len(held) < len(values):
            raise InputError(f"region '{name}' holds the values {list(values)}; expected one or more, each once")
        if 0 in held:
            raise InputError(f"region '{name}' holds 0, which is the background; take it out of the region")
        if (twin := sets.setdefault(held, name)) != name:
            raise InputError(f"regions '{twin}' and '{name}' hold the same values {sorted(held)}; keep one of them")
    named = ", ".join(f"'{name}'" for name in regions)
    remedy = f'write "regions_class_order" with one value for each of {named}: what label maps hold where it is found'
    if not order:
        raise InputError(f"the labels have regions, but no regions_class_order; {remedy}, larger regions first")
    if len(order) != len(regions):
        raise InputError(f"regions_class_order {list(order)} has {len(order)} value(s) for {len(regions)}; {remedy}")
    for (name, values), written in zip(regions.items(), order, strict=True):
        if written not in values:
            raise InputError(
                f"regions_class_order writes {written} where '{name}' is found, which holds {list(values)}; write one "
                "of these"
            )
    if len(set(order)) < len(order):
        raise InputError(f"regions_class_order {list(order)} holds a value twice; give each region one of its own")
    members = {v: {n for n, held in regions.items() if v in held} for values in regions.values() for v in values}
    given = {
        v: next(w for (_, held), w in reversed([*zip(regions.items(), order, strict=True)]) if v in held)
        for v in members
    }
    for name, values in regions.items():
        if not any(given[value] in values for value in values):
            raise InputError(
                f"regions_class_order {list(order)}: '{name}' {list(values)} would always be replaced by a region that "
                "comes later; name larger regions first, in labels and in regions_class_order alike"
            )
    return {value: written for value, written in sorted(given.items()) if members[value] != members[written]}


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
