"""Lesion analysis: Dice of every connected component by its size, and of a vessel by its radius.

A Dice over a whole case says little about small lesions and thin branches: the large ones hold most voxels.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial import cKDTree
from skimage.morphology import skeletonize

from lightm.errors import InputError, LightMError
from lightm.evaluation.evaluation import bootstrap_weights
from lightm.lab.compare.results import Comparison, Summary, TestImages
from lightm.lab.complexity.report import csv_text
from lightm.labels import bounding_box, mask_of
from lightm.progress import Progress

Mask = NDArray[np.bool_]

_DIAMETERS, _FILLED = 10.0, (0.65, 1.5)  # see `is_tubular`
_RADIUS_STEP = 1e-3  # mm: radii closer than this are one, so that sums over voxels stay small tables


@dataclass(frozen=True)
class Part:
    """One connected component of a label, and one prediction's score in its territory."""

    voxels: int
    size: float
    dsc: float
    found: bool


@dataclass(frozen=True)
class RadiusCounts:
    """Voxel counts by local radius (mm): `skeleton` voxels, `label`, and for each prediction `pred` and `common`."""

    radius: NDArray[np.float64]
    skeleton: NDArray[np.int64]
    label: NDArray[np.int64]
    pred: list[NDArray[np.int64]]
    common: list[NDArray[np.int64]]


def part_scores(
    label: Mask, predictions: Sequence[Mask], spacing_mm: Sequence[float], *, pixels: bool = False
) -> list[list[Part]]:
    """Score every connected component of a label in every prediction; one list of parts per prediction, same order.

    Components touch by face, edge or corner. The territory of a component is all voxels nearer to it (mm, between
    voxel centres) than to any other component of the class, so every predicted voxel belongs to one, spurious ones
    to the nearest. Within it DSC = 2|P & G| / (|P| + |G|); a component is found when the prediction shares a voxel
    with it. Sizes are in ml in 3D and mm2 in 2D, with `pixels` in pixels.

    label, predictions: bool arrays (Z, Y, X) or (Y, X) of one shape. Raises InputError for shapes that differ.
    Cost: one distance transform of the box around all masks; 12 bytes of memory per voxel of it in 3D.
    """
    _same_shape(label, predictions)
    if not label.any():
        return [[] for _ in predictions]
    box = bounding_box(np.logical_or.reduce([label, *predictions]), margin=0)
    label, predictions = label[box], [pred[box] for pred in predictions]
    numbered, count = ndimage.label(label, np.ones((3,) * label.ndim))
    nearest = ndimage.distance_transform_edt(~label, sampling=spacing_mm, return_distances=False, return_indices=True)
    territory = numbered[tuple(nearest)]
    voxels = np.bincount(numbered.ravel(), minlength=count + 1)[1:]
    unit = 1.0 if pixels else math.prod(spacing_mm) / (1000.0 if label.ndim == 3 else 1.0)
    scores = []
    for pred in predictions:
        common = np.bincount(numbered[pred], minlength=count + 1)[1:]
        near = np.bincount(territory[pred], minlength=count + 1)[1:]
        scores.append(
            [
                Part(int(size), float(size * unit), float(2 * both / (size + own)), bool(both))
                for size, both, own in zip(voxels, common, near, strict=True)
            ]
        )
    return scores


def radius_counts(label: Mask, predictions: Sequence[Mask], spacing_mm: Sequence[float]) -> RadiusCounts:
    """Count voxels of label and predictions by the radius of the label at the nearest point of its skeleton.

    The skeleton is that of Lee et al. (CVGIP 56(6):462, 1994; in 2D Zhang and Suen) as `skimage` computes it on
    voxels; the radius at a skeleton voxel is its distance in mm to the nearest voxel centre outside the label, up to
    half a voxel more than that of the object; where the image cuts the object its edge is not outside. Every voxel
    belongs to its nearest skeleton voxel (mm). Components that the skeleton leaves out get their innermost voxel.

    Arrays as in `part_scores`. Cost: thinning, O(voxels of the box x radius), and two distance transforms.
    """
    _same_shape(label, predictions)
    if not label.any():
        empty = np.zeros(0, dtype=np.int64)
        return RadiusCounts(np.zeros(0), empty, empty, [empty for _ in predictions], [empty for _ in predictions])
    box = bounding_box(np.logical_or.reduce([label, *predictions]), margin=1)
    label, predictions = label[box], [pred[box] for pred in predictions]
    distance = _inner_distance(label, spacing_mm)
    skeleton = _skeleton(label, distance)
    nearest = ndimage.distance_transform_edt(
        ~skeleton, sampling=spacing_mm, return_distances=False, return_indices=True
    )
    stepped = np.rint(distance / _RADIUS_STEP).astype(np.int64)
    radii, index = np.unique(stepped[skeleton], return_inverse=True)
    at = np.zeros(label.shape, dtype=np.int64)
    at[skeleton] = index
    at = at[tuple(nearest)]

    def count(mask: Mask) -> NDArray[np.int64]:
        return np.bincount(at[mask], minlength=len(radii)).astype(np.int64)

    return RadiusCounts(
        radii.astype(np.float64) * _RADIUS_STEP,
        count(skeleton),
        count(label),
        [count(pred) for pred in predictions],
        [count(pred & label) for pred in predictions],
    )


