"""One training run, from a data set to a run folder with a trained model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric

from lightm.datasets.dataset import Dataset, open_dataset
from lightm.datasets.split import Split, load_split
from lightm.errors import InputError, LightMError
from lightm.files import locked_folder, remove_temporaries
from lightm.nets import DEFAULT
from lightm.preparation.plan import Plan, load_plan
from lightm.preparation.preprocess import PreprocessedCase, default_cache_dir, preprocess_dataset
from lightm.progress import Progress
from lightm.training.config import TrainConfig, load_config, parse_duration, resolve_config
from lightm.training.fit import TrainResult, build, build_fabric, fit
from lightm.training.loaders import PatchLoaders
from lightm.training.prepare import check_classes, choose_plan, choose_split, refuse_used_folder, with_sizes
from lightm.training.record import run_record, write_json


def train_model(
    dataset: Path | str,
    out: Path | str | None = None,
    *,
    labels: Path | str | None = None,
    network: str = DEFAULT,
    network_options: dict[str, Any] | None = None,
    recipe: str = "default",
    settings: dict[str, Any] | None = None,
    loss: str | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    patch_size: Sequence[int] | None = None,
    epochs: int | None = None,
    max_time: str | float | None = None,
    patience: int | None = None,
    seed: int = 0,
    split_seed: int = 0,
    folds: int | None = None,
    fold: int = 0,
    split: Path | str | None = None,
    plan: Path | str | None = None,
    val_patches: int = 16,
    workers: int = 0,
    device: str = "cpu",
    precision: str = "32-true",
    on_nan: Literal["stop", "skip"] = "stop",
    nan_limit: int = 10,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> TrainResult:
    """Train a network on a data set, watch it on validation patches, and keep the best weights as a model folder.

    Arguments:
        dataset: folder in the nnU-Net raw or MSD layout, or a folder of images with `labels` beside it.
        out: run folder; by default `runs/DATASET-NETWORK`. It must not hold a run.
        network, network_options: preset and overrides (`lightm.nets.create`).
        recipe, settings: recipe by name and overrides of its fields; `loss`, `lr`, `batch_size`, `patch_size` and
            `epochs` are short for the most used ones.
        max_time: wall-clock budget ("15m", seconds); without `epochs` it alone ends the training.
        patience: epochs without a better moving pseudo Dice before stopping.
        seed: of the weights and patches. Equal seeds and numbers of epochs give equal runs on one machine; under a
            time budget the learning rate follows the clock, so that runs differ.
        split_seed, folds, fold, split: the split 7:1:2 or into folds, or the path of one written earlier.
        plan: a plan to use instead of the data set's `plan.yaml` or a fresh one.
        on_nan, nan_limit: "stop" at a loss or gradient that is NaN or infinite, or "skip" up to that many such steps.

    Returns the run folder with config.yaml, plan.yaml, split.json, history.csv, run.json, checkpoints/, tensorboard/
    and model/. Raises InputError for bad input before anything is written to `out` and where another process trains
    there; LightMError when the training cannot go on (a loss that is not finite, a full disk, a dead worker process)
    and Interrupted at Ctrl-C and SIGTERM: the last checkpoint is kept then.
    """
    fabric = build_fabric(device, precision)  # before anything is read
    data = open_dataset(Path(dataset), labels=None if labels is None else Path(labels))
    run_dir = Path(out) if out is not None else Path("runs") / f"{data.name}-{network}"
    refuse_used_folder(run_dir)
    plan_ = choose_plan(data, None if plan is None else Path(plan), progress)
    overrides = dict(settings or {})
    overrides.update({k: v for k, v in {"loss": loss, "lr": lr, "epochs": epochs}.items() if v is not None})
    config = resolve_config(
        str(Path(dataset).resolve()),
        plan_.spatial_dims,
        recipe=recipe,
        settings=overrides,
        labels=None if labels is None else str(Path(labels).resolve()),
        network=network,
        network_options=network_options or {},
        seed=seed,
        split_seed=split_seed,
        folds=folds,
        fold=fold,
        split=None if split is None else str(split),
        max_time_s=None if max_time is None else parse_duration(max_time),
        epochs_given="epochs" in overrides,
        patience=patience,
        val_patches=val_patches,
        workers=workers,
        device=device,
        precision=precision,
        on_nan=on_nan,
        nan_limit=nan_limit,
    )
    plan_ = with_sizes(plan_, config, patch_size, batch_size)
    return _run(fabric, run_dir, config, data, plan_, choose_split(data, config), False, progress, say)


def resume_training(
    run_dir: Path | str,
    *,
    epochs: int | None = None,
    max_time: str | float | None = None,
    patience: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> TrainResult:
    """Continue an interrupted or ended run from its last checkpoint, with the options that it was started with.

    Arguments: `run_dir` of `train_model`; `epochs`, `max_time` (of the whole run, the time already used included),
    `patience` and `workers` replace the stored ones when given. A run that was resumed has the same weights as one
    that was never interrupted, as long as epochs and not time end it.
    A damaged last checkpoint is left for the one before it, saying so.
    Raises InputError for a folder without a run or in use, or a data set that has changed.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise InputError(f"{run_dir}: holds no run to resume (config.yaml is missing)")
    config = load_config(run_dir / "config.yaml")
    update: dict[str, Any] = {}
    if epochs is not None:
        update.update(settings=config.settings.model_copy(update={"epochs": epochs}), epochs_given=True)
    if max_time is not None:
        update["max_time_s"] = parse_duration(max_time)
    update.update({k: v for k, v in {"patience": patience, "workers": workers}.items() if v is not None})
    config = config.model_copy(update=update)
    fabric = build_fabric(config.device, config.precision)
    data = open_dataset(Path(config.dataset), labels=None if config.labels is None else Path(config.labels))
    split = load_split(run_dir / "split.json", [case.id for case in data.cases])
    plan = load_plan(run_dir / "plan.yaml")
    with locked_folder(run_dir, "training"):
        return _run(fabric, run_dir, config, data, plan, split, True, progress, say)


