"""The training loop: epochs, steps, validation, checkpoints and the end, from top to bottom.

A checkpoint holds `State`, the weights and the states of optimizer and global random generators, so that a run resumed
after any step ends as one that nothing interrupted, bit for bit. With several ranks (processes) each runs this loop on
its share of the patches; after each step they agree on clock and signals of rank 0, which alone writes files.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightm.errors import InputError, LightMError
from lightm.labels import IGNORE_INDEX, mask_of, overlap_counts
from lightm.losses import AdaptiveRegion
from lightm.nets import parameter_groups
from lightm.progress import Progress
from lightm.training.checkpoint_io import (
    BEST,
    load_checkpoint,
    random_states,
    save_checkpoint,
    save_rotating,
    set_random_states,
)
from lightm.training.config import Recipe
from lightm.training.guard import Interrupted, NanGuard, Signals, gradients_are_finite
from lightm.training.loaders import Batch, PatchLoaders
from lightm.training.record import WHOLE_SHARE, History, Run, WholeCases
from lightm.training.selection import best_epoch, smoothed

RESERVED = 0.1  # the most of a time budget that is kept for whole validation cases after the last epoch


@dataclass
class State:
    """How far a run is and what it must remember; times in seconds, `losses` of the epoch at work."""

    epoch: int = 0  # the epoch at work
    batch: int = 0  # its steps that are done
    step: int = 0  # all steps that are done
    elapsed_s: float = 0.0
    dice: list[float] = field(default_factory=list)  # the pseudo Dice of every epoch, NaN where it has none
    best_epoch: int | None = None  # the epoch of best.ckpt, see `lightm.training.selection`
    skipped: int = 0
    watched: int = 0  # windows of whole cases that were predicted between epochs
    losses: list[Tensor] = field(default_factory=list)
    coefficients: list[Tensor] = field(default_factory=list)  # of the adaptive region-specific loss
    random: dict[str, Any] | None = None

    @property
    def best_dice(self) -> float | None:
        """The smoothed pseudo Dice of the epoch that is kept."""
        return None if self.best_epoch is None else smoothed(self.dice, self.best_epoch)

    @property
    def waited(self) -> int:
        """The epochs since the one that is kept."""
        return len(self.dice) - (0 if self.best_epoch is None else self.best_epoch + 1)


class Training:
    """One run: `network` is trained on the patches and its checkpoints, history.csv and TensorBoard files are written.

    The pseudo Dice of a class or region is 2 TP / (2 TP + FP + FN) with the counts summed over all validation patches
    of the epoch (as in nnU-Net: no per-case mean, hence "pseudo"). A class that neither occurs nor is predicted there
    has none (NaN) and takes no part in the mean. `lightm.training.selection` chooses `best.ckpt` by the mean.
    """

    checkpoint_every_s = 600.0

    def __init__(
        self,
        run: Run,
        network: nn.Module,
        criterion: nn.Module,
        patches: PatchLoaders,
        whole: WholeCases | None = None,
    ) -> None:
        self.fabric, self.run_dir, self.patches, self.config = run.fabric, run.run_dir, patches, run.config
        self.class_names, self.label_regions = list(run.plan.targets), run.plan.label_regions
        config = run.config
        self.criterion = self.fabric.to_device(criterion)
        self.network, self.optimizer = self.fabric.setup(network, create_optimizer(network, config))
        by_time_alone = config.max_time_s is not None and not config.epochs_given
        self.epochs = None if by_time_alone else config.epochs
        self.guard = NanGuard(config.on_nan, config.nan_limit)
        self.signals, self.state = Signals(), State()
        self.folder = run.run_dir / "checkpoints"
        self.whole, self._bare, self._validation_s = whole, network, math.nan
        self._batch = run.plan.batch_size * self.fabric.world_size
        self._adaptive = next((part for part in criterion.modules() if isinstance(part, AdaptiveRegion)), None)

    def run(self, progress: Progress | None = None) -> str:
        """Train to the end and return why it ended; `Interrupted` at Ctrl-C and SIGTERM, with a checkpoint kept."""
        state = self.state
        self._started, self._saved = time.monotonic() - state.elapsed_s, time.monotonic()
        if state.random is not None:  # only now: what came before may have drawn numbers
            set_random_states(state.random)
        columns = [*(f"pseudo_dice/{name}" for name in self.class_names), *self.coefficient_names()]
        writes = self.fabric.is_global_zero
        records = History(self.run_dir, columns, state.epoch) if writes else contextlib.nullcontext()
        with records as history, self.signals:
            try:
                while state.batch or not (reason := self.finished()):
                    epoch_started = time.monotonic()
                    self.train_epoch(progress)
                    row = {"epoch": state.epoch, "step": state.step, **self.train_metrics(), **self.validate()}
                    is_best = self.update_best(row["pseudo_dice"])
                    row["whole_case_dice"] = self.score_whole_cases()
                    row["pseudo_dice_smoothed"] = smoothed(state.dice, state.epoch)
                    row["epoch_seconds"] = round(time.monotonic() - epoch_started, 2)
                    if history is not None:
                        history.add(row)
                    state.epoch, state.batch, state.losses, state.coefficients = state.epoch + 1, 0, [], []
                    self.agree()
                    self.save(is_best)
                    self.stop_if_asked()
            except KeyboardInterrupt:  # the second Ctrl-C
                self.signals.received = self.signals.received or signal.SIGINT
                self.stop_if_asked()
            except RuntimeError as error:
                if (death := self.patches.watched.death(str(error))) is None:
                    raise
                remedy = f"`lightm train --resume {self.run_dir}` resumes from the last checkpoint"
                raise LightMError(f"{death}; {remedy}") from error
            finally:
                self.patches.close()
        return reason

    def finished(self) -> str:
        """Why the run is at its end; empty while it is not."""
        state, config, time_s = self.state, self.config, self.time_s()
        if config.max_time_s is not None and time_s is not None and state.elapsed_s >= time_s:
            return f"the time budget of {config.max_time_s:.0f} s is used"
        if config.patience is not None and state.waited >= config.patience:
            return f"no better smoothed pseudo Dice for {config.patience} epochs"
        return f"all {self.epochs} epochs are done" if self.epochs is not None and state.epoch >= self.epochs else ""

    def time_s(self) -> float | None:
        """The seconds for epochs: the time budget without what predicting the whole validation cases is to take.

        That is a tenth until it is known better: for each window what a validation patch took, twice for the best and
        the last weights, and as much again for reading and resampling.
        """
        budget = self.config.max_time_s
        if budget is None or self.whole is None:
            return budget
        needed = self._validation_s * (1 + 4 * sum(self.whole.windows) / self.config.val_patches)
        return budget - (RESERVED * budget if math.isnan(needed) else min(RESERVED * budget, needed))

    # ---- steps --------------------------------------------------------------------------------------------

    def train_epoch(self, progress: Progress | None) -> None:
        """The steps of the epoch that are not done yet, up to the end of the time budget."""
        state, steps, time_s = self.state, self.config.steps_per_epoch, self.time_s()
        what = f"epoch {state.epoch}" + ("" if self.epochs is None else f"/{self.epochs - 1}")
        for batch in self.patches.training(state.epoch, state.batch):
            self.step(self.fabric.to_device(batch))
            state.batch, state.step = state.batch + 1, state.step + 1
            if progress is not None:
                progress(what, state.batch, steps)
            due = self.agree()
            if time_s is not None and state.elapsed_s >= time_s:
                break
            if state.batch < steps and (due or self.signals.received is not None):  # else the epoch's end saves
                self.save()
                self.stop_if_asked()

    def step(self, batch: Batch) -> None:
        """One optimizer step; one whose loss or gradient is not finite is left to the guard."""
        state, network, optimizer = self.state, self.network, self.optimizer
        rate = self.learning_rate()
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss_of(batch)
        mean = self.fabric.all_reduce(loss.detach(), reduce_op="mean")
        optimizer.zero_grad()
        if not torch.isfinite(mean):
            return self.guard.handle(f"the loss is {mean.item()}", state.step, batch["case"], network)
        state.losses.append(mean)
        if self._adaptive is not None and self._adaptive.last_coefficients is not None:
            state.coefficients.append(torch.cat(self._adaptive.last_coefficients))
        self.fabric.backward(loss)
        scaled = getattr(self.fabric.strategy.precision, "scaler", None) is not None  # it skips infinite ones itself
        if not scaled and not gradients_are_finite(network):
            return self.guard.handle("a gradient is NaN or infinite", state.step, batch["case"], network)
        if self.config.clip_norm is not None:
            self.fabric.clip_gradients(network, optimizer, max_norm=self.config.clip_norm, error_if_nonfinite=False)
        optimizer.step()

    def loss_of(self, batch: Batch) -> Tensor:
        loss: Tensor = self.criterion(self.network(batch["image"]), batch["label"])
        return loss

    def learning_rate(self) -> float:
        """The rate of the next step: warm-up, then the schedule's fall to 0 with the further of steps and time."""
        config, state, parts = self.config, self.state, [0.0]
        if self.epochs is not None:
            parts.append(state.step / (self.epochs * config.steps_per_epoch))
        if (time_s := self.time_s()) is not None:
            parts.append(state.elapsed_s / time_s)
        left = 1.0 - min(1.0, max(parts))
        cosine = 0.5 * (1 + math.cos(math.pi * (1 - left)))
        factor = {"poly": left**0.9, "cosine": cosine, "constant": 1.0}[config.schedule]
        warm = min(1.0, (state.step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        return config.lr * factor * warm

    def agree(self) -> bool:
        """Take over the time and the signals of rank 0; returns whether a checkpoint is due."""
        now = time.monotonic()
        mine = (now - self._started, self.signals.received, now - self._saved >= self.checkpoint_every_s)
        self.state.elapsed_s, self.signals.received, due = self.fabric.broadcast(mine)
        return bool(due)

    # ---- ends of epochs -----------------------------------------------------------------------------------

    def train_metrics(self) -> dict[str, float]:
        """The epoch's mean loss, last learning rate and, with the adaptive region-specific loss, mean coefficients."""
        state, names = self.state, self.coefficient_names()
        mean_loss = float(torch.stack(state.losses).mean()) if state.losses else math.nan
        metrics = {"train_loss": mean_loss, "lr": self.optimizer.param_groups[0]["lr"]}
        if names:  # a step without a region of a class has none (NaN); an epoch of such steps neither
            nothing = torch.full((len(names),), math.nan)
            means = torch.stack(state.coefficients).nanmean(0) if state.coefficients else nothing
            means = self.fabric.all_reduce(self.fabric.to_device(means), reduce_op="mean")
            metrics.update(zip(names, means.tolist(), strict=True))
        return metrics

    def coefficient_names(self) -> list[str]:
        """`arsl_alpha/CLASS` and `arsl_beta/CLASS`: how the loss weighs false and missed voxels, if it is adaptive."""
        if self._adaptive is None:
            return []
        names = [*(["background"] if self._adaptive.include_background else []), *self.class_names]
        return [f"arsl_{which}/{name}" for which in ("alpha", "beta") for name in names]

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Loss and pseudo Dice on the validation patches; the networks' modes are as before afterwards."""
        started = time.monotonic()
        training = [part for part in (*self.network.modules(), *self.criterion.modules()) if part.training]
        self.network.eval(), self.criterion.eval()
        counts = torch.zeros(len(self.class_names), 3, dtype=torch.int64, device=self.fabric.device)
        losses = []
        for batch in self.patches.validation():
            batch = self.fabric.to_device(batch)
            logits, target = self.network(batch["image"]), batch["label"]
            losses.append(self.criterion(logits, target))
            valid = target != IGNORE_INDEX
            for k, (found, there) in enumerate(found_and_there(logits, target, self.label_regions)):
                tp, in_pred, in_label = overlap_counts(found, there, valid)
                counts[k] += torch.stack([tp, in_pred - tp, in_label - tp])
        for part in training:
            part.training = True
        tp, fp, fn = self.fabric.all_reduce(counts, reduce_op="sum").cpu().double().unbind(1)
        dice = (2 * tp / (2 * tp + fp + fn)).tolist()  # 0/0 is NaN: absent and not predicted
        known = [value for value in dice if not math.isnan(value)]
        self._validation_s = time.monotonic() - started
        return {
            "val_loss": float(self.fabric.all_reduce(torch.stack(losses).mean(), reduce_op="mean")),
            "pseudo_dice": sum(known) / len(known) if known else math.nan,
            **{f"pseudo_dice/{name}": value for name, value in zip(self.class_names, dice, strict=True)},
        }

    def score_whole_cases(self) -> float:
        """The mean DSC of a few whole validation cases, NaN where that is not due.

        It is due when all that was predicted so costs no more than a small share of the training so far, counted in
        patches and not in seconds, so that a resumed run scores after the same epochs.
        """
        state, whole, fabric = self.state, self.whole, self.fabric
        if whole is None or whole.score is None or not whole.ids or not fabric.is_global_zero:
            return math.nan
        passes = 3 * state.step * self._batch  # of a patch through the network: one forward, and backward as two
        if state.watched + whole.cost > WHOLE_SHARE * passes:
            return math.nan
        state.watched += whole.cost
        training = [part for part in self.network.modules() if part.training]
        score = whole.score(self._bare, whole.watched)
        for part in training:
            part.training = True
        return score

    def update_best(self, dice: float) -> bool:
        """Note an epoch's pseudo Dice; returns whether its weights are the ones to keep so far."""
        state = self.state
        state.dice.append(dice)
        state.best_epoch = best_epoch(state.dice, state.best_epoch)
        return state.best_epoch == state.epoch

    # ---- checkpoints --------------------------------------------------------------------------------------

    def save(self, is_best: bool = False) -> None:
        """Write `last.ckpt`, keeping the one before as `previous.ckpt`; the best and the first as `best.ckpt` too."""
        self.state.skipped, self.state.random = self.guard.skipped, random_states()
        best = self.folder / BEST
        if self.fabric.is_global_zero:
            kept = {"losses": self.state.losses, "coefficients": self.state.coefficients}
            lists: dict[str, Any] = {name: torch.stack(values) if values else [] for name, values in kept.items()}
            checkpoint = {
                "epoch": self.state.epoch if self.state.batch else self.state.epoch - 1,
                "global_step": self.state.step,
                "state_dict": {
                    f"{part}.{name}": value
                    for part, module in (("network", self.network), ("loss", self.criterion))
                    for name, value in module.state_dict().items()
                },
                "optimizer_states": [self.optimizer.state_dict()],
                "precision": self.fabric.strategy.precision.state_dict(),
                "lightm": {**vars(self.state), **lists},
            }
            if not self.state.batch and (is_best or not best.exists()):
                # The best one first: a run killed between the two does this epoch again, and finds it the best again.
                save_checkpoint(checkpoint, best)
                save_rotating(self.folder, lambda path: shutil.copyfile(best, path))
            else:
                save_rotating(self.folder, lambda path: save_checkpoint(checkpoint, path))
        self.fabric.barrier()
        self._saved = time.monotonic()

    def load(self, path: Path) -> None:
        """Take up the run where a checkpoint left it, before `run`; InputError when that is none of this run."""
        checkpoint = load_checkpoint(path)
        try:
            parts: dict[str, dict[str, Tensor]] = {"network": {}, "loss": {}}
            for name, value in checkpoint["state_dict"].items():
                part, _, key = name.partition(".")
                parts[part][key] = value
            self.network.load_state_dict(parts["network"])
            self.criterion.load_state_dict(parts["loss"])
            self.optimizer.load_state_dict(checkpoint["optimizer_states"][0])
            self.fabric.strategy.precision.load_state_dict(checkpoint["precision"])
            state = checkpoint["lightm"]
            lists = {name: list(self.fabric.to_device(state[name])) for name in ("losses", "coefficients")}
            self.state = State(**{**state, **lists})
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            remedy = "resume it with the LightM that wrote it, or start a new run"
            raise InputError(f"{path}: does not fit this run ({error}); {remedy}") from error
        self.guard.skipped = self.state.skipped

    def stop_if_asked(self) -> None:
        """Raise Interrupted after a signal."""
        state, signum = self.state, self.signals.received
        if signum is not None:
            epoch = state.epoch if state.batch else max(0, state.epoch - 1)
            where = f"in epoch {epoch}, after step {state.step}"
            remedy = f"resume it with `lightm train --resume {self.run_dir}`"
            raise Interrupted(f"training was interrupted {where}; {remedy}", signum)


def found_and_there(
    logits: Tensor, target: Tensor, regions: Sequence[Sequence[int]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each foreground class, or each region, where it is found and where it is: two masks (B, *S).

    logits (B, K, *S): the largest is the class; of regions those above 0 are found, a probability above one half.
    target (B, *S): class indices; regions: the class indices of each, empty for classes.
    """
    if regions:
        for k, region in enumerate(regions):
            yield logits[:, k] > 0, mask_of(target, region)
        return
    predicted = logits.argmax(1)
    for k in range(1, logits.shape[1]):
        yield predicted == k, target == k


def create_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimizer; weight decay acts on matrices alone, see `lightm.nets.parameter_groups`."""
    groups = parameter_groups(network, recipe.weight_decay)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=recipe.lr, eps=recipe.eps)
