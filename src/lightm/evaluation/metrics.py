"""Overlap, distance and volume of one segmented case, class by class.

Symbols: P prediction, G ground truth (both sets of voxels), dP and dG their surfaces, d(x, S) the smallest
Euclidean distance in millimetres from the centre of voxel x to the centre of any voxel of S.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy import ndimage
from scipy.spatial import cKDTree

from lightm.errors import InputError, did_you_mean
from lightm.labels import Values, bounding_box, each_value, mask_of, overlap_counts

Status = Literal["present", "absent", "missed", "spurious"]
STATUSES: tuple[Status, ...] = ("present", "missed", "spurious", "absent")

_ROUNDING_MM = 1e-6  # a distance equal to the tolerance counts as within it, whatever the last bit says


class ClassMetrics(BaseModel):
    """What was measured for one class in one case; `None` stands for undefined, never for zero.

    `status` is "present" (in label and prediction), "absent" (in neither), "missed" (only in the label) or
    "spurious" (only in the prediction). Volumes are `None` in 2D.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    status: Status
    dsc: float | None
    iou: float | None
    hd95_mm: float | None
    nsd: float | None
    volume_label_ml: float | None
    volume_pred_ml: float | None
    voxels_label: int
    voxels_pred: int


def case_metrics(
    pred: NDArray[Any],
    label: NDArray[Any],
    spacing_mm: Sequence[float],
    labels: Mapping[str, Values],
    *,
    ignore_label: int | None = None,
    nsd_tolerance_mm: float | Mapping[str, float] = 1.0,
) -> dict[str, ClassMetrics]:
    """Return DSC, IoU, HD95, NSD, volumes and status of every class of one case.

    DSC = 2|P & G| / (|P| + |G|) and IoU = |P & G| / |P | G|. The surface of a mask is its voxels with at least one
    face neighbour outside the mask; beyond the image's edge counts as outside; an axis along which the image holds
    one voxel only is left out. With A = {d(x, dG) : x in dP} and B = {d(x, dP) : x in dG}:

        HD95 = max(percentile(A, 95), percentile(B, 95))           (linear interpolation between ranks)
        NSD  = (#{a in A : a <= t} + #{b in B : b <= t}) / (|A| + |B|)

    HD95 takes the larger of the two directed percentiles, as MONAI and most challenges do; pooling both directions
    first gives smaller numbers. NSD (Nikolov et al., arXiv 1809.04430) counts surface voxels, whatever their area. A
    class in neither array has all four `None` and status "absent"; a class in only one of them has DSC, IoU and NSD 0
    and HD95 `None`, as no distance to an empty surface exists.

    `pred` and `label` are integer arrays (Z, Y, X) or (Y, X) of label values; `spacing_mm` follows their axes; `labels`
    names the foreground values, of a region several, which may overlap; `nsd_tolerance_mm` is t, one for all classes or
    one each. Voxels whose label is `ignore_label` count in neither array. Raises `InputError` for shapes, spacings or
    tolerances that do not fit. Cost: per class one erosion of its bounding box and two nearest-neighbour queries over
    its surface, O(S log S) for S surface voxels.
    """
    if pred.shape != label.shape or label.ndim not in (2, 3):
        raise InputError(
            f"prediction of shape {pred.shape} and label of shape {label.shape}: expected two equal shapes "
            "(Z, Y, X) or (Y, X); write the prediction in the label's own geometry"
        )
    spacing = tuple(float(s) for s in spacing_mm)
    if len(spacing) != label.ndim or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise InputError(
            f"spacing {spacing}: expected {label.ndim} positive numbers, one for each axis of {label.shape}"
        )
    tolerances = resolve_tolerances(nsd_tolerance_mm, labels)
    voxel_ml = float(np.prod(spacing)) / 1000.0 if label.ndim == 3 else None
    # Squeezed before cropping: a structure one slice thick must keep its two faces, an image need not.
    kept = [axis for axis, size in enumerate(label.shape) if size > 1] or [0]
    shape = [label.shape[axis] for axis in kept]
    pred, label, spacing = pred.reshape(shape), label.reshape(shape), tuple(spacing[axis] for axis in kept)
    # Most of a scan is background. Beyond the box there is no foreground, so its edge means "outside" just as the
    # image's edge does.
    values = [one for value in labels.values() for one in each_value(value) if one != ignore_label]
    box = bounding_box(np.isin(pred, values) | np.isin(label, values))
    pred, label = pred[box], label[box]
    valid = None if ignore_label is None else label != ignore_label
    return {
        name: _class_metrics(mask_of(pred, value), mask_of(label, value), valid, spacing, tolerances[name], voxel_ml)
        for name, value in labels.items()
    }


