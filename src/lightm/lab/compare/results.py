"""What a comparison's folder holds: trials read back, and statistics as models (results.json).

experiment.yaml   the grid, all defaults filled in          plan.yaml, split.json   one plan and split for all trials
trials/ID/         the run folder (`lightm train`) of a trial, with trial.json once it has ended
networks.json     parameters, MACs, latency and peak memory of every network on one training patch
results.json, tables/, figures/, comparison.html            what `write_results` makes of them

A configuration (network, loss and recipe) is called a method in the files: their format's name since its first version.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from lightm.config_io import load_json, load_yaml
from lightm.datasets.cases import Dataset
from lightm.datasets.discovery import open_dataset
from lightm.datasets.split import Split
from lightm.errors import InputError
from lightm.evaluation.evaluation import CaseRow, Evaluation, load_evaluation
from lightm.evaluation.figures import History, read_history
from lightm.evaluation.folder import case_files
from lightm.evaluation.metrics import Status
from lightm.evaluation.run_folder import RunFolder, read_run
from lightm.files import write_text
from lightm.images.io import read_volume
from lightm.lab.compare.experiment import Experiment, Strict, Trial
from lightm.preparation.plan import Plan, load_plan

Model = TypeVar("Model", bound=BaseModel)

TRIAL, NETWORKS = "trial.json", "networks.json"


class TrialRecord(Strict):
    """trial.json: how a trial ended. `seconds` is the whole trial, `train_seconds` its training with validation."""

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


class NetworkRecord(Strict):
    """What one network costs on one patch; latency and memory are None where they could not be measured."""

    label: str
    network: str
    parameters: int
    multiply_adds: int
    patch_size: list[int]
    latency_s: float | None
    latency_threads: int | None
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class FinishedTrial:
    """One scored training: its place in the grid, record and run folder."""

    trial: Trial
    record: TrialRecord
    path: Path

    def evaluation(self) -> Evaluation:
        return load_evaluation(self.path / "evaluation" / "metrics.json")

    def history(self) -> History:
        return read_history(self.path / "history.csv")


@dataclass(frozen=True)
class Comparison:
    """A comparison as its folder tells it; trials that have not run or failed are not among `finished`."""

    folder: Path
    experiment: Experiment
    plan: Plan
    split: Split
    finished: list[FinishedTrial]
    failed: list[TrialRecord]
    networks: dict[str, NetworkRecord]

    def methods(self) -> Iterator[tuple[str, list[FinishedTrial]]]:
        """Name and finished trials (one per seed) of every method with at least one, the baseline first."""
        for method in self.experiment.methods():
            trials = [found for found in self.finished if found.trial.method == method]
            if trials:
                yield self.experiment.method_name(method), trials

    @property
    def baseline(self) -> str:
        return self.experiment.method_name(self.experiment.baseline_method)


def read_comparison(folder: Path | str) -> Comparison:
    """Read what there is of a comparison; InputError for a folder that holds none, or a broken part."""
    folder = Path(folder)
    if not (folder / "experiment.yaml").is_file():
        raise InputError(f"{folder}: holds no comparison (experiment.yaml is missing); run `lightm compare` first")
    refuse_earlier_layout(folder)
    experiment = load_yaml(folder / "experiment.yaml", Experiment)
    plan = load_plan(folder / "plan.yaml")
    paths = {trial: folder / "trials" / trial.id for trial in experiment.trials()}
    ended = [(trial, record) for trial, path in paths.items() if (record := read_trial(path)) is not None]
    return Comparison(
        folder=folder,
        experiment=experiment,
        plan=plan,
        split=_parsed(folder / "split.json", Split),
        finished=[FinishedTrial(t, record, paths[t]) for t, record in ended if record.status == "finished"],
        failed=[record for _, record in ended if record.status == "failed"],
        networks=read_networks(folder),
    )


def refuse_earlier_layout(folder: Path) -> None:
    """Raise InputError for a comparison whose trials lie in `cells/`, where they lay before."""
    if (folder / "cells").is_dir() and not (folder / "trials").exists():
        raise InputError(
            f"{folder}: written by an earlier version. Rename its folder cells to trials, and cell.json in each of the "
            "folders in it to trial.json; then run `lightm compare` again"
        )


def read_trial(path: Path) -> TrialRecord | None:
    """The record of a trial's folder, None where the trial has not ended."""
    return _parsed(path / TRIAL, TrialRecord) if (path / TRIAL).is_file() else None


def read_networks(folder: Path) -> dict[str, NetworkRecord]:
    """The costs of the networks by label; empty before they are measured."""
    path = folder / NETWORKS
    if not path.is_file():
        return {}
    try:
        records = [NetworkRecord.model_validate(entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())}); delete it and run again") from error
    return {record.label: record for record in records}


def _parsed(path: Path, model: type[Model]) -> Model:
    return load_json(path, model, f"a {model.__name__}", "delete it and run again")


# Images and predictions of the test cases -----------------------------------------------------------------------------


@dataclass(frozen=True)
class CaseLabels:
    """Label of one case and its predictions by trial id; (Z, Y, X) nearest to right-anterior-superior, or (Y, X).

    Where the label has the ignored value, label and predictions are 0.
    """

    label: NDArray[Any]
    predictions: dict[str, NDArray[Any]]
    spacing_mm: tuple[float, ...]


