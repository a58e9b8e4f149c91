"""Batches of patches: for training from workers whose errors name the case, for validation from a fixed seed."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from lightm.errors import LightMError
from lightm.preparation.cache import PreprocessedCase
from lightm.preparation.patches import EpochSampler, PatchDataset
from lightm.training.record import Run

VALIDATION_SEED = 20_221_231  # the validation patches are the same for every seed of a run
Batch = dict[str, Any]


class RankSampler(EpochSampler):
    """The indices of an epoch that fall to rank r of n: every n-th from r on, without the `used` first of all."""

    def __init__(self, length: int, rank: int, ranks: int) -> None:
        super().__init__(length)
        self.rank, self.ranks, self.used = rank, ranks, 0

    def __len__(self) -> int:
        return self.length // self.ranks

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch * self.length + self.used + self.rank, (self.epoch + 1) * self.length, self.ranks))


class PatchLoaders:
    """The batches of one rank: training patches that depend on (seed, index) alone, and validation patches.

    With several ranks, validation patches are added so that all have equally many. A batch is {"image": float32
    (B, C, *patch), "label": int64 (B, *patch), "case": B ids}.
    """

    def __init__(self, run: Run, train: Sequence[PreprocessedCase], val: Sequence[PreprocessedCase]) -> None:
        config, plan, ranks = run.config, run.plan, run.fabric.world_size
        common: dict[str, Any] = {
            "patch_size": plan.patch_size,
            "foreground_fraction": config.foreground_fraction,
            "label_regions": plan.label_regions,
        }
        augment = config.augment if config.augment.enabled else None
        drawn = PatchDataset(train, seed=config.seed, augment=augment, **common)
        workers = config.workers or 0
        self.watched = WatchedPatches(drawn, workers)
        held_out = PatchDataset(val, seed=VALIDATION_SEED, **common)
        self._whole = whole = plan.batch_size * ranks
        val_patches = config.val_patches if ranks == 1 else -(-config.val_patches // whole) * whole
        self._train_sampler = RankSampler(config.steps_per_epoch * whole, run.fabric.global_rank, ranks)
        val_sampler = RankSampler(val_patches, run.fabric.global_rank, ranks)

        def loader(patches: TorchDataset[Batch], sampler: RankSampler, **more: Any) -> DataLoader[Batch]:
            generator = torch.Generator().manual_seed(config.seed)  # its own: the global ones are the steps' alone
            more.update(pin_memory=run.fabric.device.type == "cuda", generator=generator)
            return DataLoader(patches, batch_size=plan.batch_size, sampler=sampler, **more)

        self._train_loader = loader(
            self.watched,
            self._train_sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_collate,
            worker_init_fn=_start_worker,
        )
        self._val_loader = loader(held_out, val_sampler)

    def training(self, epoch: int, done: int) -> Iterator[Batch]:
        """The batches of an epoch but the first `done`; LightMError where a patch cannot be prepared."""
        self._train_sampler.set_epoch(epoch)
        self._train_sampler.used = done * self._whole
        for batch in self._train_loader:
            if "error" in batch:
                raise LightMError(batch["error"])
            yield batch

    def close(self) -> None:
        """End the worker processes; without this an error's traceback keeps them, and the exit waits for them."""
        iterator: Any = self._train_loader._iterator
        if iterator is not None:
            iterator._shutdown_workers()
            self._train_loader._iterator = None

    def validation(self) -> Iterator[Batch]:
        """The validation batches, the same in every epoch."""
        return iter(self._val_loader)


class WatchedPatches(TorchDataset[Batch]):
    """The patches of a PatchDataset; an error names its case, whether it raises or kills the worker process.

    What a worker raises travels as an item {"error": message}; each notes in shared memory which item it is at.
    """

    def __init__(self, patches: PatchDataset, workers: int) -> None:
        self.patches = patches
        self._at = torch.full((max(1, workers), 2), -1, dtype=torch.int64).share_memory_()  # process id, index

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, index: int) -> Batch:
        worker = get_worker_info()
        if worker is None:
            return self._item(index)
        self._at[worker.id, 0] = os.getpid()
        self._at[worker.id, 1] = index
        try:
            return self._item(index)
        except LightMError as error:
            return {"error": str(error)}
        finally:
            self._at[worker.id, 1] = -1

    def _item(self, index: int) -> Batch:
        try:
            return self.patches[index]
        except Exception as error:
            raise LightMError(
                f"case {self._case(index)}: its patch {index} cannot be prepared ({type(error).__name__}: {error}); "
                "look at the case, and delete the cache of preprocessed cases if the files were changed"
            ) from error

    def _case(self, index: int) -> str:
        return self.patches.cases[self.patches._case_of(index)].id

    def death(self, message: str) -> str | None:
        """What to say of PyTorch's error that a worker process is dead; None for another error."""
        if "DataLoader worker" not in message:
            return None
        named = {int(number) for number in re.findall(r"\d+", message)}
        at = {int(pid): int(index) for pid, index in self._at if index >= 0}
        cases = [self._case(index) for pid, index in at.items() if pid in named]
        where = f"while it prepared a patch of case {', '.join(cases)}" if cases else "between two patches"
        return (
            f"a process that prepares patches died {where} ({' '.join(message.split())}). Most often the system ran "
            "out of memory: use fewer --workers, a smaller patch or batch"
        )


def _collate(items: list[Batch]) -> Batch:
    """Join items into a batch; one with an error takes the place of the whole batch."""
    return next((item for item in items if "error" in item), None) or default_collate(items)


def _start_worker(worker: int) -> None:
    """Leave signals sent to the whole process group to the main process: it writes a checkpoint and ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # half a minute for the main process; SIGALRM then ends this one
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
