"""What a comparison's folder holds, read back: the experiment, its finished cells, and what the networks cost.

experiment.yaml   the grid, all defaults filled in          plan.yaml, split.json   one plan and split for all cells
cells/ID/         a run folder (`lightm train`) a cell, with cell.json once the cell has ended
networks.json     parameters, operations, latency and peak memory of every network on one training patch
results.json, tables/, figures/, comparison.html            what `write_results` makes of them
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from lightm.config_io import load_json, load_yaml
from lightm.datasets.split import Split
from lightm.errors import InputError
from lightm.evaluation.evaluation import Evaluation, load_evaluation
from lightm.evaluation.figures import History, read_history
from lightm.lab.compare.experiment import Cell, Experiment
from lightm.preparation.plan import Plan, load_plan

Model = TypeVar("Model", bound=BaseModel)

CELL, NETWORKS = "cell.json", "networks.json"


class CellRecord(BaseModel):
    """How a cell ended; written as `cell.json` when its scores are there, or when it failed.

    `seconds` is the whole cell, `train_seconds` the training alone (validation and checkpoints included).
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    id: str
    network: str
    loss: str
    recipe: str
    seed: int
    fingerprint: str
    data_hash: str
    status: Literal["finished", "failed"]
    error: str | None = None
    started: str
    seconds: float
    threads: int
    train_seconds: float | None = None
    epochs: int | None = None
    steps: int | None = None
    stopped_because: str | None = None
    versions: dict[str, str]


class NetworkRecord(BaseModel):
    """What one network costs on one patch; times and memory were measured, None where that was not possible."""

    model_config = ConfigDict(extra="forbid")

    label: str
    network: str
    parameters: int
    multiply_adds: int
    patch_size: list[int]
    latency_s: float | None
    latency_threads: int | None
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class FinishedCell:
    """One scored training: its place in the grid, its record and its run folder."""

    cell: Cell
    record: CellRecord
    path: Path

    def evaluation(self) -> Evaluation:
        """Scores of every test case and class."""
        return load_evaluation(self.path / "evaluation" / "metrics.json")

    def history(self) -> History:
        """The columns of history.csv, one value an epoch."""
        return read_history(self.path / "history.csv")


@dataclass(frozen=True)
class Comparison:
    """A comparison as its folder tells it; cells that have not run or failed are not among `finished`."""

    folder: Path
    experiment: Experiment
    plan: Plan
    split: Split
    finished: list[FinishedCell]
    failed: list[CellRecord]
    networks: dict[str, NetworkRecord]

    def methods(self) -> Iterator[tuple[str, list[FinishedCell]]]:
        """Name and finished cells (one a seed) of every method with at least one, the baseline first."""
        for method in self.experiment.methods():
            cells = [found for found in self.finished if found.cell.method == method]
            if cells:
                yield self.experiment.method_name(method), cells

    @property
    def baseline(self) -> str:
        """Name of the method that the others are tested against."""
        return self.experiment.method_name(self.experiment.baseline_method)


def read_comparison(folder: Path | str) -> Comparison:
    """Read what there is of a comparison; InputError for a folder that holds none, or a broken part."""
    folder = Path(folder)
    if not (folder / "experiment.yaml").is_file():
        raise InputError(f"{folder}: holds no comparison (experiment.yaml is missing); run `lightm compare` first")
    experiment = load_yaml(folder / "experiment.yaml", Experiment)
    plan = load_plan(folder / "plan.yaml")
    finished, failed = [], []
    for cell in experiment.cells():
        path = folder / "cells" / cell.id
        record = read_cell(path)
        if record is not None and record.status == "failed":
            failed.append(record)
        elif record is not None:
            finished.append(FinishedCell(cell, record, path))
    return Comparison(
        folder=folder,
        experiment=experiment,
        plan=plan,
        split=_parsed(folder / "split.json", Split),
        finished=finished,
        failed=failed,
        networks=read_networks(folder),
    )


def read_cell(path: Path) -> CellRecord | None:
    """The record of a cell's folder, None where the cell has not ended."""
    if not (path / CELL).is_file():
        return None
    return _parsed(path / CELL, CellRecord)


def read_networks(folder: Path) -> dict[str, NetworkRecord]:
    """The costs of the networks by label; empty before they are measured."""
    path = folder / NETWORKS
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        records = [NetworkRecord.model_validate(entry) for entry in entries]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())}); delete it and run again") from error
    return {record.label: record for record in records}


def _parsed(path: Path, model: type[Model]) -> Model:
    return load_json(path, model, f"a {model.__name__}", "delete it and run again")