def resolve_tolerances(tolerance: float | Mapping[str, float], labels: Mapping[str, Values]) -> dict[str, float]:
    """Return the NSD tolerance of every class in mm; raises `InputError` for unknown or missing classes."""
    if isinstance(tolerance, Mapping):
        for name in tolerance:
            if name not in labels:
                near = did_you_mean(name, labels)
                raise InputError(f"NSD tolerance for '{name}', which is no class{near}; classes: {', '.join(labels)}")
        if missing := [name for name in labels if name not in tolerance]:
            raise InputError(f"no NSD tolerance for {', '.join(missing)}: give one for each class, or one number")
    each = tolerance if isinstance(tolerance, Mapping) else dict.fromkeys(labels, tolerance)
    resolved = {name: float(each[name]) for name in labels}
    for name, value in resolved.items():
        if not (np.isfinite(value) and value >= 0):
            raise InputError(f"NSD tolerance of '{name}' is {value}: expected a number of millimetres >= 0")
    return resolved


def surface_distances(
    a: NDArray[np.bool_], b: NDArray[np.bool_], spacing_mm: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the distances in mm from each surface voxel of `a` to `b`'s surface, and the reverse.

    Both masks must hold at least one voxel; raises `InputError` otherwise.
    """
    if not (a.any() and b.any()):
        raise InputError("surface distance to an empty mask does not exist; test for it before the call")
    scale = np.asarray(spacing_mm, dtype=np.float64)
    points_a, points_b = np.argwhere(surface(a)) * scale, np.argwhere(surface(b)) * scale
    to_b, _ = cKDTree(points_b).query(points_a)
    to_a, _ = cKDTree(points_a).query(points_b)
    return to_b, to_a


def surface(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the voxels of `mask` that have a face neighbour outside it (the image's edge is outside)."""
    structure = ndimage.generate_binary_structure(mask.ndim, 1)
    return mask & ~ndimage.binary_erosion(mask, structure, border_value=0)


def _class_metrics(
    pred: NDArray[np.bool_],
    label: NDArray[np.bool_],
    valid: NDArray[np.bool_] | None,
    spacing: tuple[float, ...],
    tolerance_mm: float,
    voxel_ml: float | None,
) -> ClassMetrics:
    if valid is not None:
        pred, label = pred & valid, label & valid
    common, n_pred, n_label = overlap_counts(pred, label)
    sizes: dict[str, Any] = {"volume_label_ml": None, "volume_pred_ml": None}
    if voxel_ml is not None:
        sizes = {"volume_label_ml": n_label * voxel_ml, "volume_pred_ml": n_pred * voxel_ml}
    sizes.update(voxels_label=n_label, voxels_pred=n_pred)
    if not n_pred and not n_label:
        return ClassMetrics(status="absent", dsc=None, iou=None, hd95_mm=None, nsd=None, **sizes)
    if not n_pred or not n_label:
        status: Status = "missed" if n_label else "spurious"
        return ClassMetrics(status=status, dsc=0.0, iou=0.0, hd95_mm=None, nsd=0.0, **sizes)
    box = bounding_box(pred | label)
    to_label, to_pred = surface_distances(pred[box], label[box], spacing)
    limit = tolerance_mm + _ROUNDING_MM
    within = int((to_label <= limit).sum()) + int((to_pred <= limit).sum())
    return ClassMetrics(
        status="present",
        dsc=2.0 * common / (n_pred + n_label),
        iou=common / (n_pred + n_label - common),
        hd95_mm=float(max(np.percentile(to_label, 95), np.percentile(to_pred, 95))),
        nsd=within / (to_label.size + to_pred.size),
        **sizes,
    )
