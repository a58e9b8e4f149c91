"""Fine detail of a whole comparison: every test case measured by lesion size and, for vessels, by radius."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightm.errors import LightMError
from lightm.lab.compare.bins import BinRow, Entry, bin_of, quantile_edges, summarize_bins
from lightm.lab.compare.detail import Part, RadiusCounts, is_tubular, part_scores, radius_counts
from lightm.lab.compare.images import TestImages
from lightm.lab.compare.results import Comparison
from lightm.lab.compare.summary import Summary
from lightm.progress import Progress

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
    """Measure all test cases of all finished cells.

    A component's, or a case's, score of a method is its mean over the method's seeds. Bins are quantiles of the label
    alone: of components by size; of skeleton voxels, so of length, by radius. A class is tubular when `is_tubular`
    holds in more than half of the first five test cases that have it. A case that cannot be read is left out and named
    in `problems`. Cost: `part_scores` and `radius_counts` of every case and class; memory of one case and its
    predictions.
    """
    method_of = {cell.record.id: name for name, cells in comparison.methods() for cell in cells}
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
        methods = [method_of[cell] for cell in found.predictions]
        for name, value in summary.labels.items():
            label = found.label == value
            if not label.any():
                continue
            predictions = [pred == value for pred in found.predictions.values()]
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
            edges = _radius_edges([found for _, found, _ in counts[name]])
            entries = [e for case, found, cells in counts[name] for e in _radius_entries(case, found, cells, edges)]
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
            if len(judged[name]) < _JUDGED and (read.label == value).any():
                judged[name].append(is_tubular(read.label == value, read.spacing_mm))
    return [name for name, found in judged.items() if 2 * sum(found) > len(found)]


def _part_entries(case: str, scores: Sequence[Sequence[Part]], methods: Sequence[str]) -> list[Entry]:
    entries = []
    for same in zip(*scores, strict=True):
        dsc, found = _by_method(methods, [p.dsc for p in same]), _by_method(methods, [float(p.found) for p in same])
        entries.append(Entry(case, same[0].size, dsc, found))
    return entries


def _radius_edges(found: Sequence[RadiusCounts]) -> list[float]:
    if not found:
        return []
    radius = np.concatenate([counts.radius for counts in found])
    return quantile_edges(radius, np.concatenate([counts.skeleton for counts in found]).astype(np.float64))


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
