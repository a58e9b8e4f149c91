"""A made-up comparison folder: nothing is trained, every number is known, images are phantoms where wanted."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightm import Volume, read_volume, write_volume
from lightm.datasets.discovery import open_dataset
from lightm.datasets.phantoms import make_phantoms
from lightm.datasets.split import Split
from lightm.evaluation.evaluation import CaseRow, summarize
from lightm.evaluation.folder import evaluate_folder
from lightm.lab.compare.experiment import Experiment, NetworkChoice, PhantomData, Trial
from lightm.lab.compare.results import NetworkRecord, TrialRecord
from lightm.lab.complexity import known_names
from lightm.preparation.fingerprint import ChannelIntensities, Fingerprint
from lightm.preparation.plan import ChannelNormalization, Plan, make_plan
from lightm.training.config import resolve_config

METHODS = {"lightm-small": 0.85, "segresnet": 0.80, "unet_plain": 0.70}
WATCHED = 3
"""Cases of the split that train or watch, so that `cases` are the tested ones."""

Score = Callable[[Trial, int, str], float | str]
"""DSC of a trial's case number and class, or "missed", "spurious" or "absent"."""


def make_comparison(
    folder: Path,
    *,
    methods: Mapping[str, float] | None = None,
    losses: Mapping[str, float] | None = None,
    seeds: Sequence[int] = (0, 1),
    cases: int = 8,
    spatial_dims: int = 3,
    images: bool = False,
    score: Score | None = None,
    classes: Sequence[str] | None = None,
    leave_out: Collection[tuple[str, int]] = (),
    fail: Collection[tuple[str, int]] = (),
    epochs: int = 12,
) -> Path:
    """Write a comparison with all of its trials and return its folder.

    methods: label of a network -> its level of DSC; a label that is no network stands for lightm-small. losses: name
    -> what it adds to the level. cases: how many are tested. leave_out, fail: (network's label, seed) of trials that
    have not run, or failed. Without `images`, `score` (default: `default_score`) makes up every DSC; IoU follows from
    it, HD95 is 10 (1 - DSC) + 1 mm and NSD the DSC's square. With `images`, phantoms are made and predicted as
    labels moved by more voxels the lower the level, and the metrics are measured. `classes` only without images.
    """
    methods, losses = dict(methods or METHODS), dict(losses or {"ce+dice": 0.0})
    kind = "xray" if spatial_dims == 2 else "liver"
    experiment = Experiment(
        name="made-up",
        phantom=PhantomData(kind=kind, cases=cases + WATCHED, size=32, seed=0),
        networks={label: NetworkChoice(network=_network(label)) for label in methods},
        losses=list(losses),
        seeds=list(seeds),
        epochs=epochs,
    )
    names = [f"{kind}_{index:03d}" for index in range(cases + WATCHED)]
    split = Split(kind="7:1:2", seed=0, train=names[:2], val=names[2:WATCHED], test=names[WATCHED:])
    data = folder / "data"
    if images:
        make_phantoms(kind, data, cases=cases + WATCHED, size=32, seed=0)
        plan = make_plan(open_dataset(data), patch_size=[32] * spatial_dims)
    else:
        plan = _plan(list(classes or (["lung"] if spatial_dims == 2 else ["liver", "tumour"])), spatial_dims, cases)
    folder.mkdir(parents=True, exist_ok=True)
    experiment.save(folder / "experiment.yaml")
    plan.save(folder / "plan.yaml")
    split.save(folder / "split.json")
    (folder / "networks.json").write_text(json.dumps(_networks(experiment, plan)), encoding="utf-8")

    def level(trial: Trial) -> float:
        return methods[trial.network] + losses[trial.loss]

    made = score or default_score(level)
    for trial in experiment.trials():
        if (trial.network, trial.seed) in leave_out:
            continue
        path = folder / "trials" / trial.id
        path.mkdir(parents=True)
        failed = (trial.network, trial.seed) in fail
        _write_record(path, experiment, trial, plan, epochs, failed)
        if failed:
            continue
        _write_run(path, experiment, trial, plan, split, data)
        _write_history(path, level(trial), trial.seed, epochs, list(plan.labels)[1:])
        if images:
            _predict(path / "predictions", data, split.test, level(trial), trial.seed)
            evaluate_folder(
                path / "predictions", data / "labelsTr", cases=split.test, out=path / "evaluation", bootstrap=50
            )
        else:
            _write_evaluation(path / "evaluation", trial, plan, split.test, made)
    return folder


