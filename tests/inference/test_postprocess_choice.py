"""Which post-processing steps are chosen: those that help, in their order, with their gain."""

from __future__ import annotations

import numpy as np
import pytest

from lightm.inference.postprocess import DropSmall, FillHoles, KeepLargest, Postprocess, apply_rules
from lightm.inference.postprocess_choice import CaseLabels, choose_rules

TRUTH = np.array([[1, 1, 2, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]], np.uint8)


def chosen(*pairs: tuple[np.ndarray, np.ndarray], values: tuple[int, ...] = (1, 2), **more: int) -> Postprocess:
    spacing = (1.0,) * pairs[0][0].ndim
    return choose_rules([CaseLabels(*pair, spacing) for pair in pairs], values, **more)


def bare(record: Postprocess) -> list[object]:
    return [step.model_copy(update={"gain": {}}) for step in record.steps]


def test_a_step_is_taken_where_it_helps_and_only_there() -> None:
    stray = TRUTH.copy()
    stray[2, 5] = 1
    record = chosen((stray, TRUTH), (TRUTH, TRUTH))
    assert bare(record) == [KeepLargest(values=(1, 2))]
    assert record.cases == 2
    assert record.dsc_before == {1: pytest.approx((10 / 11 + 1) / 2, abs=1e-6), 2: 1.0}
    assert record.dsc_after == {1: 1.0, 2: 1.0}
    assert record.steps[0].gain == {1: pytest.approx(1 / 22, abs=1e-6), 2: 0.0}
    assert chosen((TRUTH, TRUTH)).steps == ()
    assert choose_rules([], (1, 2)) == Postprocess()


def test_a_class_of_two_parts_is_left_alone() -> None:
    lungs = np.array([[1, 1, 0, 1, 1]])
    assert chosen((lungs, lungs), values=(1,)).steps == ()
    # together the step would remove the far 2; by itself class 1 may still lose its stray voxel
    truth, predicted = np.array([[1, 1, 1, 0, 2, 0, 0]]), np.array([[1, 1, 1, 0, 2, 0, 1]])
    assert bare(chosen((predicted, truth))) == [KeepLargest(values=(1,))]


def test_parts_of_a_class_stay_while_specks_go() -> None:
    truth = np.zeros((1, 40), np.uint8)
    truth[0, :10], truth[0, 12:20] = 1, 1
    predicted = truth.copy()
    predicted[0, 30:32], predicted[0, 35] = 1, 1
    record = chosen((predicted, truth), values=(1,))
    assert bare(record) == [DropSmall(value=1, below=8.0, unit="mm2")]
    assert np.array_equal(apply_rules(predicted, record.steps, (1.0, 1.0)), truth)
    assert record.dsc_after == {1: 1.0}


def test_holes_are_filled_where_the_label_has_none() -> None:
    truth = np.zeros((7, 7, 7), np.uint8)
    truth[1:6, 1:6, 1:6] = 1
    truth[3, 3, 3] = 2
    holed = truth.copy()
    holed[2, 2, 2] = 0
    assert bare(chosen((holed, truth))) == [FillHoles(value=1)]
    assert chosen((holed, holed)).steps == ()


def test_no_class_may_lose() -> None:
    truth = np.array([[1, 1, 1, 0, 0, 0, 0, 2, 2]])
    predicted = np.array([[1, 1, 1, 0, 1, 1, 0, 2, 2]])
    record = chosen((predicted, truth))
    assert KeepLargest(values=(1, 2)) not in bare(record), "it would raise class 1 and remove class 2"
    assert bare(record) == [KeepLargest(values=(1,))]


def test_removing_what_is_spurious_counts_as_a_gain_and_ignored_voxels_do_not_count() -> None:
    truth, predicted = np.array([[1, 1, 0, 0, 9]]), np.array([[1, 1, 0, 2, 0]])
    assert bare(chosen((predicted, truth))) == [KeepLargest(values=(1, 2))]
    ignored = np.array([[1, 1, 0, 0, 1]])
    assert chosen((ignored, truth), values=(1,), ignore_label=9).steps == ()
    assert bare(chosen((ignored, truth), values=(1,))) == [KeepLargest(values=(1,))]


def test_cases_are_cropped_and_the_choice_is_the_same_every_time() -> None:
    rng = np.random.default_rng(4)
    pairs = []
    for _ in range(3):
        truth = np.zeros((20, 24, 24), np.uint8)
        truth[5:12, 6:16, 6:16], truth[8:10, 8:12, 8:12] = 1, 2
        predicted = truth.copy()
        noise = rng.random(truth.shape) < 0.01
        predicted[noise] = rng.integers(0, 3, int(noise.sum()))
        pairs.append((predicted, truth))
    first, second = chosen(*pairs), chosen(*pairs)
    assert first == second
    assert {type(step) for step in first.steps} >= {KeepLargest, FillHoles}
    for value in (1, 2):
        gains = sum(step.gain[value] for step in first.steps)
        assert first.dsc_after[value] - first.dsc_before[value] == pytest.approx(gains, abs=1e-5)
    # the record's scores are those of the whole, uncropped maps
    dice = [
        2 * ((cleaned == 1) & (truth == 1)).sum() / ((cleaned == 1).sum() + (truth == 1).sum())
        for predicted, truth in pairs
        for cleaned in [apply_rules(predicted, first.steps, (1.0, 1.0, 1.0))]
    ]
    assert first.dsc_after[1] == pytest.approx(np.mean(dice), abs=1e-6)
    case = CaseLabels(np.zeros((3, 3, 3), np.uint8), pairs[0][1][:3, :3, :3] * 0, (1.0, 1.0, 1.0))
    assert case.predicted.size == 1
    kept = CaseLabels(np.pad(TRUTH, 3), np.pad(TRUTH, 3), (1.0, 1.0))
    assert kept.predicted.tolist() == TRUTH[:2, :3].tolist()
