"""One training run, from a data set to a run folder with a trained model."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lightm.data.dataset import Dataset, open_dataset
from lightm.data.plan import Plan, load_plan
from lightm.data.preprocess import default_cache_dir, preprocess_dataset
from lightm.errors import InputError, LightMError
from lightm.losses import create_loss
from lightm.nets import DEFAULT, create, save_model
from lightm.train.callbacks import Checkpoints, History, ProgressBar, Stopping
from lightm.train.checkpoint_io import SafeCheckpointIO
from lightm.train.config import TrainConfig, load_config, parse_duration, resolve_config
from lightm.train.datamodule import PatchDataModule
from lightm.train.module import SegmentationModule
from lightm.train.prepare import check_classes, choose_plan, choose_split, refuse_used_folder, with_sizes
from lightm.train.record import run_record, write_json
from lightm.train.split import Split, load_split

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TrainResult:
    """A finished training: its folder, what it was, and how it ended."""

    run_dir: Path
    config: TrainConfig
    plan: Plan
    split: Split
    epochs: int
    best_pseudo_dice: float | None
    train_seconds: float
    reason: str


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
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
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

    Returns the run folder with config.yaml, plan.yaml, split.json, history.csv, run.json, checkpoints/, tensorboard/
    and model/. Raises InputError for bad input before anything is written to `out`, LightMError when the training
    cannot go on (a loss that is not finite, a full disk); the last checkpoint is kept then.
    """
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
    )
    plan_ = with_sizes(plan_, config, patch_size, batch_size)
    return _run(run_dir, config, data, plan_, choose_split(data, config), False, progress, say)


