"""From a folder of images to a report: training, prediction of the test cases, evaluation and report in one call."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightm.datasets.cases import Dataset
from lightm.datasets.phantoms import make_phantoms
from lightm.datasets.split import ALL, Split, load_split
from lightm.errors import InputError
from lightm.evaluation.evaluation import Evaluation
from lightm.evaluation.folder import EvaluateOptions, evaluate_folder
from lightm.evaluation.report import write_report
from lightm.inference.folder import PredictOptions, Predictor, load_predictor, predict_folder
from lightm.inference.validation import choose_on_whole_cases, scorer
from lightm.preparation.plan import Plan
from lightm.progress import Progress
from lightm.training import TrainResult
from lightm.training.config import ResumeOptions, TrainConfig, load_config
from lightm.training.record import Run
from lightm.training.run import earlier_run, new_run, run_training
from lightm.training.settle import open_data

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What a whole run gave: its training, its evaluation (None without test cases) and its report (None untested)."""

    training: TrainResult
    evaluation: Evaluation | None
    report: Path | None

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return self.training.run_dir

    @property
    def model(self) -> Path:
        """The model folder."""
        return self.run_dir / "model"


def train(
    dataset: Path | str,
    out: Path | str | None = None,
    *,
    config: TrainConfig | Mapping[str, Any] | Path | str | None = None,
    network: str | nn.Module | None = None,
    loss: str | Callable[[Tensor, Tensor], Tensor] | None = None,
    plan: Plan | Path | str | None = None,
    split: Split | Path | str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> RunResult:
    """Train a network, choose weights and post-processing, predict and score the test cases, and write the report.

    Arguments:
        dataset: folder in the nnU-Net raw or MSD layout, or a folder of images with `labels=` beside it.
        out: run folder, new or empty; by default `runs/DATASET-NETWORK`.
        config: a TrainConfig, a mapping, or a YAML file of options; `options` are its fields and override it: epochs,
            max_time ("15m"), recipe, lr, batch_size, patch_size, seed, folds, device, test, ... Equal seeds and numbers
            of epochs give equal runs on one machine; under a time budget the learning rate follows the clock.
        network: a name (`lightm.network`), or a module (B, C, *S) -> logits (B, K, *S), K classes with the background,
            which is trained in place. No file holds a module: `lightm.load` and `lightm.resume` need it again.
        loss: a name (`lightm.loss`), or a callable (logits (B, K, *S), target (B, *S) class indices) -> scalar, where
            255 in the target marks voxels that must not count.
        plan, split: objects or paths; by default DATASET/plan.yaml or a fresh plan, and a draw of 7:1:2.

    Returns the run's training, evaluation and report. Raises InputError for bad input before anything is written;
    LightMError when the training cannot go on, and Interrupted at Ctrl-C and SIGTERM: `lightm.resume` continues then.

    >>> data = lightm.phantoms("xray", folder / "data", cases=4, size=32)
    >>> run = lightm.train(data, folder / "run", epochs=1, steps_per_epoch=2, val_patches=1, patch_size=[32, 32])
    >>> run.training.epochs, run.report.name
    (1, 'report.html')
    """
    given: dict[str, Any] = {"network": network, "loss": loss, "plan": plan, "split": split}
    return _finished(new_run(dataset, out, config=config, progress=progress, **given, **options), progress)


def resume(
    run: Path | str,
    *,
    network: nn.Module | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> RunResult:
    """Resume an interrupted or ended run from its last checkpoint, and do all that `lightm.train` does after it.

    network, loss: the objects that the run was started with, if they were no names. options: epochs, max_time (both of
    the whole run), patience, workers, val_cases, postprocess and test may change; everything else is as it was started.
    A run that was resumed has the same weights as one that was never interrupted, as long as epochs and not time end
    it. A damaged last checkpoint is left for the one before it, which is logged.
    Raises InputError for a folder without a run or in use, and for a data set that has changed; else as `lightm.train`.

    >>> data = lightm.phantoms("xray", folder / "data", cases=4, size=32)
    >>> options = {"steps_per_epoch": 2, "val_patches": 1, "patch_size": [32, 32], "test": False}
    >>> run = lightm.train(data, folder / "run", epochs=1, **options)
    >>> lightm.resume(run.run_dir, epochs=2).training.epochs
    2
    """
    return _finished(earlier_run(run, ResumeOptions.of(None, options, "resume"), network=network, loss=loss), progress)


def _finished(run: Run, progress: Progress | None) -> RunResult:
    training = run_training(run, progress, scorer(run.data, run.plan, run.config.device))
    _log.info("trained %d epochs in %.0f s (%s)", training.epochs, training.train_seconds, training.reason)
    return finish_run(training, progress=progress)


def finish_run(training: TrainResult, *, progress: Progress | None = None) -> RunResult:
    """Choose weights and post-processing on whole validation cases, score the test cases, and write the report.

    What the training's configuration switches off (`val_cases=0`, `postprocess`, `test`) is left out.
    """
    config, run_dir, test = training.config, training.run_dir, training.split.test
    evaluation = None
    predictor = None
    if config.val_cases and training.split.kind != ALL:  # whose validation cases were trained on
        predictor = choose_on_whole_cases(training, progress=progress)
    if config.test and test:
        if predictor is None:
            predictor = load_predictor(run_dir / "model", PredictOptions(device=config.device), training.network)
        evaluation = score_cases(training.data, run_dir, test, predictor, progress=progress)
    return RunResult(training, evaluation, write_report(run_dir) if config.test else None)


def score_run(
    run_dir: Path | str,
    *,
    options: EvaluateOptions | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **more: Any,
) -> Evaluation:
    """Predict the test cases of a run's split into `predictions/` and score them into `evaluation/`.

    options: an EvaluateOptions, or its fields as `more`; classes, cases and folder are the run's. Raises InputError for
    a folder that holds no trained run or has no test cases.
    """
    run_dir, chosen = Path(run_dir), EvaluateOptions.of(options, more, "evaluate")
    if wrong := sorted(chosen.model_fields_set & {"labels_map", "ignore_label", "out", "cases"}):
        raise InputError(f"{', '.join(wrong)}: only for a folder of label maps; give it and its labels, or a run alone")
    if not (run_dir / "model" / "model.json").is_file():
        raise InputError(
            f"{run_dir}: holds no trained run (model/model.json is missing); finish its training first, or give the "
            "true labels of a folder of predictions (--labels)"
        )
    config = load_config(run_dir / "config.yaml")
    if chosen.dataset is not None:
        config = config.model_copy(update={"dataset": chosen.dataset})
    data = open_data(run_dir, config)
    split = load_split(run_dir / "split.json", [case.id for case in data.cases])
    if not split.test:
        raise InputError(f"{run_dir / 'split.json'}: the split has no test cases")
    predictor = load_predictor(run_dir, PredictOptions(device=config.device))
    return score_cases(data, run_dir, split.test, predictor, chosen, progress)


def score_cases(
    data: Dataset,
    run_dir: Path,
    case_ids: Sequence[str],
    predictor: Predictor,
    options: EvaluateOptions | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Predict the named cases of a data set with a run's model and score them against their labels."""
    predictions = run_dir / "predictions"
    if predictions.exists():  # of an earlier scoring of the same run
        shutil.rmtree(predictions)
    predict_folder(predictor, data.root, predictions, cases=case_ids, progress=progress)
    labels = [case.label for case in map(data.case, case_ids)]
    folder = labels[0].parent if labels and labels[0] is not None else data.root
    given: dict[str, Any] = {} if options is None else options.model_dump(exclude_unset=True, exclude={"dataset"})
    run = {
        "labels_map": data.targets,
        "ignore_label": data.ignore_label,
        "out": run_dir / "evaluation",
        "cases": case_ids,
        "trust_image_geometry": data.trust_image_geometry,
    }
    return evaluate_folder(predictions, folder, **{**given, **run}, progress=progress)


def demo(
    out: Path | str = "runs/demo",
    *,
    max_time: str | float = "6m",
    cases: int = 60,
    size: int = 64,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Make liver phantoms in `OUT-data`, train on them, predict and score the test cases, and write `OUT/report.html`.

    Takes about `max_time` (of the training) and one minute more on two cores. With `overwrite` an earlier demo in `out`
    is replaced; anything else there is refused.
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
    return train(data, out, max_time=max_time, patch_size=patch, seed=seed, progress=progress)
