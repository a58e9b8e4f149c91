"""What a training does about values that are not finite and about signals."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn

from lightm.errors import LightMError

_log = logging.getLogger(__name__)


class Interrupted(LightMError):
    """A training that a signal ended; the exit code is 128 + the signal's number (130 Ctrl-C, 143 SIGTERM)."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class NanGuard:
    """Stop at a loss or gradient that is NaN or infinite (LightMError), or skip such steps and count them.

    policy: "stop", or "skip", which raises only when more than `limit` steps of the run were skipped. Every step
    skipped is logged as a warning.
    """

    def __init__(self, policy: str = "stop", limit: int = 10) -> None:
        self.policy, self.limit = policy, limit
        self.skipped = 0

    def handle(self, what: str, step: int, cases: Sequence[str], network: nn.Module) -> None:
        """Deal with `what` at a step on these cases; returns only when the step is to be skipped."""
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
        _log.warning("%s: skipped (%d of at most %d)", fault, self.skipped, self.limit)


def gradients_are_finite(network: nn.Module) -> bool:
    """Whether no gradient holds NaN or an infinite value; one pass over them."""
    gradients = [p.grad for p in network.parameters() if p.grad is not None and p.grad.numel()]
    largest = [gradient.abs().amax().float() for gradient in gradients]
    return not largest or bool(torch.isfinite(torch.stack(largest)).all())


class Signals:
    """While this is entered, the first Ctrl-C or SIGTERM is noted in `received`; a second Ctrl-C interrupts at once.

    Only in the main thread, where Python lets signals be handled. The handlers from before come back at the end.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)  # None: set outside of Python

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.received = signum
        more = "; Ctrl-C again ends it at once" if signum == signal.SIGINT else ""
        _log.info("%s: a checkpoint is written after this step%s", signal.Signals(signum).name, more)
