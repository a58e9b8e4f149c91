"""What the tests of faults share: work in processes that can be killed, a small data set, a run never disturbed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightm.preparation.cache import find
from tests.training.test_train import SMALL

posix = pytest.mark.skipif(sys.platform == "win32", reason="no fork and no SIGKILL there")
OPTIONS = SMALL


class Server:
    """Starts work in processes and kills them."""

    def __init__(self, cache: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.fault_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "LIGHTM_CACHE": str(cache)},
        )

    def ask(self, **order: Any) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def status(self, **order: Any) -> int:
        """Let work run to its end; returns its exit status, 1 and 2 for the project's own errors, 99 for others."""
        return self.ask(wait=self.ask(**order))

    def finish(self, **order: Any) -> float:
        """Let work succeed; returns its seconds."""
        started = time.monotonic()
        assert self.status(**order) == 0
        return time.monotonic() - started

    def kill(self, after_s: float, **order: Any) -> bool:
        """Kill work after a while; False when it ended before."""
        pid = self.ask(**order)
        time.sleep(after_s)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        status = self.ask(wait=pid)
        assert status in (0, -signal.SIGKILL), "work that is killed has met no error before"
        return status != 0


def leftovers(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.name.startswith(".")]


def compare_cases(folder: Path, expected: dict[str, Path]) -> int:
    found = [path for path in folder.glob("*") if path.is_dir() and not path.name.startswith(".tmp-")]
    for path in found:
        case = find(path, path.name)
        assert case is not None
        for name in ("image.npy", "label.npy"):
            assert np.array_equal(np.load(path / name), np.load(expected[path.name] / name))
        assert case.foreground().keys() == {1, 2}
    return len(found)
