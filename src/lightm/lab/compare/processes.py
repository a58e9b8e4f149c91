"""The processes of a comparison's cells: started in order, some at a time, and ended with their parent."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_INTERRUPTED = (-15, -2, 130, 143)  # signals, as a return code of POSIX and as lightm's own exit codes


@dataclass
class Job:
    """One child at work: its request, its log, and since when."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    stream: IO[str]
    since: float

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def interrupted(self) -> bool:
        return self.process.returncode in _INTERRUPTED

    def last_words(self) -> str:
        """The error that the child told, else the last line of its log."""
        lines = [line for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        told = [index for index, line in enumerate(lines) if line.startswith("lightm: error: ")]
        if told:
            return "\n".join(lines[told[-1] :]).removeprefix("lightm: error: ")
        if self.process.returncode and self.process.returncode < 0:
            return f"the process was ended by signal {-self.process.returncode} (out of memory?)"
        return lines[-1] if lines else f"exit code {self.process.returncode}"


def start(name: str, request: dict[str, Any], log: Path) -> Job:
    """Start `lightm.lab.compare.child` on a request; what it prints goes to `log`, which is replaced."""
    log.parent.mkdir(parents=True, exist_ok=True)
    stream = log.open("w", encoding="utf-8")
    threads = str(request["threads"])
    process = subprocess.Popen(
        [sys.executable, "-m", "lightm.lab.compare.child"],
        stdin=subprocess.PIPE,
        stdout=stream,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads},
        start_new_session=True,  # Ctrl-C is for the parent, which then closes the child's input
    )
    if process.stdin is not None:  # it was opened above
        with contextlib.suppress(OSError):  # a child that died at once is found when its end is waited for
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
    return Job(name, process, log, stream, time.monotonic())


def close(job: Job, patience_s: float = 120.0) -> None:
    """Ask a child to end, wait until it has (a training writes a checkpoint), and close its log."""
    _close_input(job)
    try:
        job.process.wait(patience_s)
    except subprocess.TimeoutExpired:
        job.process.kill()
        job.process.wait()
    job.stream.close()


def _close_input(job: Job) -> None:
    if job.process.stdin is not None:
        with contextlib.suppress(OSError):  # it has ended already, with something unsent
            job.process.stdin.close()


@contextmanager
def pool() -> Iterator[list[Job]]:
    """A list of jobs, all of which are ended when the block is left."""
    jobs: list[Job] = []
    try:
        yield jobs
    finally:
        for job in jobs:  # ask all before waiting for one
            _close_input(job)
        for job in jobs:
            close(job)


def wait_for_one(jobs: list[Job], tick: Callable[[], None] = lambda: None, every_s: float = 0.5) -> Job:
    """Wait until a job has ended, take it off the list, and return it."""
    while True:
        for job in jobs:
            if job.ended:
                jobs.remove(job)
                close(job)
                return job
        tick()
        time.sleep(every_s)
