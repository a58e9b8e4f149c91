"""How soon a training gets somewhere: when its pseudo Dice reaches a level common to all methods."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from lightm.evaluation.figures import History
from lightm.lab.compare.summary import Convergence

PART_OF_BEST = 0.95


def level_of(baseline: Sequence[History]) -> float | None:
    """95% of the best pseudo Dice, median over the baseline's seeds; None where there is none above 0."""
    best = [max(values) for history in baseline if (values := [v for v in _watched(history) if math.isfinite(v)])]
    level = PART_OF_BEST * statistics.median(best) if best else 0.0
    return level if level > 0 else None


def convergence_of(histories: Sequence[History], level: float | None) -> Convergence:
    """When each history first reached the level, and the medians in which "not reached" is later than all.

    The pseudo Dice is measured on patches of the validation cases, once an epoch: a time is known to the epoch. It is
    taken as it is, not as its moving average, which starts at 0 and says little in trainings of few epochs.
    Seconds are those of the epochs in history.csv, validation included; of an epoch that a resumed training continued
    midway only the rest was timed.
    """
    reached = [_reached(history, level) for history in histories]
    epochs, seconds = [epoch for epoch, _ in reached], [second for _, second in reached]
    return Convergence(
        epochs=epochs, seconds=seconds, median_epochs=_late_median(epochs), median_seconds=_late_median(seconds)
    )


def _reached(history: History, level: float | None) -> tuple[int | None, float | None]:
    if level is None:
        return None, None
    row = next((i for i, value in enumerate(_watched(history)) if value >= level), None)
    if row is None:
        return None, None
    seconds = sum(history.get("epoch_seconds", [math.nan])[: row + 1])
    return int(history["epoch"][row]) + 1, seconds if math.isfinite(seconds) else None


def _watched(history: History) -> list[float]:
    return history.get("pseudo_dice", [])


def _late_median(values: Sequence[float | None]) -> float | None:
    median = statistics.median(math.inf if value is None else value for value in values)
    return median if math.isfinite(median) else None
