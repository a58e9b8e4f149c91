"""Opening a dataset: the one call from which plan, training and checks start."""

from __future__ import annotations

from pathlib import Path

from lightm.datasets.cases import Case, Dataset, Problem
from lightm.datasets.check import CheckResult, check_dataset
from lightm.datasets.discovery import scan
from lightm.errors import InputError

__all__ = ["Case", "CheckResult", "Dataset", "Problem", "check_dataset", "open_dataset"]


def open_dataset(path: Path | str, *, labels: Path | str | None = None) -> Dataset:
    """Open a folder in nnU-Net's raw layout, in that of the Medical Segmentation Decathlon, or of two plain folders.

    path: the folder with dataset.json; or one with the folders images and labels; or, with `labels`, the folder of
    images. Only dataset.json and listings are read; two plain folders without dataset.json have their label maps
    read, to learn the values, which are then named label_1, label_2, ...

    Raises InputError for a folder that is none of these, a faulty dataset.json, a label without its image or the
    reverse, missing channels, and cases that exist twice. What only voxels tell is found by `check_dataset`.

    >>> data = lightm.open_dataset(lightm.phantoms("xray", folder / "data", cases=2, size=32))
    >>> [case.id for case in data.cases], data.labels
    (['xray_000', 'xray_001'], {'background': 0, 'lung': 1})
    """
    dataset, problems = scan(Path(path), None if labels is None else Path(labels))
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more problems; `lightm check` lists them all)" if len(errors) > 1 else ""
        raise InputError(f"{errors[0]}{more}")
    return dataset
