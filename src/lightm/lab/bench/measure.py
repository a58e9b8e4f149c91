"""Time of calls that alternate, and peak memory of one call in a process of its own."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightm.errors import LightMError

SHORTEST = 0.02
"""Seconds below which a measurement repeats its call and takes the mean: a clock and a scheduler disturb less."""

Call = Callable[[], object]


def seconds(call: Call, repeats: int = 1) -> float:
    """Mean seconds of `repeats` calls in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def best_seconds(call: Call, runs: int) -> float:
    """The fastest of `runs` measurements after one warm-up."""
    call()
    repeats = calls_needed(seconds(call))
    return min(seconds(call, repeats) for _ in range(runs))


def calls_needed(one: float) -> int:
    """Calls that make a measurement last `SHORTEST`, when one takes `one` seconds."""
    return max(1, min(1000, math.ceil(SHORTEST / max(one, 1e-7))))


def alternate(
    calls: Mapping[str, Call], rounds: int, tick: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Time every call once per round, in turn: A, B, C, A, B, C, ...

    Whatever slows the machine for a while slows all of them, and ratios within a round stay right. Each call is made
    once before (caches, compiled kernels), uncounted. `tick` is called after every measurement.
    """
    repeats = {}
    for name, call in calls.items():
        first = seconds(call)
        repeats[name] = 1 if first > 20 * SHORTEST else calls_needed(seconds(call))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, repeats[name]))
            tick()
    return times


def median_ratio(times: Sequence[float], baseline: Sequence[float]) -> float:
    """The median over rounds of this case's time to the baseline's of the same round."""
    return statistics.median(one / other for one, other in zip(times, baseline, strict=True))


# Peak memory ----------------------------------------------------------------------------------------------------------


class OutOfMemoryError(LightMError):
    """The system ended the process that was to be measured."""


def peak_in_child(request: dict[str, Any], timeout: float = 3600.0) -> int | None:
    """Peak bytes of the case that `request` describes, measured in a fresh process.

    Raises OutOfMemoryError when the system ended the process, LightMError with its last line when it failed.
    """
    done = subprocess.run(
        [sys.executable, "-c", "from lightm.lab.bench.cases import child; child()"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    name = request["case"]["name"]
    if done.returncode < 0 or done.returncode == 137:
        raise OutOfMemoryError(
            f"{name}: the process was ended by the system (exit code {done.returncode}), probably out of memory"
        )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise LightMError(f"{name}: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])["peak"]