def default_score(level: Callable[[Trial], float]) -> Score:
    """Hard cases are hard for everyone; seed and method add a little; the tumour is missed or absent at times."""

    def score(trial: Trial, case: int, name: str) -> float | str:
        if name == "tumour" and case % 5 == 4:
            return "absent"
        if name == "tumour" and case % 5 == 3 and level(trial) < 0.75:
            return "missed"
        hard = 0.06 * math.sin(2.4 * case) - (0.25 if name == "tumour" else 0.0)
        own = 0.02 * math.sin(7.7 * case + 31 * level(trial) + 3 * trial.seed)
        return min(0.99, max(0.01, level(trial) + hard + own + 0.005 * trial.seed))

    return score


def made_row(case: str, name: str, given: float | str) -> CaseRow:
    """A row from a DSC or a status, as `make_comparison` says."""
    sizes = {"volume_label_ml": 1.0, "volume_pred_ml": 1.0, "voxels_label": 1000, "voxels_pred": 1000}
    if given == "absent":
        return CaseRow(case=case, class_name=name, status="absent", dsc=None, iou=None, hd95_mm=None, nsd=None, **sizes)
    if isinstance(given, str):
        return CaseRow(case=case, class_name=name, status=given, dsc=0.0, iou=0.0, hd95_mm=None, nsd=0.0, **sizes)
    iou, hd95 = given / (2 - given), 10 * (1 - given) + 1
    return CaseRow(
        case=case, class_name=name, status="present", dsc=given, iou=iou, hd95_mm=hd95, nsd=given**2, **sizes
    )


def _network(label: str) -> str:
    return label if label in known_names() else "lightm-small"


def _plan(classes: list[str], dims: int, cases: int) -> Plan:
    labels = {"background": 0, **{name: value for value, name in enumerate(classes, start=1)}}
    ones = [1.0] * dims
    channel = ChannelIntensities(mean=100, std=20, median=100, low=40, high=180, min=0, max=255)
    return Plan(
        dataset="MadeUp",
        spatial_dims=2 if dims == 2 else 3,
        channels=["CT" if dims == 3 else "X-ray"],
        labels=labels,
        file_ending=".nii.gz" if dims == 3 else ".png",
        spacing_mm=ones,
        patch_size=[32] * dims,
        batch_size=2,
        normalization=[ChannelNormalization(scheme="zscore")],
        fingerprint=Fingerprint(
            cases=cases + WATCHED,
            data_hash="0123456789abcdef" * 4,
            shape_min=[32] * dims,
            shape_median=[32] * dims,
            shape_max=[32] * dims,
            spacing_mm_min=ones,
            spacing_mm_median=ones,
            spacing_mm_max=ones,
            intensities=[channel],
            class_fractions=dict.fromkeys(labels, 0.1),
            class_cases=dict.fromkeys(labels, cases + WATCHED),
        ),
    )


def _networks(experiment: Experiment, plan: Plan) -> list[dict[str, Any]]:
    records = [
        NetworkRecord(
            label=label,
            network=choice.network,
            parameters=265_811 * 4**index,
            multiply_adds=1_500_000_000 * (index + 1),
            patch_size=plan.patch_size,
            latency_s=0.05 * (index + 1),
            latency_threads=2,
            peak_memory_bytes=None if index == 2 else 300_000_000 * (index + 1),
        )
        for index, (label, choice) in enumerate(experiment.networks.items())
    ]
    return [record.model_dump() for record in records]


