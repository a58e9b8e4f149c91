"""Lesions one by one: which true ones were found, which predicted ones are false, how well each size is segmented.

Detection matches whole lesions, so that a predicted one is either a true one or false. `lightm compare` asks another
question, how well each size is segmented by several methods, and shares every predicted voxel among the true components
instead (`part_scores`): no lesion is false there.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy import ndimage

from lightm.files import write_text
from lightm.labels import Values, mask_of


class LesionRow(BaseModel):
    """One lesion. status: "found" (true, and matched by a predicted one), "missed" (true) or "false" (predicted).

    dsc, iou: with the lesion that it is matched with, 0 without one. Volumes in ml, None in 2D.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    case: str
    class_name: str
    status: Literal["found", "missed", "false"]
    voxels_label: int
    voxels_pred: int
    volume_label_ml: float | None
    volume_pred_ml: float | None
    dsc: float
    iou: float


class SizeGroup(BaseModel):
    """The true lesions of `low` to `high` (ml, in 2D pixels), a third of all; dsc: their mean, 0 for a missed one."""

    model_config = ConfigDict(extra="forbid")

    low: float
    high: float
    lesions: int
    found: int
    dsc: float


class LesionSummary(BaseModel):
    """All lesions of one class over all cases. None: undefined, without true or without predicted lesions.

    sensitivity = found / lesions, precision = found / (found + false), f1 = 2 found / (lesions + found + false),
    dsc_found: mean over the found ones, sizes: from the smallest third to the largest.
    """

    model_config = ConfigDict(extra="forbid")

    class_name: str
    min_iou: float
    lesions: int
    found: int
    false: int
    false_per_case: float
    sensitivity: float | None
    precision: float | None
    f1: float | None
    dsc_found: float | None
    sizes: list[SizeGroup]


def case_lesions(
    case: str,
    pred: NDArray[Any],
    label: NDArray[Any],
    spacing_mm: Sequence[float],
    labels: Mapping[str, Values],
    *,
    ignore_label: int | None = None,
    min_iou: float = 0.1,
) -> list[LesionRow]:
    """Return a row for every true lesion of a case and for every predicted one that is no true one.

    A lesion is a connected component of a class (voxels that share a face, an edge or a corner). Pairs of a true and a
    predicted lesion with an IoU of at least `min_iou` are matched in falling order of IoU, each lesion once, so that
    two predicted pieces of one lesion are one found and one false. That is the naive one-to-one matching of panoptic
    quality (Kirillov et al., arXiv 1801.00868), which asks for more than 0.5.

    pred, label: integer arrays (Z, Y, X) or (Y, X) of one shape. labels: foreground names and values, or regions.
    Voxels whose label is `ignore_label` belong to nothing. Cost: two labellings of each class.

    >>> truth, found = np.zeros((2, 8), int), np.zeros((2, 8), int)
    >>> truth[0, :2] = truth[0, 4:6] = found[0, 0] = found[1, 7] = 1
    >>> [row.status for row in case_lesions("a", found, truth, (1, 1), {"lesion": 1})]
    ['found', 'missed', 'false']
    """
    voxel_ml = float(np.prod(spacing_mm)) / 1000 if label.ndim == 3 else None
    structure = np.ones((3,) * label.ndim, bool)
    valid = None if ignore_label is None else label != ignore_label
    rows = []
    for name, value in labels.items():
        masks = [mask_of(array, value) for array in (label, pred)]
        masks = masks if valid is None else [mask & valid for mask in masks]
        (true, n_true), (guess, n_guess) = (ndimage.label(mask, structure) for mask in masks)
        size_true = np.bincount(true.ravel(), minlength=n_true + 1)[1:]
        size_guess = np.bincount(guess.ravel(), minlength=n_guess + 1)[1:]
        both = (true > 0) & (guess > 0)
        pairs, shared = np.unique(true[both].astype(np.int64) * (n_guess + 1) + guess[both], return_counts=True)
        match: dict[int, tuple[int, int]] = {}
        taken: set[int] = set()
        i, j = pairs // (n_guess + 1) - 1, pairs % (n_guess + 1) - 1
        iou = shared / (size_true[i] + size_guess[j] - shared)
        for k in np.argsort(-iou, kind="stable"):
            if iou[k] >= min_iou and int(i[k]) not in match and int(j[k]) not in taken:
                match[int(i[k])] = (int(j[k]), int(shared[k]))
                taken.add(int(j[k]))
        lesions = [(int(size), *match.get(index, (None, 0))) for index, size in enumerate(size_true)]
        lesions += [(0, index, 0) for index in range(n_guess) if index not in taken]
        for n_label, other, common in lesions:
            n_pred = 0 if other is None else int(size_guess[other])
            status: Literal["found", "missed", "false"] = "found" if common else "missed" if n_label else "false"
            rows.append(
                LesionRow(
                    case=case,
                    class_name=name,
                    status=status,
                    voxels_label=n_label,
                    voxels_pred=n_pred,
                    volume_label_ml=None if voxel_ml is None else n_label * voxel_ml,
                    volume_pred_ml=None if voxel_ml is None else n_pred * voxel_ml,
                    dsc=2 * common / (n_label + n_pred),
                    iou=common / (n_label + n_pred - common),
                )
            )
    return rows


def summarize_lesions(
    rows: Sequence[LesionRow], classes: Sequence[str], cases: int, min_iou: float
) -> list[LesionSummary]:
    """Return the summary of each class over so many cases; `min_iou` is that of the rows."""
    summaries = []
    for name in classes:
        own = [row for row in rows if row.class_name == name]
        true = sorted((row for row in own if row.status != "false"), key=_size)
        dsc = [row.dsc for row in true if row.status == "found"]
        found, false = len(dsc), len(own) - len(true)
        thirds = [true[len(true) * part // 3 : len(true) * (part + 1) // 3] for part in range(3)]
        summaries.append(
            LesionSummary(
                class_name=name,
                min_iou=min_iou,
                lesions=len(true),
                found=found,
                false=false,
                false_per_case=false / max(1, cases),
                sensitivity=found / len(true) if true else None,
                precision=found / (found + false) if found + false else None,
                f1=2 * found / (len(true) + found + false) if own else None,
                dsc_found=float(np.mean(dsc)) if dsc else None,
                sizes=[
                    SizeGroup(
                        low=_size(third[0]),
                        high=_size(third[-1]),
                        lesions=len(third),
                        found=sum(row.status == "found" for row in third),
                        dsc=float(np.mean([row.dsc for row in third])),
                    )
                    for third in thirds
                    if third
                ],
            )
        )
    return summaries


def write_lesions(rows: Sequence[LesionRow], path: Path) -> None:
    """Write one row per lesion as CSV; an undefined value is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(LesionRow.model_fields)
    writer.writerow(["class" if name == "class_name" else name for name in names])
    writer.writerows(["" if (value := getattr(row, name)) is None else value for name in names] for row in rows)
    write_text(path, text.getvalue())


def _size(row: LesionRow) -> float:
    return float(row.voxels_label) if row.volume_label_ml is None else row.volume_label_ml
