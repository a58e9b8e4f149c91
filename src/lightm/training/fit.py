"""What surrounds the loop of one run: its network, loss and Fabric before, the model folder after."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn

from lightm.device import resolve_device
from lightm.errors import InputError
from lightm.files import disk_refusals
from lightm.losses import SegmentationLoss, create_loss
from lightm.losses.custom import CustomLoss
from lightm.nets import create, save_model
from lightm.progress import Progress
from lightm.training.checkpoint_io import BEST, load_checkpoint, newest_checkpoint
from lightm.training.loaders import PatchLoaders
from lightm.training.loop import Training
from lightm.training.record import Run

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainResult(Run):
    """A finished training: what it was, and how it ended."""

    epochs: int
    best_pseudo_dice: float | None
    train_seconds: float
    reason: str
    skipped_steps: int = 0


def build_fabric(
    device: str | torch.device = "cpu", precision: str = "32-true", *, devices: int | str = 1, strategy: str = "auto"
) -> Fabric:
    """Return the Fabric that a training runs on: where, on how many devices, and how precisely.

    device: as in `resolve_device`; with a number ("cuda:1") that device alone. precision: "32-true", "bf16-mixed", ...;
    devices, strategy: as in Fabric. Raises InputError for what this machine does not have.

    >>> build_fabric("cpu").device
    device(type='cpu')
    """
    where = resolve_device(device)
    chosen: Any = {"devices": devices if where.index is None else [where.index], "precision": precision}
    try:
        return Fabric(accelerator=where.type, strategy=strategy, **chosen)
    except (ValueError, RuntimeError, ImportError) as error:
        raise InputError(f"device '{device}' with precision '{precision}': {error}") from error


def fit(
    run: Run, network: nn.Module, criterion: nn.Module, patches: PatchLoaders, progress: Progress | None = None
) -> TrainResult:
    """Fit the network in a prepared run folder and keep its best weights; a resumed run takes its newest checkpoint.

    Raises what `run_training` says.
    """
    config, plan, run_dir = run.config, run.plan, run.run_dir
    with disk_refusals(run_dir):  # of TensorBoard's files; all others name themselves
        training = Training(run, network, criterion, patches)
        if run.resume and (start := newest_checkpoint(training.folder)) is not None:
            training.load(start)
        elif run.resume:
            _log.warning("%s: no checkpoint was kept before the interruption; the run starts anew", run_dir)
        reason = training.run(progress)
    state = training.state
    if run.fabric.is_global_zero:
        best = load_checkpoint(training.folder / BEST)
        weights = best["state_dict"].items()
        save_model(
            run_dir / "model",
            network=_description(run),
            state_dict={k.removeprefix("network."): tensor for k, tensor in weights if k.startswith("network.")},
            plan=plan.model_dump(mode="json"),
            training={
                "recipe": config.recipe,
                "loss": config.loss,
                "seed": config.seed,
                "epochs": state.epoch,
                "steps": state.step,
                "train_seconds": round(state.elapsed_s, 1),
                "best_moving_pseudo_dice": state.best_dice,
                "best_epoch": best["epoch"],
                "data_hash": plan.fingerprint.data_hash,
            },
        )
    run.fabric.barrier()
    return TrainResult(
        **vars(run),
        epochs=state.epoch,
        best_pseudo_dice=state.best_dice,
        train_seconds=state.elapsed_s,
        reason=reason,
        skipped_steps=state.skipped,
    )


def _description(run: Run) -> dict[str, Any]:
    """The arguments of `lightm.nets.create` for this run, as kept in model.json."""
    return {
        "name": run.config.network,
        "spatial_dims": run.plan.spatial_dims,
        "in_channels": len(run.plan.channels),
        "out_channels": len(run.plan.labels),
        "image_size": run.plan.patch_size,
        "options": run.config.network_options,
    }


def build(run: Run) -> tuple[nn.Module, nn.Module]:
    """Seed the global random generators, and return network and loss of a run: those given, else those it names."""
    random.seed(run.config.seed)
    np.random.seed(run.config.seed)  # noqa: NPY002 (networks may use it)
    torch.manual_seed(run.config.seed)
    network, loss = run.network, run.loss
    if network is None:
        described = _description(run)
        options = described.pop("options")
        network = create(**described, **options)
    sizes = {"spatial_dims": run.plan.spatial_dims, "num_classes": len(run.plan.labels)}
    if loss is None:
        return network, create_loss(run.config.loss, **sizes, **run.config.loss_options)
    return network, loss if isinstance(loss, SegmentationLoss) else CustomLoss(loss, **sizes)
