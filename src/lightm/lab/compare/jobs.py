"""The processes of a comparison: how they are started and ended, and what one does.

A process trains one trial or measures one network; its request is one line of JSON on standard input, which the parent
keeps open. When that closes, also by the parent's death, the process ends itself; a training writes its checkpoint
first.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from lightm.errors import LightMError

_ERROR = "lightm: error: "
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
    def interrupted(self) -> bool:
        return self.process.returncode in _INTERRUPTED

    def last_words(self) -> str:
        """The child's error, else the last line of its log."""
        lines = [line for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        reported = [index for index, line in enumerate(lines) if line.startswith(_ERROR)]
        if reported:
            return "\n".join(lines[reported[-1] :]).removeprefix(_ERROR)
        if self.process.returncode and self.process.returncode < 0:
            return f"the process was ended by signal {-self.process.returncode} (out of memory?)"
        return lines[-1] if lines else f"exit code {self.process.returncode}"


def start(name: str, request: dict[str, Any], log: Path) -> Job:
    """Start a process that serves a request; what it prints goes to `log`, which is replaced."""
    log.parent.mkdir(parents=True, exist_ok=True)
    stream = log.open("w", encoding="utf-8")
    threads = str(request["threads"])
    process = subprocess.Popen(
        [sys.executable, "-c", "from lightm.lab.compare.jobs import main; main()"],
        stdin=subprocess.PIPE,
        stdout=stream,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads},
        start_new_session=True,  # Ctrl-C is for the parent, which then closes the child's input
    )
    with contextlib.suppress(OSError):  # a child that died at once is found when its end is waited for
        print(json.dumps(request), file=process.stdin, flush=True)
    return Job(name, process, log, stream, time.monotonic())


def close(job: Job) -> None:
    """Ask a child to end, wait until it has (a training writes a checkpoint) or two minutes, and close its log."""
    _close_input(job)
    try:
        job.process.wait(120)
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


def wait_for_one(jobs: list[Job]) -> Job:
    """Wait until a job has ended, take it off the list, and return it."""
    while True:
        for job in jobs:
            if job.process.poll() is not None:
                jobs.remove(job)
                close(job)
                return job
        time.sleep(0.5)


# The process itself ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Serve the request; exit code 0, that of the LightMError which ended it, or 1."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_watch_parent, daemon=True).start()
    import torch

    torch.set_num_threads(int(request["threads"]))
    try:
        {"train": train_trial, "measure": measure_network}[request["work"]](request)
    except LightMError as error:
        print(f"{_ERROR}{error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def _watch_parent() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def train_trial(request: dict[str, Any]) -> None:
    """Train (or resume) a trial's run, score its test cases, and write its `trial.json`."""
    import torch

    from lightm import __version__
    from lightm.files import write_text
    from lightm.inference.validation import choose_on_whole_cases
    from lightm.lab.compare.results import TRIAL, TrialRecord
    from lightm.pipeline import score_run
    from lightm.training import resume_training, train_model

    started, clock = datetime.now(timezone.utc), time.perf_counter()
    path = Path(request["path"])
    if (path / "config.yaml").is_file():
        trained = resume_training(path)
    else:
        if path.exists():  # of a start that was ended before it could be resumed
            shutil.rmtree(path)
        trained = train_model(request["dataset"], path, **request["options"])
    if trained.config.val_cases:
        choose_on_whole_cases(trained)
    score_run(path, nsd_tolerance_mm=request["nsd_tolerance_mm"])
    state = json.loads((path / "model" / "model.json").read_text(encoding="utf-8"))["training"]
    record = TrialRecord(
        **request["trial"],
        data_hash=trained.data_hash,
        status="finished",
        started=started.isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - clock, 1),
        threads=torch.get_num_threads(),
        train_seconds=round(trained.train_seconds, 1),
        epochs=trained.epochs,
        steps=state["steps"],
        stopped_because=trained.reason,
        versions={"lightm": __version__, "torch": torch.__version__, "python": platform.python_version()},
    )
    write_text(path / TRIAL, record.model_dump_json(indent=1) + "\n")


def measure_network(request: dict[str, Any]) -> None:
    """Print what one network costs on one patch as JSON: latency (median of 5 runs) and peak memory of one."""
    import torch

    from lightm.lab.bench.measure import seconds
    from lightm.lab.complexity import build_network
    from lightm.memory import peak_of

    torch.manual_seed(0)
    network = build_network(**request["network"], device="cpu").eval()
    x = torch.randn(1, request["network"]["in_channels"], *request["network"]["spatial"])

    def call() -> object:
        with torch.inference_mode():
            return network(x)

    call()  # compiles kernels
    peak = peak_of(call)
    times = [seconds(call) for _ in range(5)]
    print(json.dumps({"latency_s": statistics.median(times), "peak_memory_bytes": peak}))