class TestImages:
    """Opens the data set that the trials were trained on; InputError where it is gone, or no trial is left."""

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
        folders = {trial.record.id: trial.path / "predictions" for trial in comparison.finished}
        self.predictions = {trial: case_files(path) if path.is_dir() else {} for trial, path in folders.items()}
        if not any(self.predictions.values()):
            raise InputError(f"{comparison.folder / 'trials'}: the trainings hold no predictions")

    def image(self, case_id: str) -> NDArray[Any]:
        """The first channel of a case, oriented as its label."""
        return np.ascontiguousarray(read_volume(self.dataset.case(case_id).images[0]).to_canonical().data)

    def labels(self, case_id: str, trials: list[FinishedTrial]) -> CaseLabels:
        """Label and predictions of a case; a trial without a prediction of it is left out.

        Raises InputError for a case that is gone and for a prediction that is not of the label's shape.
        """
        path = self.dataset.case(case_id).label
        if path is None:
            raise InputError(f"case {case_id}: has no label")
        native = read_volume(path, kind="label").to_canonical()
        label = np.array(native.data)
        ignored = label == self.ignore_label if self.ignore_label is not None else np.zeros(label.shape, dtype=bool)
        label[ignored] = 0
        predictions = {}
        for trial in trials:
            source = self.predictions[trial.record.id].get(case_id)
            if source is None:
                continue
            pred = np.array(read_volume(source, kind="label").to_canonical().data)
            if pred.shape != label.shape:
                raise InputError(
                    f"case {case_id}: its label has shape {label.shape}, the prediction {source} {pred.shape}; the "
                    "data set has changed since, or that prediction is of something else"
                )
            pred[ignored] = 0
            predictions[trial.record.id] = pred
        return CaseLabels(label, predictions, tuple(native.spacing_mm))


# Statistics: the content of results.json ------------------------------------------------------------------------------


Verdict = Literal["better", "worse", "no difference shown", "not tested"]


class Difference(Strict):
    """A method against the baseline in one metric: method minus baseline, over the cases that both have.

    `n` pairs of cases; `left_out`: those in which the metric is undefined for one of the two (or for both, though the
    class was there), over all classes in an overall value. `low` and `high` bound the 95% bootstrap interval. `p` is of
    one signed-rank test, `p_holm` corrected for the number of methods tested; both are None, with the reason in `note`,
    where there was no test.
    """

    n: int
    left_out: int
    mean: float | None
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    verdict: Verdict
    note: str | None = None


class Score(Strict):
    """One metric of one method: its mean over `n` cases (each the mean over seeds) with the 95% interval over cases.

    `seed_means` has a value for every seed of the method, None where undefined in all cases; `seed_sd` is their
    standard deviation (n - 1 in the denominator), None for fewer than two. `difference` is None for the baseline, and
    where the baseline has no result.
    """

    n: int
    mean: float | None
    low: float | None
    high: float | None
    seed_means: list[float | None]
    seed_sd: float | None
    difference: Difference | None = None


class Scores(Strict):
    """The four metrics; overlaps and NSD between 0 and 1, HD95 in the summary's `distance_unit`."""

    dsc: Score
    iou: Score
    hd95_mm: Score
    nsd: Score


class Training(Strict):
    """Length of the trainings, one entry per seed in the order of `seeds`, and the means of those known."""

    epochs: list[int | None]
    steps: list[int | None]
    seconds: list[float | None]
    threads: list[int]
    mean_epochs: float | None
    mean_steps: float | None
    mean_seconds: float | None


class Convergence(Strict):
    """When the pseudo Dice first reached the summary's `convergence_level`, one entry per seed, None: not reached.

    `epochs` counts finished epochs (1: at the end of the first), `seconds` is their summed time in history.csv. Medians
    count "not reached" as later than all, so they are None unless half of the seeds did.
    """

    epochs: list[int | None]
    seconds: list[float | None]
    median_epochs: float | None
    median_seconds: float | None


class MethodSummary(Strict):
    """Everything about one method. `counts` are cases times seeds, by class and status."""

    name: str
    network: str
    loss: str
    recipe: str
    is_baseline: bool
    seeds: list[int]
    cases: int
    counts: dict[str, dict[Status, int]]
    overall: Scores
    classes: dict[str, Scores]
    training: Training
    convergence: Convergence
    cost: NetworkRecord | None


class CaseResult(CaseRow):
    """The metrics of one class in one case by the training of one method and seed."""

    method: str
    seed: int


class FailedTrial(Strict):
    id: str
    error: str | None


class Summary(Strict):
    """Statistics of a whole comparison; `methods` has the baseline first.

    `missing` names the trials that have not run, `notes` are sentences on an incomplete or uneven comparison.
    `convergence_level` is 95% of the baseline's best pseudo Dice (median over its seeds).
    """

    schema_version: Literal[1] = 1
    name: str
    baseline: str
    spatial_dims: Literal[2, 3]
    distance_unit: Literal["mm", "px"]
    labels: dict[str, int | list[int]]
    nsd_tolerance_mm: dict[str, float]
    seeds: list[int]
    test_cases: list[str]
    bootstrap: int
    bootstrap_seed: int
    alpha: float
    planned: int
    missing: list[str]
    failed: list[FailedTrial]
    notes: list[str]
    convergence_level: float | None
    methods: list[MethodSummary]
    trials: list[TrialRecord]
    cases: list[CaseResult]

    def to_json(self, path: Path) -> None:
        """Write everything as JSON, atomically."""
        write_text(path, self.model_dump_json(indent=1) + "\n")


def load_summary(path: Path | str) -> Summary:
    """Read a results.json; InputError naming the file when it is missing or is something else."""
    return load_json(path, Summary, "a summary of a comparison", "write it again with `lightm compare`")
