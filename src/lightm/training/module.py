"""The training step, the validation's pseudo Dice and the learning rate, as a LightningModule."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightm.losses import AdaptiveRegion
from lightm.nets import parameter_groups
from lightm.training.guard import NanGuard, gradients_are_finite
from lightm.training.random_states import random_states, set_random_states
from lightm.training.recipes import Recipe

MOVING = 0.9  # weight of the past in the moving average of the pseudo Dice, as nnU-Net logs it
IGNORE = 255


class SegmentationModule(pl.LightningModule):
    """Train a network on patches; log train_loss, val_loss, pseudo Dice and its moving average.

    The pseudo Dice of a class is 2 TP / (2 TP + FP + FN) with the counts summed over all validation patches of the
    epoch (as nnU-Net computes it: no per-case mean, hence "pseudo"). A class that neither occurs nor is predicted
    there has none (NaN) and takes no part in the mean.

    With the adaptive region-specific loss the epoch's mean alpha and beta of each class are logged as well, as
    `arsl_alpha/CLASS` and `arsl_beta/CLASS`: how the loss weighs false and missed voxels against each other.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module,
        recipe: Recipe,
        *,
        class_names: list[str],
        total_steps: int | None,
        max_time_s: float | None,
        guard: NanGuard | None = None,
    ) -> None:
        super().__init__()
        self.guard = guard or NanGuard()
        self._cases: list[str] = []  # of the batch at work
        self._random: dict[str, Any] | None = None  # of the checkpoint that a run continues from
        self.network, self.loss, self.recipe = network, loss, recipe
        self.class_names = class_names
        self.total_steps, self.max_time_s = total_steps, max_time_s
        self.moving_dice: float | None = None
        self.best_dice: float | None = None
        self.epoch_row: dict[str, float] = {}
        self._elapsed_before = 0.0
        self._started: float | None = None
        self._losses: list[Tensor] = []
        self._val_losses: list[Tensor] = []
        self._adaptive = next((part for part in loss.modules() if isinstance(part, AdaptiveRegion)), None)
        self._coefficients: list[Tensor] = []
        self._counts = torch.zeros(len(class_names), 3, dtype=torch.float64)

    # ---- time and learning rate -------------------------------------------------------------------------

    def elapsed_s(self) -> float:
        """Seconds of training so far, those before an interruption included."""
        return self._elapsed_before + (0.0 if self._started is None else time.monotonic() - self._started)

    def progress(self) -> float:
        """How far the run has come, in [0, 1]: the further of its steps and its time."""
        parts = [0.0]
        if self.total_steps is not None:
            parts.append(self.global_step / self.total_steps)
        if self.max_time_s is not None:
            parts.append(self.elapsed_s() / self.max_time_s)
        return min(1.0, max(parts))

    def learning_rate(self) -> float:
        """The rate for the next step: warm-up, then the recipe's fall to zero."""
        recipe, left = self.recipe, 1.0 - self.progress()
        factor = {
            "poly": left**0.9,
            "cosine": 0.5 * (1 + math.cos(math.pi * (1 - left))),
            "constant": 1.0,
        }[recipe.schedule]
        warm = min(1.0, (self.global_step + 1) / recipe.warmup_steps) if recipe.warmup_steps else 1.0
        return recipe.lr * factor * warm

    def configure_optimizers(self) -> torch.optim.Optimizer:
        recipe = self.recipe
        groups = parameter_groups(self.network, recipe.weight_decay)
        if recipe.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
        kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
        return kind(groups, lr=recipe.lr, eps=recipe.eps)

    # ---- steps --------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        self._started = time.monotonic()
        if self._random is not None:  # only now: the set-up of loaders and loggers may have drawn numbers
            set_random_states(self._random)
            self._random = None

    def on_train_epoch_start(self) -> None:  # not called for an epoch that is continued midway
        self._losses, self._coefficients = [], []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        rate = self.learning_rate()
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate
        self.epoch_row["lr"] = rate

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        self._cases = batch["case"]
        loss = self.loss(self.network(batch["image"]), batch["label"])
        if not torch.isfinite(loss):
            self.guard.meet(f"the loss is {loss.item()}", self.global_step, self._cases, self.network)
            return None  # no gradient, so that the optimiser leaves the weights alone
        self._losses.append(loss.detach())
        if self._adaptive is not None and self._adaptive.last_coefficients is not None:
            self._coefficients.append(torch.cat(self._adaptive.last_coefficients))
        self.log("loss", loss.detach(), prog_bar=True, logger=False, batch_size=len(batch["case"]))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None  # it skips infinite ones itself
        if not scaled and not gradients_are_finite(self.network):
            self.guard.meet("a gradient is NaN or infinite", self.global_step, self._cases, self.network)
            optimizer.zero_grad(set_to_none=True)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        logits = self.network(batch["image"])
        target = batch["label"]
        self._val_losses.append(self.loss(logits, target).detach())
        predicted, kept = logits.argmax(1), target != IGNORE
        for k in range(len(self.class_names)):
            p, g = (predicted == k + 1) & kept, (target == k + 1) & kept
            tp = (p & g).sum()
            self._counts[k] += torch.stack([tp, p.sum() - tp, g.sum() - tp]).cpu()

    # ---- ends of epochs -----------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._counts.zero_()
        self._val_losses = []

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            return
        counts = self.trainer.strategy.reduce(self._counts.to(self.device), reduce_op="sum").cpu()
        tp, fp, fn = counts.unbind(1)
        dice = (2 * tp / (2 * tp + fp + fn)).tolist()  # 0/0 is NaN: absent and not predicted
        known = [value for value in dice if not math.isnan(value)]
        mean = sum(known) / len(known) if known else float("nan")
        if known:
            self.moving_dice = mean if self.moving_dice is None else MOVING * self.moving_dice + (1 - MOVING) * mean
        # validation closes every training epoch, and callbacks read the row before on_train_epoch_end comes here
        reduce = self.trainer.strategy.reduce
        self.epoch_row.update(
            train_loss=float(reduce(torch.stack(self._losses).mean(), reduce_op="mean")) if self._losses else math.nan,
            val_loss=float(reduce(torch.stack(self._val_losses).mean(), reduce_op="mean")),
            pseudo_dice=mean,
            pseudo_dice_ema=float("nan") if self.moving_dice is None else self.moving_dice,
            **{f"pseudo_dice/{name}": value for name, value in zip(self.class_names, dice, strict=True)},
            **self._coefficient_means(),
        )

    def coefficient_columns(self) -> list[str]:
        """Names of the epoch's values of alpha and beta; none without the adaptive region-specific loss."""
        if self._adaptive is None:
            return []
        names = [*(["background"] if self._adaptive.include_background else []), *self.class_names]
        return [f"arsl_{which}/{name}" for which in ("alpha", "beta") for name in names]

    def _coefficient_means(self) -> dict[str, float]:
        columns = self.coefficient_columns()
        if not columns:
            return {}
        # a step without a region of a class has none (NaN); an epoch of such steps neither
        nothing = torch.full((len(columns),), math.nan, device=self.device)
        means = torch.stack(self._coefficients).nanmean(0).to(self.device) if self._coefficients else nothing
        means = self.trainer.strategy.reduce(means, reduce_op="mean")
        return dict(zip(columns, means.tolist(), strict=True))

    def on_train_epoch_end(self) -> None:
        self._losses, self._coefficients = [], []
        for name, value in self.epoch_row.items():
            self.log(name, value, logger=True)

    # ---- checkpoints --------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lightm"] = {
            "elapsed_s": self.elapsed_s(),
            "moving_dice": self.moving_dice,
            "best_dice": self.best_dice,
            "skipped": self.guard.skipped,
            "losses": torch.stack(self._losses) if self._losses else None,  # of the epoch at work
            "coefficients": torch.stack(self._coefficients) if self._coefficients else None,
            "random": random_states(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["lightm"]
        self._elapsed_before = state["elapsed_s"]
        self.moving_dice, self.best_dice = state["moving_dice"], state["best_dice"]
        self.guard.skipped = state.get("skipped", 0)
        losses = state.get("losses")
        self._losses = [] if losses is None else list(losses)
        coefficients = state.get("coefficients")
        self._coefficients = [] if coefficients is None else list(coefficients)
        self._random = state.get("random")
