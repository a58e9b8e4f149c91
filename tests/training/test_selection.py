"""Which epoch is kept, over the values of 3, 30 and 1000 epochs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lightm.training.selection import best_epoch, smoothed, width


def kept_after(values: list[float]) -> list[int | None]:
    """The kept epoch after each epoch."""
    kept: int | None = None
    found = []
    for count in range(1, len(values) + 1):
        kept = best_epoch(values[:count], kept)
        found.append(kept)
    return found


def test_a_run_of_three_epochs_takes_the_best_of_them() -> None:
    assert kept_after([0.77, 0.63, 0.80]) == [0, 0, 2]
    assert kept_after([0.80, 0.63, 0.77]) == [0, 0, 0]
    assert kept_after([0.5, 0.5, 0.5]) == [0, 0, 0], "of equals the first"


def test_a_run_that_starts_at_0_keeps_its_best_epoch_and_not_the_last() -> None:
    values = [0.0, 0.0, 0.0, 0.1, 0.5, 0.7, 0.6, 0.55]
    assert kept_after(values)[-1] == 5
    assert kept_after([0.0] * 12 + values)[-1] == 17  # two are averaged
    assert kept_after([0.0, 0.0])[-1] == 0


def test_thirty_epochs_that_overfit_keep_the_middle() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth = [0.9 - 0.002 * (epoch - 15) ** 2 for epoch in range(30)]
        kept = kept_after([value + rng.normal(0, 0.02) for value in truth])[-1]
        assert kept is not None
        assert truth[kept] > 0.82


def test_a_thousand_epochs_are_not_led_by_a_lucky_one() -> None:
    rng = np.random.default_rng(1)
    truth = [0.85 * (1 - math.exp(-epoch / 100)) + 0.03 * epoch / 1000 for epoch in range(1000)]
    values = [value + rng.normal(0, 0.02) for value in truth]
    values[300] += 0.2  # alone
    kept = kept_after(values)[-1]
    assert kept is not None
    assert not 300 <= kept < 310
    assert truth[kept] > max(truth) - 0.02
    falling = [value - (0.3 if epoch >= 700 else 0) for epoch, value in enumerate(values)]
    kept = kept_after(falling)[-1]
    assert kept is not None
    assert 500 < kept < 700


def test_the_width_is_a_tenth_of_the_epochs_from_one_to_ten() -> None:
    assert [width(count) for count in (1, 3, 19, 20, 30, 99, 100, 1000)] == [1, 1, 1, 2, 3, 9, 10, 10]
    assert smoothed([float(epoch) for epoch in range(30)], 29) == 28
    assert smoothed([float(epoch) for epoch in range(30)], 1) == 0.5, "near the start fewer"


def test_epochs_without_a_value_take_no_part() -> None:
    nan = math.nan
    assert kept_after([nan, nan]) == [None, None]
    assert kept_after([nan, 0.1, nan, 0.3]) == [None, 1, 1, 3]
    assert math.isnan(smoothed([nan], 0))
    assert math.isnan(smoothed([], None))
    assert smoothed([0.5] * 28 + [nan, 0.8], 29) == pytest.approx(0.65)
    assert kept_after([0.5] * 20 + [0.9, nan])[-1] == 20, "no epoch lives on its neighbours"
