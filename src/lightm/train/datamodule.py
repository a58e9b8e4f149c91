"""Patches for training and validation, as a LightningDataModule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from lightm.data.preprocess import PreprocessedCase
from lightm.data.sampling import EpochSampler, PatchDataset
from lightm.train.recipes import Recipe

VALIDATION_SEED = 20_221_231  # the validation patches are the same in every epoch and for every seed


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
        self.batch_size, self.workers = batch_size, workers
        self.steps_per_epoch, self.val_patches = recipe.steps_per_epoch, val_patches
        self.train_patches = PatchDataset(
            train,
            patch_size=patch_size,
            seed=seed,
            augment=recipe.augment if recipe.augment.enabled else None,
            foreground_fraction=recipe.foreground_fraction,
        )
        self.validation = PatchDataset(
            val,
            patch_size=patch_size,
            seed=VALIDATION_SEED,
            augment=None,
            foreground_fraction=recipe.foreground_fraction,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        sampler = EpochSampler(self.steps_per_epoch * self.batch_size)
        if self.trainer is not None:
            sampler.set_epoch(self.trainer.current_epoch)
        return DataLoader(
            self.train_patches,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(
            self.validation, batch_size=self.batch_size, sampler=EpochSampler(self.val_patches), num_workers=0
        )