def resume_training(
    run_dir: Path | str,
    *,
    epochs: int | None = None,
    max_time: str | float | None = None,
    patience: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> TrainResult:
    """Continue an interrupted or ended run after its last whole epoch, with the options that it was started with.

    Arguments: `run_dir` of `train_model`; `epochs`, `max_time` (of the whole run, the time already used included),
    `patience` and `workers` replace the stored ones when given. A run that was resumed has the same weights as one
    that was never interrupted, as long as epochs and not time end it.
    Raises InputError for a folder without a run, or a data set that has changed.
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
    data = open_dataset(Path(config.dataset), labels=None if config.labels is None else Path(config.labels))
    split = load_split(run_dir / "split.json", [case.id for case in data.cases])
    return _run(run_dir, config, data, load_plan(run_dir / "plan.yaml"), split, True, progress, say)


def _run(
    run_dir: Path,
    config: TrainConfig,
    data: Dataset,
    plan: Plan,
    split: Split,
    resume: bool,
    progress: Progress | None,
    say: Callable[[str], None],
) -> TrainResult:
    started = datetime.now(timezone.utc)
    net, criterion = _build(config, plan)  # before the long preprocessing, so that a bad name costs nothing
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

    run_dir.mkdir(parents=True, exist_ok=True)
    config.save(run_dir / "config.yaml")
    if not resume:
        plan.save(run_dir / "plan.yaml")
        split.save(run_dir / "split.json")
    record = run_record(config, plan, net, started, run_dir if resume else None)
    write_json(run_dir / "run.json", record)
    patches = PatchDataModule(
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
        result = _fit(run_dir, config, plan, split, net, criterion, patches, resume, say)
    except BaseException:
        write_json(run_dir / "run.json", {**record, "status": "interrupted"})
        raise
    record.update(
        status="finished",
        finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        train_seconds=round(result.train_seconds, 1),
        epochs=result.epochs,
        stopped_because=result.reason,
    )
    write_json(run_dir / "run.json", record)
    return result


def _fit(
    run_dir: Path,
    config: TrainConfig,
    plan: Plan,
    split: Split,
    net: torch.nn.Module,
    criterion: torch.nn.Module,
    patches: PatchDataModule,
    resume: bool,
    say: Callable[[str], None],
) -> TrainResult:
    recipe = config.settings
    by_time_only = config.max_time_s is not None and not config.epochs_given
    total_steps = None if by_time_only else recipe.epochs * recipe.steps_per_epoch
    names = list(plan.labels)[1:]
    module = SegmentationModule(
        net, criterion, recipe, class_names=names, total_steps=total_steps, max_time_s=config.max_time_s
    )
    checkpoints, stopping = Checkpoints(run_dir / "checkpoints"), Stopping(config.patience)
    callbacks: list[pl.Callback] = [History(run_dir / "history.csv", names, say), checkpoints, stopping]
    show_bar = sys.stderr.isatty()
    if show_bar:
        callbacks.append(ProgressBar())
    if resume and not checkpoints.last.is_file():
        say(f"{run_dir}: no whole epoch was kept before the interruption; the run starts anew")
    for name in ("lightning.pytorch", "lightning.fabric"):  # their notes are about other products and settings
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*")
        warnings.filterwarnings("ignore", message=".*The number of training batches.*")
        warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
        trainer = pl.Trainer(
            accelerator={"cuda": "gpu"}.get(config.device, config.device),
            devices=1,
            precision=config.precision,
            max_epochs=-1 if by_time_only else recipe.epochs,
            logger=TensorBoardLogger(run_dir, name="tensorboard", version=""),
            callbacks=callbacks,
            plugins=[SafeCheckpointIO()],
            gradient_clip_val=recipe.clip_norm,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=show_bar,
            num_sanity_val_steps=0,
            log_every_n_steps=recipe.steps_per_epoch,
        )
        try:
            trainer.fit(module, patches, ckpt_path=checkpoints.last if resume and checkpoints.last.is_file() else None)
        except SystemExit as error:  # how Lightning ends on Ctrl-C, with the signal ignored from then on
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise LightMError(
                f"training was interrupted in epoch {trainer.current_epoch}; continue it with "
                f"`lightm train --resume {run_dir}`"
            ) from error
    state = SafeCheckpointIO().load_checkpoint(checkpoints.best)
    weights = {
        name.removeprefix("network."): tensor
        for name, tensor in state["state_dict"].items()
        if name.startswith("network.")
    }
    seconds = module.elapsed_s()
    save_model(
        run_dir / "model",
        network=network_description(config, plan),
        state_dict=weights,
        plan=plan.model_dump(mode="json"),
        training={
            "recipe": config.recipe,
            "loss": recipe.loss,
            "seed": config.seed,
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "train_seconds": round(seconds, 1),
            "best_moving_pseudo_dice": module.best_dice,
            "best_epoch": state["epoch"],
            "data_hash": plan.fingerprint.data_hash,
        },
    )
    return TrainResult(
        run_dir=run_dir,
        config=config,
        plan=plan,
        split=split,
        epochs=trainer.current_epoch,
        best_pseudo_dice=module.best_dice,
        train_seconds=seconds,
        reason=stopping.reason or f"all {recipe.epochs} epochs are done",
    )


def network_description(config: TrainConfig, plan: Plan) -> dict[str, Any]:
    """The arguments of `lightm.nets.create` for this run, as kept in model.json."""
    return {
        "name": config.network,
        "spatial_dims": plan.spatial_dims,
        "in_channels": len(plan.channels),
        "out_channels": len(plan.labels),
        "image_size": plan.patch_size,
        "options": config.network_options,
    }


def _build(config: TrainConfig, plan: Plan) -> tuple[torch.nn.Module, torch.nn.Module]:
    pl.seed_everything(config.seed, workers=True, verbose=False)
    described = network_description(config, plan)
    options = described.pop("options")
    net = create(**described, **options)
    criterion = create_loss(
        config.settings.loss,
        spatial_dims=plan.spatial_dims,
        num_classes=len(plan.labels),
        **config.settings.loss_options,
    )
    return net, criterion
