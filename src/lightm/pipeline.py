"""From a folder of images to a report: training, prediction of the test cases, evaluation and report in one call."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightm.datasets.dataset import Dataset, open_dataset
from lightm.datasets.phantoms import make_phantoms
from lightm.errors import InputError
from lightm.evaluation import Evaluation, evaluate_folder, write_report
from lightm.images.io import read_volume
from lightm.inference import Predictor, predict_folder
from lightm.inference.postprocess import Postprocess, describe
from lightm.inference.postprocess_choice import CaseLabels, choose_rules
from lightm.nets.folder import set_postprocess
from lightm.progress import Progress
from lightm.training import TrainResult, load_split, train_model
from lightm.training.config import load_config


@dataclass(frozen=True)
class RunResult:
    """What a whole run gave: its training, its evaluation (None without test cases) and its report."""

    training: TrainResult
    evaluation: Evaluation | None
    report: Path


def train_and_test(dataset: Path | str, out: Path | str | None = None, **options: Any) -> RunResult:
    """Train (the options are those of `lightm.train_model`), predict and score the test cases, write the report."""
    progress, say = options.get("progress"), options.get("say")
    return finish_run(train_model(dataset, out, **options), progress=progress, say=say)


def finish_run(
    training: TrainResult, *, progress: Progress | None = None, say: Callable[[str], None] | None = None
) -> RunResult:
    """Choose the model's clean-up on the validation cases, predict and score the test cases, and write the report."""
    choose_postprocess(training, progress=progress, say=say)
    evaluation = score_run(training.run_dir, progress=progress) if training.split.test else None
    return RunResult(training, evaluation, write_report(training.run_dir))


MOST_VALIDATION_CASES = 20  # enough to choose a clean-up by


def choose_postprocess(
    training: TrainResult, *, progress: Progress | None = None, say: Callable[[str], None] | None = None
) -> Postprocess:
    """Keep with the model the clean-up steps that help on the validation cases, at most 20 of them, and say which.

    Memory: that of one prediction; of the others their deflated label maps are kept.
    """
    model, config, plan = training.run_dir / "model", training.config, training.plan
    data = open_dataset(Path(config.dataset), labels=None if config.labels is None else Path(config.labels))
    predictor = Predictor.from_folder(model, config.device)
    predictor.rules = ()
    cases = []
    ids = training.split.val[:MOST_VALIDATION_CASES]
    for done, case in enumerate(map(data.case, ids)):
        if case.label is not None:
            predicted = predictor.predict_volumes([read_volume(path) for path in case.images])
            truth = read_volume(case.label, kind="label")
            cases.append(CaseLabels(predicted.data, truth.data, predicted.spacing_mm))
        if progress is not None:
            progress("clean-up", done + 1, len(ids))
    chosen = choose_rules(cases, plan.values[1:], ignore_label=plan.ignore_label)
    set_postprocess(model, chosen.model_dump(mode="json"))
    if say is not None:
        names = {value: name for name, value in plan.labels.items()}
        for step in chosen.steps:
            gains = ", ".join(f"{names[value]} {gain:+.4f}" for value, gain in step.gain.items() if gain)
            say(f"clean-up: {describe(step, names)} (DSC on {chosen.cases} validation cases: {gains})")
        if not chosen.steps:
            say(f"clean-up: none helps on {chosen.cases} validation cases")
    return chosen


def score_run(run_dir: Path | str, *, nsd_tolerance_mm: float = 1.0, progress: Progress | None = None) -> Evaluation:
    """Predict the test cases of a run's split into `predictions/` and score them into `evaluation/`.

    Raises InputError for a folder that holds no trained run or has no test cases.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "model" / "model.json").is_file():
        raise InputError(f"{run_dir}: holds no trained run (model/model.json is missing); finish its training first")
    config = load_config(run_dir / "config.yaml")
    data = open_dataset(Path(config.dataset), labels=None if config.labels is None else Path(config.labels))
    split = load_split(run_dir / "split.json", [case.id for case in data.cases])
    if not split.test:
        raise InputError(f"{run_dir / 'split.json'}: the split has no test cases")
    return score_cases(
        data, run_dir, split.test, nsd_tolerance_mm=nsd_tolerance_mm, device=config.device, progress=progress
    )


def score_cases(
    data: Dataset,
    run_dir: Path,
    case_ids: list[str],
    *,
    nsd_tolerance_mm: float = 1.0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Evaluation:
    """Predict the named cases of a data set with a run's model and score them against their labels."""
    predictions = run_dir / "predictions"
    if predictions.exists():  # of an earlier scoring of the same run
        shutil.rmtree(predictions)
    predict_folder(run_dir / "model", data.root, predictions, cases=case_ids, device=device, progress=progress)
    labels = [case.label for case in map(data.case, case_ids)]
    folder = labels[0].parent if labels and labels[0] is not None else data.root
    foreground = {name: value for name, value in data.labels.items() if value != data.values[0]}
    return evaluate_folder(
        predictions,
        folder,
        labels_map=foreground,
        ignore_label=data.ignore_label,
        out=run_dir / "evaluation",
        cases=case_ids,
        nsd_tolerance_mm=nsd_tolerance_mm,
        progress=progress,
    )


DEMO_CASES, DEMO_SIZE, DEMO_TIME = 60, 64, "6m"


def demo(
    out: Path | str = "runs/demo",
    *,
    max_time: str | float = DEMO_TIME,
    cases: int = DEMO_CASES,
    size: int = DEMO_SIZE,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> RunResult:
    """Make liver phantoms, train on them, predict and score the test cases, and write `OUT/report.html`.

    The phantoms go to the folder `OUT-data` beside it. Takes about `max_time` (of the training) and one minute more
    on two cores. With `overwrite` an earlier demo in `out` is replaced; anything else there is refused.
    """
    out = Path(out)
    data = out.with_name(out.name + "-data")
    if overwrite:
        for folder, mark in ((out, "config.yaml"), (data, "dataset.json")):
            if (folder / mark).is_file():
                shutil.rmtree(folder)
    for folder in (out, data):
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder}: already holds something; give another folder with -o, or --overwrite a demo")
    make_phantoms("liver", data, cases=cases, size=size, seed=seed, progress=progress)
    # whole slices, which tell left from right, and half the height: more steps in the same minutes
    patch = [max(8, part * size // 4 // 8 * 8) for part in (1, 4, 4)]
    return train_and_test(data, out, max_time=max_time, patch_size=patch, seed=seed, progress=progress, say=say)
