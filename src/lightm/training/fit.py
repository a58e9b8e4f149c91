"""The fit of one run: its trainer, what watches over it, and the model kept at its end."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lightm.datasets.split import Split
from lightm.errors import LightMError
from lightm.files import disk_refusals
from lightm.losses import SegmentationLoss, create_loss
from lightm.losses.custom import CustomLoss
from lightm.nets import create, save_model
from lightm.preparation.plan import Plan
from lightm.training.callbacks import Checkpoints, History, ProgressBar, Stopping
from lightm.training.checkpoint_io import SafeCheckpointIO, newest_checkpoint
from lightm.training.config import TrainConfig
from lightm.training.datamodule import PatchDataModule
from lightm.training.guard import Interrupted, NanGuard, Signals
from lightm.training.module import SegmentationModule


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
    skipped_steps: int = 0


def fit(
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
    """Fit the network and keep its best weights, in a prepared run folder; `resume` takes its newest checkpoint.

    Raises what `train_model` says.
    """
    recipe = config.settings
    by_time_only = config.max_time_s is not None and not config.epochs_given
    total_steps = None if by_time_only else recipe.epochs * recipe.steps_per_epoch
    names = list(plan.labels)[1:]
    module = SegmentationModule(
        net,
        criterion,
        recipe,
        class_names=names,
        total_steps=total_steps,
        max_time_s=config.max_time_s,
        guard=NanGuard(config.on_nan, config.nan_limit, say),
    )
    signals, stopping = Signals(say), Stopping(config.patience)
    checkpoints = Checkpoints(run_dir / "checkpoints", signals)
    # The checkpoint comes last, for it holds the state of the others.
    callbacks: list[pl.Callback] = [History(run_dir / "history.csv", names, say), stopping, signals, checkpoints]
    show_bar = sys.stderr.isatty()
    if show_bar:
        callbacks.append(ProgressBar())
    start = newest_checkpoint(checkpoints.folder, say) if resume else None
    if resume and start is None:
        say(f"{run_dir}: no checkpoint was kept before the interruption; the run starts anew")
    for name in ("lightning.pytorch", "lightning.fabric"):  # their notes are about other products and settings
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*")
        warnings.filterwarnings("ignore", message=".*The number of training batches.*")
        warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")  # its sampler is
        warnings.filterwarnings("ignore", message=".*`training_step` returned `None`.*")  # a step skipped on purpose
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
            with disk_refusals(run_dir):  # of TensorBoard's files; all others name themselves
                trainer.fit(module, patches, ckpt_path=start)
        except SystemExit as error:  # how Lightning ends on a second Ctrl-C, with the signal ignored from then on
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise Interrupted(
                f"training was interrupted in epoch {trainer.current_epoch}; continue it with "
                f"`lightm train --resume {run_dir}`",
                signals.received or signal.SIGINT,
            ) from error
        except RuntimeError as error:
            if (death := patches.watched.death(str(error))) is None:
                raise
            raise LightMError(f"{death}; `lightm train --resume {run_dir}` goes on from the last checkpoint") from error
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
        skipped_steps=module.guard.skipped,
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


def build(
    config: TrainConfig,
    plan: Plan,
    network: torch.nn.Module | None = None,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Seed everything, and return the network and the loss of a run: those given, else those that it names."""
    pl.seed_everything(config.seed, workers=True, verbose=False)
    if network is None:
        described = network_description(config, plan)
        options = described.pop("options")
        network = create(**described, **options)
    sizes = {"spatial_dims": plan.spatial_dims, "num_classes": len(plan.labels)}
    if loss is None:
        return network, create_loss(config.settings.loss, **sizes, **config.settings.loss_options)
    return network, loss if isinstance(loss, SegmentationLoss) else CustomLoss(loss, **sizes)
