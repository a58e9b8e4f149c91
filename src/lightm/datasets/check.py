"""Reading every voxel of a dataset and naming everything that would spoil a training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lightm.datasets.cases import Case, Dataset, Problem, elsewhere, error, on_all_cores, warning
from lightm.datasets.discovery import as_asked, scan
from lightm.datasets.intensities import Intensities, case_intensities, intensity_problems
from lightm.errors import LightMError
from lightm.images.io import Kind, place_remarks, read_volume, voxel_bytes
from lightm.images.limits import MemoryGate
from lightm.images.volume import Volume, geometry_difference
from lightm.labels import check_regions, each_value
from lightm.progress import Progress


@dataclass(frozen=True)
class CheckResult:
    """What a check found: problems, errors first, and a summary that JSON can hold."""

    problems: list[Problem]
    summary: dict[str, Any]

    @property
    def ok(self) -> bool:
        """True without errors; warnings do not count."""
        return not any(problem.severity == "error" for problem in self.problems)


@dataclass
class _Findings:
    problems: list[Problem] = field(default_factory=list)
    shape: tuple[int, ...] | None = None
    spacing_mm: tuple[float, ...] | None = None
    voxels: dict[int, int] = field(default_factory=dict)
    intensities: list[Intensities] = field(default_factory=list)


def check_dataset(
    dataset: Dataset | Path | str,
    *,
    labels: Path | str | None = None,
    channels: Sequence[str] | None = None,
    trust_image_geometry: bool = False,
    progress: Progress | None = None,
) -> CheckResult:
    """Read every file of a dataset and return all problems, each with its file, case and cure.

    Errors: unreadable files, NaN or infinite voxels, labels without image and the reverse, shapes or affines that
    disagree within a case, label values that dataset.json does not name, cases that exist twice, 2D among 3D,
    fewer than two cases, nothing but background, a CT channel of one intensity. Warnings: a class that never occurs or
    in one case, regions whose overlap a label map cannot give back, constant images, files that are not used, headers
    whose place in space is doubtful (`lightm.images.io.place_remarks`), and intensities that are odd
    (`lightm.datasets.intensities`).

    Raises InputError only where there is no dataset to check (no folder, no or a faulty dataset.json). Cost: each file
    read once, on all cores; memory of one case per core, and of no two cases that half of the machine's memory would
    not hold together.
    """
    if isinstance(dataset, Dataset):
        problems: list[Problem] = []
    else:
        dataset, problems = scan(Path(dataset), None if labels is None else Path(labels))
        dataset = as_asked(dataset, channels, trust_image_geometry)
    known, jobs, gate = dataset, [*dataset.cases, *dataset.test_cases], MemoryGate()

    def check(case: Case) -> _Findings:
        files = [file for file in (case.label, *case.images) if file is not None]
        with gate.hold(sum(map(voxel_bytes, files))):
            return _check_case(case, known)

    findings = on_all_cores(check, jobs, "checking", progress)
    for found in findings:
        problems += found.problems
    problems += _check_whole(dataset, jobs, findings)
    usable = [(case, found.intensities) for case, found in zip(jobs, findings, strict=True) if found.intensities]
    if usable:
        problems += intensity_problems(
            replace(dataset, cases=tuple(case for case, _ in usable)), [one for _, one in usable]
        )
    problems.sort(key=lambda problem: problem.severity != "error")
    return CheckResult(problems, _summary(dataset, findings, problems))


def _check_case(case: Case, dataset: Dataset) -> _Findings:
    findings = _Findings()
    first: tuple[Path, Volume] | None = None
    images: list[Volume] = []
    together = True
    files: list[tuple[Path, Kind]] = [(file, "image") for file in case.images]
    files += [(case.label, "label")] if case.label is not None else []
    for file, kind in files:
        try:
            volume = read_volume(file, kind=kind)
        except LightMError as refusal:
            message, _, cure = str(refusal).removeprefix(f"{file}: ").rpartition("; ")
            findings.problems.append(error(case.id, file, message or cure, cure if message else "replace it"))
            continue
        if kind == "image":
            findings.problems += [warning(case.id, file, *remark) for remark in place_remarks(file)]
        if first is None:
            first = (file, volume)
            findings.shape, findings.spacing_mm = volume.shape, volume.to_canonical().spacing_mm
        elif difference := geometry_difference(volume, first[1]):
            if not dataset.trust_image_geometry or volume.shape != first[1].shape:
                findings.problems.append(error(case.id, file, *elsewhere(case, difference, first[1], volume)))
                together = False
            else:
                volume = first[1].with_data(volume.data)
        if kind == "label":
            findings.voxels = _counted(volume.data)
            allowed = {*dataset.values, *([] if dataset.ignore_label is None else [dataset.ignore_label])}
            if unknown := sorted(findings.voxels.keys() - allowed):
                listed = ", ".join(map(str, unknown[:8])) + (", ..." if len(unknown) > 8 else "")
                message = f"label value {listed} is not in dataset.json, which names {sorted(allowed)}"
                cure = "correct the label map, or add the value to dataset.json"
                findings.problems.append(error(case.id, file, message, cure))
        elif volume.data.min() == volume.data.max():
            cure = "check that the export worked"
            findings.problems.append(warning(case.id, file, "every voxel has the same value", cure))
        if kind == "image":
            images.append(volume)
        elif together and len(images) == len(case.images):
            findings.intensities = case_intensities(case.id, images, volume, dataset.ignore_label)
    return findings


def _counted(label: np.ndarray) -> dict[int, int]:
    """Return how often each value occurs, for uint8 and int16, slice by slice."""
    counts = np.zeros(1 << 16, np.int64)
    for part in label:
        counts += np.bincount(part.ravel().astype(np.int32) + (1 << 15), minlength=1 << 16)
    return {int(at) - (1 << 15): int(counts[at]) for at in np.flatnonzero(counts)}


def _check_whole(dataset: Dataset, jobs: list[Case], findings: list[_Findings]) -> list[Problem]:
    problems = []
    if len(dataset.cases) < 2:
        message = f"{len(dataset.cases)} usable training cases; one to train on and one to validate on are needed"
        problems.append(error(None, dataset.root, message, "add cases (ten or more are sensible)"))
    dims = Counter(len(found.shape) for found in findings if found.shape)
    if len(dims) > 1:
        rare, common = min(dims, key=dims.__getitem__), max(dims, key=dims.__getitem__)
        for case, found in zip(jobs, findings, strict=True):
            if found.shape and len(found.shape) == rare:
                message = f"a {rare}D image among {common}D ones"
                problems.append(error(case.id, case.images[0], message, "keep them in a dataset of their own"))
    what = "region" if dataset.regions else "class"
    if dataset.regions:
        for value, written in check_regions(dataset.regions, dataset.regions_class_order).items():
            message = f"label {value} belongs to other regions than {written}, which is written where it is found"
            cure = "regions that overlap, and neither of which holds the other, lose what they share to the later one"
            problems.append(warning(None, dataset.root, message, cure))
    held = {
        name: [
            case.id for case, found in zip(jobs, findings, strict=True) if found.voxels.keys() & set(each_value(values))
        ]
        for name, values in dataset.targets.items()
    }
    labelled = any(found.voxels for found in findings)
    if labelled and not any(held.values()):
        message = "every label map is background only: nothing to learn"
        problems.append(error(None, dataset.root, message, "check the labels"))
    elif labelled:
        for name, cases in held.items():
            named = f"{what} '{name}' (value {', '.join(map(str, each_value(dataset.targets[name])))})"
            if not cases:
                message = f"{named} occurs in no label map; `lightm train` goes on, but it cannot be learnt or found"
                cure = "remove it from dataset.json, or add cases that have it"
                problems.append(warning(None, dataset.root, message, cure))
            elif len(cases) == 1 < len(dataset.cases):
                message = f"{named} occurs in one case only; `lightm train` keeps it in training, so it is not tested"
                problems.append(warning(cases[0], None, message, "add cases that have it"))
    return problems


def _summary(dataset: Dataset, findings: list[_Findings], problems: list[Problem]) -> dict[str, Any]:
    training, classes = findings[: len(dataset.cases)], dataset.labels.items()
    total = max(1, sum(sum(found.voxels.values()) for found in training))
    common = Counter(len(found.shape) for found in training if found.shape).most_common(1)
    used = [found for found in training if found.shape and len(found.shape) == common[0][0]]
    summary: dict[str, Any] = {
        "name": dataset.name,
        "training_cases": len(dataset.cases),
        "test_cases": len(dataset.test_cases),
        "channels": list(dataset.channels),
        "labels": dict(dataset.labels),
        "file_ending": dataset.file_ending,
        "errors": sum(problem.severity == "error" for problem in problems),
        "warnings": sum(problem.severity == "warning" for problem in problems),
        "class_cases": {name: sum(value in found.voxels for found in training) for name, value in classes},
        "class_fractions": {
            name: float(f"{sum(found.voxels.get(value, 0) for found in training) / total:.4g}")
            for name, value in classes
        },
    }
    if dataset.regions:
        summary["regions"] = {name: list(values) for name, values in dataset.regions.items()}
        summary["regions_class_order"] = list(dataset.regions_class_order)
        summary["region_cases"] = {
            name: sum(not found.voxels.keys().isdisjoint(values) for found in training)
            for name, values in dataset.regions.items()
        }
    if used:
        summary["shape"] = _spread(np.array([found.shape for found in used]), 0)
        summary["spacing_mm"] = _spread(np.array([found.spacing_mm for found in used]), 4)
    return summary


def _spread(rows: np.ndarray, digits: int) -> dict[str, list[float]]:
    ends = {"min": rows.min(0), "median": np.median(rows, axis=0), "max": rows.max(0)}
    return {name: row.round(digits).astype(rows.dtype).tolist() for name, row in ends.items()}
