"""Images, labels and predictions of a comparison's test cases, read one case at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightm.datasets.cases import Dataset
from lightm.datasets.discovery import open_dataset
from lightm.errors import InputError
from lightm.evaluation.folder import case_files
from lightm.evaluation.run_folder import RunFolder, read_run
from lightm.images.io import read_volume
from lightm.lab.compare.results import Comparison, FinishedCell


@dataclass(frozen=True)
class CaseLabels:
    """Label of one case and its predictions by cell id; (Z, Y, X) nearest to right-anterior-superior, or (Y, X).

    Where the label has the value to ignore, label and predictions are 0.
    """

    label: NDArray[Any]
    predictions: dict[str, NDArray[Any]]
    spacing_mm: tuple[float, ...]


class TestImages:
    """Opens the data set that the cells were trained on; InputError where it is gone, or no cell is left."""

    __test__ = False  # for pytest: no test in spite of its name

    def __init__(self, comparison: Comparison) -> None:
        if not comparison.finished:
            raise InputError("no training has finished, so there is no prediction")
        self.run: RunFolder = read_run(comparison.finished[0].path)
        given = self.run.config.get("dataset")
        if not given:
            raise InputError(f"{self.run.path / 'config.yaml'}: names no data set")
        labels = self.run.config.get("labels")
        self.dataset: Dataset = open_dataset(Path(given), labels=Path(labels) if isinstance(labels, str) else None)
        self.ignore_label = comparison.plan.ignore_label
        self.predictions: Mapping[str, Mapping[str, Path]] = {
            cell.record.id: case_files(cell.path / "predictions") if (cell.path / "predictions").is_dir() else {}
            for cell in comparison.finished
        }
        if not any(self.predictions.values()):
            raise InputError(f"{comparison.folder / 'cells'}: the trainings hold no predictions")

    def image(self, case_id: str) -> NDArray[Any]:
        """The first channel of a case, oriented as its label."""
        return np.ascontiguousarray(read_volume(self.dataset.case(case_id).images[0]).to_canonical().data)

    def labels(self, case_id: str, cells: list[FinishedCell]) -> CaseLabels:
        """Label and predictions of a case; a cell without a prediction of it is left out.

        Raises InputError for a case that is gone and for a prediction that is not of the label's shape.
        """
        path = self.dataset.case(case_id).label
        if path is None:
            raise InputError(f"case {case_id}: has no label")
        native = read_volume(path, kind="label").to_canonical()
        label = np.array(native.data)
        ignored = label == self.ignore_label if self.ignore_label is not None else None
        if ignored is not None:
            label[ignored] = 0
        predictions = {}
        for cell in cells:
            source = self.predictions[cell.record.id].get(case_id)
            if source is None:
                continue
            pred = np.array(read_volume(source, kind="label").to_canonical().data)
            if pred.shape != label.shape:
                raise InputError(
                    f"case {case_id}: its label has shape {label.shape}, the prediction {source} {pred.shape}; the "
                    "data set has changed since, or that prediction is of something else"
                )
            if ignored is not None:
                pred[ignored] = 0
            predictions[cell.record.id] = pred
        return CaseLabels(label, predictions, tuple(native.spacing_mm))
