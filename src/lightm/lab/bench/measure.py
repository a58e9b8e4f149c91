"""Time: percentiles, and cases that alternate."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

SHORTEST = 0.02
"""Seconds below which a measurement repeats its call and takes the mean: a clock and a scheduler disturb less."""

Call = Callable[[], object]


def percentile(values: Sequence[float], percent: float) -> float:
    """The `percent`-th percentile with linear interpolation between the sorted values (NumPy's default)."""
    if not values:
        raise ValueError("percentile: no values")
    if not 0 <= percent <= 100:
        raise ValueError(f"percentile: {percent} lies outside 0..100")
    ordered = sorted(values)
    place = percent / 100 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


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
    """Time every call once a round, in turn: A, B, C, A, B, C, ...; the same number of measurements for each.

    Whatever slows the machine for a while then slows all of them, and ratios within a round stay right. Each call is
    made once before (caches, compiled kernels), which is not counted. `tick` is called after every measurement.
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
