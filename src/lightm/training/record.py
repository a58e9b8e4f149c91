"""A run and what it records: run.json, and per epoch a row of history.csv, TensorBoard scalars, a line in the log."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning_fabric
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from lightm import __version__
from lightm.datasets.cases import Dataset
from lightm.datasets.split import Split
from lightm.files import write_text
from lightm.nets import count_parameters
from lightm.preparation.plan import Plan
from lightm.training.config import TrainConfig

_log = logging.getLogger(__name__)

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, K, *S), target (B, *S) class indices, 255 for voxels that must not count) -> scalar."""


WHOLE_SHARE = 0.02  # of the patches' forward and backward passes, what scoring whole cases between epochs may cost
WATCHED_CASES = 3  # that are scored between epochs


@dataclass(frozen=True)
class WholeCases:
    """The validation cases that are scored whole, at the end of a training and now and then in it.

    windows: of the sliding window that predicts each case. score(network, ids): mean DSC over these cases and classes;
    None: nothing is scored between epochs.
    """

    ids: Sequence[str]
    windows: Sequence[int]
    score: Callable[[nn.Module, Sequence[str]], float] | None = None

    @property
    def watched(self) -> Sequence[str]:
        """The few cases that are scored between epochs, always the same."""
        return self.ids[:WATCHED_CASES]

    @property
    def cost(self) -> int:
        """What scoring the watched ones costs, in patches that the network is run on; reading a case counts as one."""
        return sum(self.windows[:WATCHED_CASES]) + len(self.watched)


@dataclass(frozen=True)
class Run:
    """A training that can begin or be resumed.

    data_hash: of the files of the split's cases, as `lightm.preparation.fingerprint.data_hash`. network, loss: objects
    of one's own; None: what the config names.
    """

    run_dir: Path
    config: TrainConfig
    fabric: Fabric = field(repr=False)
    data: Dataset = field(repr=False)
    plan: Plan
    split: Split
    data_hash: str = ""
    network: nn.Module | None = None
    loss: Loss | None = None
    resume: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainResult(Run):
    """A finished training: what it was, and how it ended."""

    epochs: int
    best_pseudo_dice: float | None
    train_seconds: float
    reason: str
    skipped_steps: int = 0


COLUMNS = [
    *("epoch", "step", "train_loss", "val_loss", "pseudo_dice", "pseudo_dice_smoothed", "whole_case_dice"),
    *("lr", "epoch_seconds"),
]


class History:
    """The records of a run folder, for a `with` statement; those from `epoch` on, which is done again, are dropped."""

    def __init__(self, run_dir: Path, more_columns: Sequence[str], epoch: int) -> None:
        self.path, self.columns = run_dir / "history.csv", [*COLUMNS, *more_columns]
        self.rows: list[dict[str, Any]] = []
        if self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                rows: list[dict[str, Any]] = [row for row in csv.DictReader(file) if int(row["epoch"]) < epoch]
            for row in rows:  # one of an earlier version has other columns
                row.setdefault("pseudo_dice_smoothed", row.get("pseudo_dice_ema"))
                self.rows.append({name: row.get(name, "nan") for name in self.columns})
        self._board = SummaryWriter(str(run_dir / "tensorboard"))

    def __enter__(self) -> History:
        return self

    def __exit__(self, *_: object) -> None:
        self._board.close()

    def add(self, row: dict[str, Any]) -> None:
        """Record an epoch; history.csv is written atomically."""
        self.rows.append({name: row[name] for name in self.columns})
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())
        whole = "" if math.isnan(row["whole_case_dice"]) else f"  whole cases {row['whole_case_dice']:.3f}"
        for name in row.keys() - {"step", "epoch_seconds", *(() if whole else ("whole_case_dice",))}:
            self._board.add_scalar(name, row[name], row["step"] - 1)
        classes = [name for name in self.columns if "dice/" in name]
        dice = ", ".join(f"{name.removeprefix('pseudo_dice/')} {row[name]:.3f}" for name in classes)
        _log.info(
            f"Epoch {row['epoch']}: train_loss {row['train_loss']:.4f}  val_loss {row['val_loss']:.4f}  "
            f"pseudo Dice [{dice}]  smoothed {row['pseudo_dice_smoothed']:.3f}{whole}  lr {row['lr']:.2e}  "
            f"{row['epoch_seconds']:.1f} s"
        )


def run_record(run: Run, net: nn.Module, started: datetime) -> dict[str, Any]:
    """Return what a reader needs to repeat the run: command, versions, machine, seed, data hash."""
    config, earlier, first = run.config, run.run_dir / "run.json", started.isoformat(timespec="seconds")
    if run.resume and earlier.is_file():
        first = json.loads(earlier.read_text(encoding="utf-8")).get("started", first)
    called = Path(sys.argv[0]).stem
    packages = ("torch", "monai", "numba", "numpy", "nibabel")
    return {
        "command": " ".join(["lightm", *sys.argv[1:]]) if called == "lightm" else "lightm.train()",
        "versions": {
            "lightm-unet": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
            "lightning-fabric": lightning_fabric.__version__,
        },
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "seed": config.seed,
        "data_hash": run.data_hash,
        "backend": f"{run.fabric.device}, {config.precision}",
        "started": first,
        "finished": None,
        "train_seconds": None,
        "parameters": count_parameters(net),
        "network": config.network,
        "status": "running",
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(content, indent=1) + "\n")