def is_tubular(label: Mask, spacing_mm: Sequence[float]) -> bool:
    """Whether the largest component of a label is a tube or a tree of tubes.

    With its holes filled, the skeleton of L mm (its minimum spanning tree) with radii r has to be at least 10 mean
    diameters long, and the volume L mean(pi r^2), in 2D the area L mean(2 r), 0.65 to 1.5 of the component's: a solid
    organ fails the first, the sheets in the skeleton of a rough surface the second.
    """
    if not label.any():
        return False
    numbered, _ = ndimage.label(label, np.ones((3,) * label.ndim))
    largest = numbered == np.bincount(numbered[label]).argmax()
    largest = ndimage.binary_fill_holes(largest[bounding_box(largest, margin=1)])
    distance = _inner_distance(largest, spacing_mm)
    skeleton = _skeleton(largest, distance)
    radius = distance[skeleton]
    voxel = math.prod(spacing_mm)
    length = _length(skeleton, spacing_mm)
    section = math.pi * radius**2 if label.ndim == 3 else 2 * radius
    filled = length * float(section.mean()) / (float(largest.sum()) * voxel)
    return bool(length >= _DIAMETERS * 2 * radius.mean() and _FILLED[0] <= filled <= _FILLED[1])


def _inner_distance(label: Mask, spacing_mm: Sequence[float]) -> NDArray[np.float64]:
    pad = int(label.all())  # where nothing is outside within the image, the edge has to be
    distance: NDArray[np.float64] = ndimage.distance_transform_edt(np.pad(label, pad), sampling=spacing_mm)
    return distance[(slice(pad, -pad or None),) * label.ndim]


def _skeleton(label: Mask, distance: NDArray[np.float64]) -> Mask:
    skeleton: Mask = np.asarray(skeletonize(label), dtype=bool) & label
    numbered, count = ndimage.label(label, np.ones((3,) * label.ndim))
    has = np.bincount(numbered[skeleton], minlength=count + 1) > 0
    lost = [k for k in range(1, count + 1) if not has[k]]
    if lost:
        for place in ndimage.maximum_position(distance, numbered, lost):
            skeleton[tuple(int(i) for i in place)] = True
    return skeleton


def _length(skeleton: Mask, spacing_mm: Sequence[float]) -> float:
    """Length in mm of the minimum spanning tree over neighbouring voxels."""
    places = np.argwhere(skeleton)
    first, second = cKDTree(places).query_pairs(1.5, p=np.inf, output_type="ndarray").T
    steps = np.linalg.norm((places[first] - places[second]) * np.asarray(spacing_mm), axis=1)
    tree = minimum_spanning_tree(coo_matrix((steps, (first, second)), shape=(len(places), len(places))))
    return float(tree.sum())


def _same_shape(label: NDArray[Any], predictions: Sequence[NDArray[Any]]) -> None:
    for pred in predictions:
        if pred.shape != label.shape:
            raise InputError(f"label and prediction have shapes {label.shape} and {pred.shape}; predict the case again")


# Bins over all cases --------------------------------------------------------------------------------------------------


_BINS, _FEWEST = 4, 5  # bins at most, and entries per bin at least
DRAWS = 1000


@dataclass(frozen=True)
class BinRow:
    """One class, bin and method: mean DSC, and its mean paired difference to the baseline, with 95% intervals.

    `n` counts components (`what` "size") or cases ("radius") in the bin, `found` is the share of found components.
    Intervals are percentile bootstraps over cases; None for fewer than two cases and the baseline's own difference.
    """

    what: str
    class_name: str
    unit: str
    low_edge: float
    high_edge: float
    method: str
    n: int
    cases: int
    dsc: float | None
    dsc_low: float | None
    dsc_high: float | None
    found: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None