def _run(
    fabric: Fabric,
    run_dir: Path,
    config: TrainConfig,
    data: Dataset,
    plan: Plan,
    split: Split,
    resume: bool,
    progress: Progress | None,
    say: Callable[[str], None] | None,
) -> TrainResult:
    started = datetime.now(timezone.utc)
    net, criterion = build(config, plan)  # before the long preprocessing, so that a bad name costs nothing
    cases = preprocess_dataset(
        data,
        plan,
        default_cache_dir(),
        case_ids=[*split.train, *split.val],
        workers=config.workers,
        progress=progress,
    )
    by_id = {case.id: case for case in cases}
    train_cases, val_cases = [by_id[i] for i in split.train], [by_id[i] for i in split.val]
    check_classes(data, train_cases, val_cases)
    with contextlib.ExitStack() as stack:
        if not resume:
            stack.enter_context(locked_folder(run_dir, "training"))
            refuse_used_folder(run_dir)  # another run may have come first while the data were prepared
        return _run_locked(
            fabric, run_dir, config, plan, split, net, criterion, train_cases, val_cases, resume, started, progress, say
        )


def _run_locked(
    fabric: Fabric,
    run_dir: Path,
    config: TrainConfig,
    plan: Plan,
    split: Split,
    net: torch.nn.Module,
    criterion: torch.nn.Module,
    train_cases: list[PreprocessedCase],
    val_cases: list[PreprocessedCase],
    resume: bool,
    started: datetime,
    progress: Progress | None,
    say: Callable[[str], None] | None,
) -> TrainResult:
    for folder in (run_dir, run_dir / "checkpoints"):
        remove_temporaries(folder)
    if not resume:
        plan.save(run_dir / "plan.yaml")
        split.save(run_dir / "split.json")
    config.save(run_dir / "config.yaml")  # the last of the three: with it the run can be resumed
    record = run_record(config, plan, net, started, run_dir if resume else None)
    write_json(run_dir / "run.json", record)
    patches = PatchLoaders(
        train_cases,
        val_cases,
        config.settings,
        patch_size=plan.patch_size,
        batch_size=plan.batch_size,
        seed=config.seed,
        val_patches=config.val_patches,
        workers=config.workers,
    )
    try:
        with contextlib.nullcontext() if say is None else _told(say):
            result = fit(
                fabric, run_dir, config, plan, split, net, criterion, patches, resume=resume, progress=progress
            )
    except BaseException:
        with contextlib.suppress(LightMError):  # a full disk; what ended the training is what to tell
            write_json(run_dir / "run.json", {**record, "status": "interrupted"})
        raise
    record.update(
        status="finished",
        finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        train_seconds=round(result.train_seconds, 1),
        epochs=result.epochs,
        stopped_because=result.reason,
        skipped_steps=result.skipped_steps,
    )
    write_json(run_dir / "run.json", record)
    return result


@contextlib.contextmanager
def _told(say: Callable[[str], None]) -> Iterator[None]:
    """Pass what the training logs to `say` as well."""
    logger, handler = logging.getLogger("lightm.training"), logging.Handler(logging.INFO)
    handler.emit = lambda record: say(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(logging.INFO, level or logging.INFO))
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
