"""What happens at the ends of steps and epochs: history.csv, console lines, checkpoints, budget, patience."""

from __future__ import annotations

import csv
import io
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightm.files import write_text
from lightm.training.checkpoint_io import save_rotating
from lightm.training.guard import Interrupted, Signals
from lightm.training.module import SegmentationModule

COLUMNS = ["epoch", "step", "train_loss", "val_loss", "pseudo_dice", "pseudo_dice_ema", "lr", "epoch_seconds"]


class History(pl.Callback):
    """Write a row an epoch to history.csv, whole each time, and a line to the console."""

    def __init__(self, path: Path, class_names: list[str], say: Callable[[str], None]) -> None:
        self.path, self.say = path, say
        self.columns = [*COLUMNS, *(f"pseudo_dice/{name}" for name in class_names)]
        self.rows: list[dict[str, Any]] = []
        self._epoch_started = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: SegmentationModule) -> None:
        self.columns += [name for name in pl_module.coefficient_columns() if name not in self.columns]
        if self.path.is_file():  # a resumed run: keep the rows before the epoch that is done again
            with self.path.open(newline="", encoding="utf-8") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["epoch"]) < trainer.current_epoch]
        self._epoch_started = time.monotonic()  # of an epoch continued midway, the rest is timed

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch_started = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: SegmentationModule) -> None:
        row = dict(pl_module.epoch_row)
        row.update(
            epoch=trainer.current_epoch,
            step=trainer.global_step,
            epoch_seconds=round(time.monotonic() - self._epoch_started, 2),
        )
        self.rows.append({name: row.get(name, "") for name in self.columns})
        if not trainer.is_global_zero:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())
        dice = ", ".join(
            f"{name.removeprefix('pseudo_dice/')} {row[name]:.3f}" for name in self.columns if "dice/" in name
        )
        self.say(
            f"Epoch {row['epoch']}: train_loss {row['train_loss']:.4f}  val_loss {row['val_loss']:.4f}  "
            f"Pseudo dice [{dice}]  moving average {row['pseudo_dice_ema']:.3f}  lr {row['lr']:.2e}  "
            f"{row['epoch_seconds']:.1f} s"
        )


class ProgressBar(pl.callbacks.RichProgressBar):
    """Lightning's Rich bar, without a last epoch where a time budget ends the run."""

    def _get_train_description(self, current_epoch: int) -> str:
        last = self.trainer.max_epochs
        return f"Epoch {current_epoch}" + (f"/{last - 1}" if last is not None and last > 0 else "")


class Checkpoints(pl.Callback):
    """Keep `last.ckpt`, the `previous.ckpt` before it, and `best.ckpt` of the best moving pseudo Dice.

    Written after every epoch, within one when the last is older than `every_s`, and when a signal asks to stop: then
    after the step at work (after the validation, in the last step of an epoch), and Interrupted is raised.
    """

    def __init__(self, folder: Path, signals: Signals, every_s: float = 600.0) -> None:
        self.folder, self.signals, self.every_s = folder, signals, every_s
        self._written = 0.0

    @property
    def last(self) -> Path:
        return self.folder / "last.ckpt"

    @property
    def best(self) -> Path:
        return self.folder / "best.ckpt"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._written = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: SegmentationModule, *_: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        if loop.batch_progress.is_last_batch or trainer.should_stop:
            return  # the epoch's end writes one
        due = time.monotonic() - self._written >= self.every_s
        if due or self.signals.received is not None:
            self._write(lambda path: trainer.save_checkpoint(path))
            self._stop_if_asked(trainer)

    def _write(self, save: Callable[[Path], object]) -> None:
        save_rotating(self.folder, save)
        self._written = time.monotonic()

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        if self.signals.received is not None:
            raise Interrupted(
                f"training was interrupted in epoch {trainer.current_epoch}, after step {trainer.global_step}; "
                f"continue it with `lightm train --resume {self.folder.parent}`",
                self.signals.received,
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: SegmentationModule) -> None:
        moving = pl_module.moving_dice
        better = moving is not None and (pl_module.best_dice is None or moving > pl_module.best_dice)
        if better:
            pl_module.best_dice = moving
        if better or not self.best.exists():
            # The best one first: a run killed between the two does this epoch again, and finds it the best again.
            trainer.save_checkpoint(self.best)
            self._write(lambda path: shutil.copyfile(self.best, path))
        else:
            self._write(lambda path: trainer.save_checkpoint(path))
        self._stop_if_asked(trainer)


class Stopping(pl.Callback):
    """End the training when its time is up, or after `patience` epochs without a better moving pseudo Dice."""

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.waited = 0
        self._best = -math.inf
        self.reason = ""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: SegmentationModule, *_: Any) -> None:
        if pl_module.max_time_s is not None and pl_module.elapsed_s() >= pl_module.max_time_s:
            self.reason = f"the time budget of {pl_module.max_time_s:.0f} s is used"
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: SegmentationModule) -> None:
        moving = -math.inf if pl_module.moving_dice is None else pl_module.moving_dice
        self.waited = 0 if moving > self._best else self.waited + 1
        self._best = max(self._best, moving)
        if self.patience is not None and self.waited >= self.patience and not trainer.should_stop:
            self.reason = f"no better moving pseudo Dice for {self.patience} epochs"
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"waited": self.waited, "best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.waited, self._best = state_dict["waited"], state_dict["best"]