@dataclass(frozen=True)
class Entry:
    """One component, or one case's voxels of one radius bin: its place, and each method's mean score over seeds."""

    case: str
    place: float
    dsc: Mapping[str, float]
    found: Mapping[str, float]


def quantile_edges(values: NDArray[np.float64], weights: NDArray[np.float64] | None = None) -> list[float]:
    """Edges of up to four bins that hold about equally many values (or weights), five at least; [] for no value.

    Bins are low <= value < high, the last one closed. Equal values are never parted, so bins may be fewer.
    """
    if not values.size:
        return []
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    share = np.cumsum(np.ones(values.size) if weights is None else weights[order])
    bins = int(np.clip(share[-1] // _FEWEST, 1, _BINS))
    inner = [float(ranked[np.searchsorted(share, share[-1] * k / bins, side="right")]) for k in range(1, bins)]
    low, high = float(ranked[0]), float(ranked[-1])
    return [low, *sorted({edge for edge in inner if low < edge <= high}), high]


def bin_of(value: float, edges: Sequence[float]) -> int:
    """The bin of a value within the edges."""
    return int(np.clip(np.searchsorted(edges[1:-1], value, side="right"), 0, max(0, len(edges) - 2)))


def summarize_bins(
    what: str,
    class_name: str,
    unit: str,
    entries: Sequence[Entry],
    edges: Sequence[float],
    methods: Sequence[str],
    baseline: str | None,
) -> list[BinRow]:
    """Mean and paired difference per bin and method; methods share the bins and the resampled cases."""
    rows = []
    for k in range(len(edges) - 1):
        here = [entry for entry in entries if bin_of(entry.place, edges) == k]
        cases = list(dict.fromkeys(entry.case for entry in here))
        of = np.array([cases.index(entry.case) for entry in here], dtype=np.int64)
        weights = bootstrap_weights(len(cases), DRAWS, 0)
        base = np.array([entry.dsc.get(baseline, np.nan) if baseline else np.nan for entry in here])
        for method in methods:
            dsc = np.array([entry.dsc.get(method, np.nan) for entry in here])
            known = [entry.found[method] for entry in here if method in entry.found]
            mean = _mean(dsc, of, weights)
            difference = _mean(dsc - base, of, weights) if method != baseline else (None, None, None)
            scored = np.isfinite(dsc)
            counts = (int(scored.sum()), len(set(of[scored].tolist())))
            found = float(np.mean(known)) if known else None
            bounds = (edges[k], edges[k + 1])
            rows.append(BinRow(what, class_name, unit, *bounds, method, *counts, *mean, found, *difference))
    return rows


def bins_csv(rows: Sequence[BinRow]) -> str:
    """One line per row; an undefined value is an empty cell."""
    return csv_text([field.name for field in fields(BinRow)], [astuple(row) for row in rows])


def _mean(
    values: NDArray[np.float64], of: NDArray[np.int64], weights: NDArray[np.float64]
) -> tuple[float | None, float | None, float | None]:
    known = np.isfinite(values)
    if not known.any():
        return None, None, None
    total = np.bincount(of[known], values[known], minlength=weights.shape[1])
    count = np.bincount(of[known], minlength=weights.shape[1])
    mean = float(values[known].mean())
    if (count > 0).sum() < 2:
        return mean, None, None
    drawn = weights @ count
    draws = (weights @ total)[drawn > 0] / drawn[drawn > 0]
    low, high = np.percentile(draws, [2.5, 97.5])
    return mean, float(low), float(high)


# A whole comparison ---------------------------------------------------------------------------------------------------


_JUDGED = 5  # cases that decide whether a class is tubular


@dataclass(frozen=True)
class Detail:
    """Rows of tables/size.csv and radius.csv, the tubular classes, and what could not be measured."""

    size: list[BinRow]
    radius: list[BinRow]
    tubular: list[str]
    problems: list[str]


def measure_detail(
    comparison: Comparison, summary: Summary, images: TestImages, *, progress: Progress | None = None
) -> Detail:
    """Measure all test cases of all finished trials.

    A component's, or a case's, score of a method is its mean over the method's seeds. Bins are quantiles of the label
    alone: of components by size; of skeleton voxels, so of length, by radius. A class is tubular when `is_tubular`
    holds in more than half of the first five test cases that have it. An unreadable case is left out and named in
    `problems`. Cost: `part_scores` and `radius_counts` of every case and class; memory of one case with predictions.
    """
    method_of = {trial.record.id: name for name, trials in comparison.methods() for trial in trials}
    parts: dict[str, list[Entry]] = defaultdict(list)
    counts: dict[str, list[tuple[str, RadiusCounts, list[str]]]] = defaultdict(list)
    tubular = _tubular_classes(summary, images)
    problems = []
    for done, case in enumerate(summary.test_cases):
        if progress is not None:
            progress("fine detail", done, len(summary.test_cases))
        try:
            found = images.labels(case, comparison.finished)
        except LightMError as error:
            problems.append(str(error))
            continue
        methods = [method_of[trial] for trial in found.predictions]
        for name, value in summary.labels.items():
            label = mask_of(found.label, value)
            if not label.any():
                continue
            predictions = [mask_of(pred, value) for pred in found.predictions.values()]
            scores = part_scores(label, predictions, found.spacing_mm, pixels=summary.distance_unit == "px")
            parts[name] += _part_entries(case, scores, methods)
            if name in tubular:
                counts[name].append((case, radius_counts(label, predictions, found.spacing_mm), methods))
    names = [method.name for method in summary.methods]
    baseline = next((method.name for method in summary.methods if method.is_baseline), None)
    unit = summary.distance_unit if summary.distance_unit == "px" else {2: "mm2", 3: "ml"}[summary.spatial_dims]
    size, radius = [], []
    for name in summary.labels:
        edges = quantile_edges(np.array([entry.place for entry in parts[name]]))
        size += summarize_bins("size", name, unit, parts[name], edges, names, baseline)
        if name in tubular:
            radii, lengths = ([getattr(found, key) for _, found, _ in counts[name]] for key in ("radius", "skeleton"))
            edges = quantile_edges(np.concatenate(radii), np.concatenate(lengths).astype(np.float64)) if radii else []
            entries = [e for case, found, trials in counts[name] for e in _radius_entries(case, found, trials, edges)]
            radius += summarize_bins("radius", name, summary.distance_unit, entries, edges, names, baseline)
    if progress is not None:
        progress("fine detail", len(summary.test_cases), len(summary.test_cases))
    return Detail(size, radius, tubular, problems)


def _tubular_classes(summary: Summary, images: TestImages) -> list[str]:
    judged: dict[str, list[bool]] = {name: [] for name in summary.labels}
    for case in summary.test_cases:
        if all(len(found) == _JUDGED for found in judged.values()):
            break
        try:
            read = images.labels(case, [])
        except LightMError:
            continue  # told when the case is measured
        for name, value in summary.labels.items():
            if len(judged[name]) < _JUDGED and mask_of(read.label, value).any():
                judged[name].append(is_tubular(mask_of(read.label, value), read.spacing_mm))
    return [name for name, found in judged.items() if 2 * sum(found) > len(found)]


def _part_entries(case: str, scores: Sequence[Sequence[Part]], methods: Sequence[str]) -> list[Entry]:
    entries = []
    for same in zip(*scores, strict=True):
        dsc, found = _by_method(methods, [p.dsc for p in same]), _by_method(methods, [float(p.found) for p in same])
        entries.append(Entry(case, same[0].size, dsc, found))
    return entries


def _radius_entries(case: str, found: RadiusCounts, methods: Sequence[str], edges: Sequence[float]) -> list[Entry]:
    bins = np.array([bin_of(radius, edges) for radius in found.radius], dtype=np.int64)
    entries = []
    for k in np.unique(bins):
        here = bins == k
        label = int(found.label[here].sum())
        scores = [
            2 * int(common[here].sum()) / (label + int(pred[here].sum()))
            for pred, common in zip(found.pred, found.common, strict=True)
        ]
        place = float(np.average(found.radius[here], weights=found.skeleton[here]))
        entries.append(Entry(case, place, _by_method(methods, scores), {}))
    return entries


def _by_method(methods: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    grouped: dict[str, list[float]] = defaultdict(list)
    for method, value in zip(methods, values, strict=True):
        grouped[method].append(value)
    return {method: float(np.mean(values)) for method, values in grouped.items()}