def _write_record(path: Path, experiment: Experiment, trial: Trial, plan: Plan, epochs: int, failed: bool) -> None:
    seconds = 60.0 + 7 * list(experiment.networks).index(trial.network) + trial.seed
    record = TrialRecord(
        id=trial.id,
        network=trial.network,
        loss=trial.loss,
        recipe=trial.recipe,
        seed=trial.seed,
        fingerprint=experiment.fingerprint(trial),
        data_hash=plan.fingerprint.data_hash,
        status="failed" if failed else "finished",
        error="loss is not finite in step 17" if failed else None,
        started="2026-01-01T12:00:00+00:00",
        seconds=seconds + 5,
        threads=2,
        train_seconds=None if failed else seconds,
        epochs=None if failed else epochs,
        steps=None if failed else 10 * epochs,
        stopped_because=None if failed else f"all {epochs} epochs are done",
        versions={"lightm-unet": "0.1.0", "torch": "2.5.0"},
    )
    (path / "trial.json").write_text(record.model_dump_json(indent=1), encoding="utf-8")


def _write_run(path: Path, experiment: Experiment, trial: Trial, plan: Plan, split: Split, data: Path) -> None:
    network = experiment.networks[trial.network].network
    config = resolve_config(
        str(data), plan.spatial_dims, network=network, settings={"loss": trial.loss}, seed=trial.seed, epochs_given=True
    )
    config.save(path / "config.yaml")
    plan.save(path / "plan.yaml")
    split.save(path / "split.json")
    record = {"network": network, "seed": trial.seed, "status": "finished", "versions": {"lightm-unet": "0.1.0"}}
    (path / "run.json").write_text(json.dumps(record), encoding="utf-8")


def _write_history(path: Path, level: float, seed: int, epochs: int, classes: list[str]) -> None:
    """An exponential rise to the level, quicker for a higher level; epochs of 5 s."""
    rows: list[dict[str, Any]] = []
    moving = None
    for epoch in range(epochs):
        dice = level * (1 - math.exp(-(epoch + 1) / (4 - 2 * level))) - 0.01 * math.sin(epoch + seed)
        moving = dice if moving is None else 0.9 * moving + 0.1 * dice
        rows.append(
            {
                "epoch": epoch,
                "step": 10 * (epoch + 1),
                "train_loss": 1.5 - dice,
                "val_loss": 1.6 - dice,
                "pseudo_dice": dice,
                "pseudo_dice_smoothed": moving,
                "lr": 1e-4 * (1 - epoch / epochs),
                "epoch_seconds": 5.0,
                **{f"pseudo_dice/{name}": dice for name in classes},
            }
        )
    with (path / "history.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _write_evaluation(folder: Path, trial: Trial, plan: Plan, cases: list[str], score: Score) -> None:
    labels = {name: value for name, value in plan.labels.items() if value}
    rows = [made_row(case, name, score(trial, i, name)) for i, case in enumerate(cases) for name in labels]
    evaluation = summarize(
        rows,
        labels,
        spatial_dims=plan.spatial_dims,
        distance_unit="mm" if plan.spatial_dims == 3 else "px",
        nsd_tolerance_mm=dict.fromkeys(labels, 1.0),
        bootstrap=50,
    )
    evaluation.to_csv(folder / "metrics.csv")
    evaluation.to_json(folder / "metrics.json")


def _predict(folder: Path, data: Path, cases: list[str], level: float, seed: int) -> None:
    """Labels moved along the last two axes, by more voxels the lower the level."""
    folder.mkdir(parents=True)
    for number, case in enumerate(cases):
        source = next((data / "labelsTr").glob(f"{case}.*"))
        label = read_volume(source, kind="label")
        steps = int(8 * (1 - level) + 0.5) + (number + seed) % 2
        moved = np.roll(label.data, (steps, seed % 2), axis=(-1, -2))
        write_volume(folder / source.name, Volume(moved, label.spacing_mm, label.affine))
