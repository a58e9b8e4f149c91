"""What the data look like: sizes, spacings, intensities and classes, from one pass over all training cases."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from lightm.datasets.cases import Case, Dataset, on_all_cores, read_case
from lightm.datasets.intensities import Intensities, case_intensities, pooled
from lightm.errors import InputError
from lightm.files import file_hash
from lightm.images.io import split_path
from lightm.progress import Progress


class ChannelIntensities(BaseModel):
    """Intensities of one channel inside the foreground (everywhere, where no case has any)."""

    model_config = ConfigDict(extra="forbid")

    mean: float
    std: float
    median: float
    low: float  # percentile 0.5
    high: float  # percentile 99.5
    min: float
    max: float
    image_low: list[float] | None = None  # smallest and largest percentile 1 of a whole image; None: not measured
    image_high: list[float] | None = None  # the same of percentile 99


class Fingerprint(BaseModel):
    """Facts of a dataset, in canonical orientation: axis order (z, y, x) or (y, x)."""

    model_config = ConfigDict(extra="forbid")

    cases: int
    data_hash: str
    shape_min: list[int]
    shape_median: list[int]
    shape_max: list[int]
    spacing_mm_min: list[float]
    spacing_mm_median: list[float]
    spacing_mm_max: list[float]
    extent_mm_min: list[float] | None = None
    extent_mm_max: list[float] | None = None
    intensities: list[ChannelIntensities]
    class_fractions: dict[str, float]
    class_cases: dict[str, int]


@dataclass(frozen=True)
class CaseFacts:
    """What one case adds to the fingerprint; `intensities` of each channel."""

    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    voxels: dict[int, int]
    intensities: list[Intensities]


def take_fingerprint(dataset: Dataset, *, progress: Progress | None = None) -> tuple[Fingerprint, list[CaseFacts]]:
    """Read every training case once; return the summary and the facts of each case.

    Deterministic: the sampled voxels depend on the case's id alone. Raises InputError, naming file and case, for
    unreadable files, geometries that disagree and unknown label values. Memory: one case per core.
    """
    if not dataset.cases:
        raise InputError(f"{dataset.root}: no training cases; add images and labels")
    facts = on_all_cores(lambda case: _case_facts(case, dataset), dataset.cases, "fingerprint", progress)
    dims = len(facts[0].shape)
    for case, found in zip(dataset.cases, facts, strict=True):
        if len(found.shape) != dims:
            raise InputError(
                f"{case.images[0]}: case {case.id} is {len(found.shape)}D, case {dataset.cases[0].id} {dims}D; "
                "keep them in datasets of their own"
            )
    shapes = np.array([found.shape for found in facts])
    spacings = np.array([found.spacing_mm for found in facts])
    voxels = {value: sum(found.voxels.get(value, 0) for found in facts) for value in dataset.values}
    total = max(1, sum(voxels.values()))
    extents = shapes * spacings
    return Fingerprint(
        cases=len(facts),
        data_hash=data_hash(dataset.cases),
        shape_min=shapes.min(0).tolist(),
        shape_median=np.median(shapes, axis=0).round().astype(int).tolist(),
        shape_max=shapes.max(0).tolist(),
        spacing_mm_min=rounded(spacings.min(0)),
        spacing_mm_median=rounded(np.median(spacings, axis=0)),
        spacing_mm_max=rounded(spacings.max(0)),
        extent_mm_min=rounded(extents.min(0)),
        extent_mm_max=rounded(extents.max(0)),
        intensities=_intensities(facts, len(dataset.channels)),
        class_fractions={name: rounded([voxels[value] / total], 4)[0] for name, value in dataset.labels.items()},
        class_cases={name: sum(value in found.voxels for found in facts) for name, value in dataset.labels.items()},
    ), facts


def data_hash(cases: Iterable[Case], content_hash: Callable[[Path], str] = file_hash) -> str:
    """Return the SHA-256 over names, sizes and contents of the cases' files, in the order of their names.

    Files keep their hash where their data set is moved or renamed. content_hash: of one file, on several threads.
    """
    given = {file for case in cases for file in (*case.images, case.label) if file is not None}
    files = sorted({split_path(file)[0] for file in given})
    contents = on_all_cores(content_hash, files)
    whole = hashlib.sha256()
    for file, content in sorted(zip((f"{file.parent.name}/{file.name}" for file in files), contents, strict=True)):
        whole.update(f"{file}\0{content}\n".encode())
    return whole.hexdigest()


def rounded(values: np.ndarray | list[float], digits: int = 6) -> list[float]:
    """Return floats with so many significant digits, for a file that people read."""
    return [float(f"{float(value):.{digits}g}") for value in values]


def _case_facts(case: Case, dataset: Dataset) -> CaseFacts:
    images, label = read_case(case, trust_image_geometry=dataset.trust_image_geometry)
    voxels: dict[int, int] = {}
    if label is not None:
        values, counts = np.unique(label.data, return_counts=True)
        voxels = {int(value): int(count) for value, count in zip(values, counts, strict=True)}
        if unknown := sorted(set(voxels) - {*dataset.values, dataset.ignore_label}):
            raise InputError(
                f"{case.label}: case {case.id}: label value {unknown[0]} is not in dataset.json, which names "
                f"{list(dataset.values)}; correct the label map, or add the value"
            )
    voxels.pop(-1 if dataset.ignore_label is None else dataset.ignore_label, None)
    canonical = images[0].to_canonical()
    intensities = case_intensities(case.id, images, label, dataset.ignore_label)
    return CaseFacts(canonical.shape, canonical.spacing_mm, voxels, intensities)


def _intensities(facts: list[CaseFacts], channels: int) -> list[ChannelIntensities]:
    result = []
    names = ("mean", "std", "median", "low", "high", "min", "max")
    for channel in range(channels):
        cases = [found.intensities[channel] for found in facts]
        values = pooled(cases)
        low, median, high = np.percentile(values, [0.5, 50, 99.5])
        numbers = rounded([values.mean(), values.std(), median, low, high, values.min(), values.max()])
        ends = np.array([one.ends for one in cases])
        image_low, image_high = (rounded([end.min(), end.max()]) for end in ends.T)
        known = dict(zip(names, numbers, strict=True))
        result.append(ChannelIntensities(**known, image_low=image_low, image_high=image_high))
    return result
