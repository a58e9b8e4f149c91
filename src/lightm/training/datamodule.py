"""Patches for training and validation, as a LightningDataModule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lightm.preparation.patches import EpochSampler, PatchDataset
from lightm.preparation.preprocess import PreprocessedCase
from lightm.training.guard import WatchedPatches, collate, raise_faults, start_worker
from lightm.training.recipes import Recipe

VALIDATION_SEED = 20_221_231  # the validation patches are the same in every epoch and for every seed


class ResumingSampler(EpochSampler):
    """An EpochSampler whose first pass leaves out the patches that were used before an interruption."""

    def __init__(self, length: int, start_epoch: int = 0, *, used: int = 0) -> None:
        super().__init__(length, start_epoch)
        self._used = used

    def __iter__(self) -> Iterator[int]:
        used, self._used = self._used, 0
        return iter(range(self.epoch * self.length + used, (self.epoch + 1) * self.length))


class PatchDataModule(pl.LightningDataModule):
    """Training patches that depend on (seed, index) alone, and a fixed set of validation patches."""

    def __init__(
        self,
        train: Sequence[PreprocessedCase],
        val: Sequence[PreprocessedCase],
        recipe: Recipe,
        *,
        patch_size: Sequence[int],
        batch_size: int,
        seed: int,
        val_patches: int,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        self.steps_per_epoch, self.val_patches = recipe.steps_per_epoch, val_patches
        self.train_patches = PatchDataset(
            train,
            patch_size=patch_size,
            seed=seed,
            augment=recipe.augment if recipe.augment.enabled else None,
            foreground_fraction=recipe.foreground_fraction,
        )
        self.watched = WatchedPatches(self.train_patches, workers)
        self.validation = PatchDataset(
            val,
            patch_size=patch_size,
            seed=VALIDATION_SEED,
            augment=None,
            foreground_fraction=recipe.foreground_fraction,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        sampler = ResumingSampler(self.steps_per_epoch * self.batch_size)
        if self.trainer is not None:
            loop = self.trainer.fit_loop
            # restarting: the checkpoint was written within an epoch, after that many steps of it
            used = loop.epoch_loop.batch_progress.current.processed if loop.restarting else 0
            sampler = ResumingSampler(len(sampler), self.trainer.current_epoch, used=used * self.batch_size)
        return DataLoader(
            self.watched,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            collate_fn=collate,
            worker_init_fn=start_worker,
            generator=self._generator(),
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(
            self.validation,
            batch_size=self.batch_size,
            sampler=EpochSampler(self.val_patches),
            num_workers=0,
            generator=self._generator(),
        )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return raise_faults(batch)

    def _generator(self) -> torch.Generator:
        """What a loader draws its workers' seeds from; its own, so that making one leaves the global state alone."""
        return torch.Generator().manual_seed(self.seed)
