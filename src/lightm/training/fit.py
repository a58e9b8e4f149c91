"""What surrounds the loop of one run: its network, loss and Fabric before, the model folder after."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric

from lightm.datasets.split import Split
from lightm.device import resolve_device
from lightm.errors import InputError
from lightm.files import disk_refusals
from lightm.losses import SegmentationLoss, create_loss
from lightm.losses.base import CustomLoss
from lightm.nets import create, save_model
from lightm.preparation.plan import Plan
from lightm.progress import Progress
from lightm.training.checkpoint_io import BEST, load_checkpoint, newest_checkpoint
from lightm.training.config import TrainConfig
from lightm.training.loaders import PatchLoaders
from lightm.training.loop import Training

_log = logging.getLogger(__name__)


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


def build_fabric(
    device: str | torch.device = "cpu",
    precision: str = "32-true",
    *,
    devices: int | str = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
) -> Fabric:
    """Return the Fabric that a training runs on: where, on how many devices and machines, and how precisely.

    device: as in `resolve_device`; with a number ("cuda:1") that device alone. precision: "32-true", "bf16-mixed", ...;
    devices, num_nodes, strategy: as in Fabric.
    Raises InputError for what this machine does not have.

    >>> build_fabric("cpu").device
    device(type='cpu')
    """
    where = resolve_device(device)
    chosen: Any = {"devices": devices if where.index is None else [where.index], "precision": precision}
    try:
        return Fabric(accelerator=where.type, num_nodes=num_nodes, strategy=strategy, **chosen)
    except (ValueError, RuntimeError, ImportError) as error:
        raise InputError(f"device '{device}' with precision '{precision}': {error}") from error


def fit(
    fabric: Fabric,
    run_dir: Path,
    config: TrainConfig,
    plan: Plan,
    split: Split,
    network: torch.nn.Module,
    criterion: torch.nn.Module,
    patches: PatchLoaders,
    *,
    resume: bool,
    progress: Progress | None = None,
) -> TrainResult:
    """Fit the network in a prepared run folder and keep its best weights; `resume` takes its newest checkpoint.

    Raises what `train_model` says.
    """
    with disk_refusals(run_dir):  # of TensorBoard's files; all others name themselves
        training = Training(fabric, run_dir, config, list(plan.labels)[1:], network, criterion, patches)
        if resume:
            start = newest_checkpoint(training.folder)
            if start is None:
                _log.warning("%s: no checkpoint was kept before the interruption; the run starts anew", run_dir)
            else:
                training.load(start)
        reason = training.run(progress)
    state = training.state
    if fabric.is_global_zero:
        best = load_checkpoint(training.folder / BEST)
        weights = {
            name.removeprefix("network."): tensor
            for name, tensor in best["state_dict"].items()
            if name.startswith("network.")
        }
        save_model(
            run_dir / "model",
            network=network_description(config, plan),
            state_dict=weights,
            plan=plan.model_dump(mode="json"),
            training={
                "recipe": config.recipe,
                "loss": config.settings.loss,
                "seed": config.seed,
                "epochs": state.epoch,
                "steps": state.step,
                "train_seconds": round(state.elapsed_s, 1),
                "best_moving_pseudo_dice": state.best_dice,
                "best_epoch": best["epoch"],
                "data_hash": plan.fingerprint.data_hash,
            },
        )
    fabric.barrier()
    return TrainResult(
        run_dir=run_dir,
        config=config,
        plan=plan,
        split=split,
        epochs=state.epoch,
        best_pseudo_dice=state.best_dice,
        train_seconds=state.elapsed_s,
        reason=reason,
        skipped_steps=state.skipped,
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
    """Seed the global random generators, and return network and loss of a run: those given, else those it names."""
    random.seed(config.seed)
    np.random.seed(config.seed)  # noqa: NPY002 (networks may use it)
    torch.manual_seed(config.seed)
    if network is None:
        described = network_description(config, plan)
        options = described.pop("options")
        network = create(**described, **options)
    sizes = {"spatial_dims": plan.spatial_dims, "num_classes": len(plan.labels)}
    if loss is None:
        return network, create_loss(config.settings.loss, **sizes, **config.settings.loss_options)
    return network, loss if isinstance(loss, SegmentationLoss) else CustomLoss(loss, **sizes)
