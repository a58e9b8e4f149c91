"""What a training does when something goes wrong: values that are not finite, signals, faults while reading patches."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import default_collate

from lightm.errors import LightMError
from lightm.preparation.patches import PatchDataset


class Interrupted(LightMError):
    """A training that a signal ended; the exit code is 128 + the signal's number (130 Ctrl-C, 143 SIGTERM)."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class NanGuard:
    """Stop at a loss or gradient that is NaN or infinite, or skip such steps and count them.

    policy: "stop" raises LightMError; "skip" leaves the weights as they are, until `limit` steps were skipped in the
    run, then raises as well. say(text) gets a line for every step skipped.
    """

    def __init__(self, policy: str = "stop", limit: int = 10, say: Callable[[str], None] = print) -> None:
        self.policy, self.limit, self.say = policy, limit, say
        self.skipped = 0

    def meet(self, what: str, step: int, cases: Sequence[str], network: nn.Module) -> None:
        """Deal with a fault `what` met at a step on these cases; returns only when the step is to be skipped."""
        fault = f"{what} at step {step}, on the cases {', '.join(cases)}"
        advice = "the checkpoints before it are kept. Lower the learning rate or look at these cases' intensities"
        if self.policy != "skip":
            raise LightMError(f"{fault}; {advice}")
        self.skipped += 1
        if self.skipped > self.limit:
            raise LightMError(f"{fault}, after {self.limit} steps were skipped, which is the limit; {advice}")
        spoilt = [n for n, b in network.named_buffers() if b.is_floating_point() and not bool(torch.isfinite(b).all())]
        if spoilt:  # the forward pass itself changes running statistics
            raise LightMError(f"{fault}; skipping cannot help, it is in the network's '{spoilt[0]}' too; {advice}")
        self.say(f"{fault}: skipped ({self.skipped} of at most {self.limit})")


def gradients_are_finite(network: nn.Module) -> bool:
    """Whether no gradient holds NaN or an infinite value; one pass over them."""
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    if not gradients:
        return True
    sums = torch.stack([gradient.abs().amax().float() for gradient in gradients if gradient.numel()])
    return bool(torch.isfinite(sums).all())


class Signals(pl.Callback):
    """Turn the first Ctrl-C or SIGTERM into a wish to stop, which `Checkpoints` grants after the step at work.

    A second Ctrl-C ends the training at once. Only in the main thread, where Python lets signals be handled.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.received: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The trainer has set its own by now, and puts those from before it back when it ends.
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.received = signum
        more = "; Ctrl-C again ends it at once" if signum == signal.SIGINT else ""
        self.say(f"{signal.Signals(signum).name}: a checkpoint is written after this step{more}")


class WatchedPatches(TorchDataset[dict[str, Any]]):
    """The patches of a PatchDataset; a fault names its case, whether it raises or kills the worker process.

    A fault raised in a worker travels as an item {"fault": message} and is raised by `raise_faults`; for one that
    kills, each worker notes in shared memory the item it is at.
    """

    def __init__(self, patches: PatchDataset, workers: int) -> None:
        self.patches = patches
        self._at = torch.full((max(1, workers), 2), -1, dtype=torch.int64).share_memory_()  # process id, index

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        worker = torch.utils.data.get_worker_info()
        if worker is None:
            return self._item(index)
        self._at[worker.id, 0] = os.getpid()
        self._at[worker.id, 1] = index
        try:
            return self._item(index)
        except LightMError as error:
            return {"fault": str(error)}
        finally:
            self._at[worker.id, 1] = -1

    def _item(self, index: int) -> dict[str, Any]:
        try:
            return self.patches[index]
        except (Exception, MemoryError) as error:
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
            "out of memory: take fewer --workers, a smaller patch or batch"
        )


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Join items into a batch; one with a fault makes the whole batch one."""
    faults = [item for item in items if "fault" in item]
    batch: dict[str, Any] = faults[0] if faults else default_collate(items)
    return batch


def raise_faults(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the batch; raises LightMError where a worker met a fault."""
    if "fault" in batch:
        raise LightMError(batch["fault"])
    return batch


def start_worker(worker: int) -> None:
    """Leave signals sent to the whole group of processes to the main one: it writes a checkpoint and ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # half a minute for the main process; SIGALRM then ends this one
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
