"""Which post-processing steps are taken: those that are safe and help beyond chance, and why the others are not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from lightm.inference.postprocess import DropSmall, FillHoles, KeepLargest, Postprocess, apply_rules
from lightm.inference.postprocess_choice import (
    FEWEST_CASES,
    FEWEST_LABELS,
    CaseLabels,
    LabelFacts,
    Labels,
    TimeIsUp,
    choose_rules,
    label_facts,
)

Pair = tuple[np.ndarray, np.ndarray]


def disc(parts: int = 1, hole: bool = False, value: int = 1) -> np.ndarray:
    """A label of 16 x 40 pixels with so many parts of 8 x 8 pixels."""
    label = np.zeros((16, 40), np.uint8)
    for part in range(parts):
        label[4:12, 1 + 12 * part : 9 + 12 * part] = value
    if hole:
        label[7:9, 4:6] = 0
    return label


def with_speck(label: np.ndarray, value: int = 1, size: int = 3) -> np.ndarray:
    """The label with a square where it holds nothing."""
    spoilt = label.copy()
    spoilt[:size, -size:] = value
    return spoilt


def chosen(
    pairs: Sequence[Pair],
    values: tuple[int, ...] = (1,),
    train: Sequence[np.ndarray] | None = None,
    ignore_label: int | None = None,
) -> Postprocess:
    """Choose on pairs of prediction and label; of training as many labels as needed, like the first, unless given."""
    spacing = (1.0,) * pairs[0][1].ndim
    train = [pairs[0][1]] * FEWEST_LABELS if train is None else train

    def labels() -> Labels:
        return [(label, spacing) for label in (*train, *(truth for _, truth in pairs))]

    cases = [CaseLabels(*pair, spacing) for pair in pairs]
    return choose_rules(cases, values, labels, ignore_label=ignore_label)


def bare(record: Postprocess) -> list[object]:
    return [step.model_copy(update={"gain": {}}) for step in record.steps]


def why(record: Postprocess, step: object) -> str:
    """Why a step was not taken."""
    (trial,) = [trial for trial in record.tried if trial.step == step]
    assert not trial.taken
    return trial.why


def test_a_step_is_taken_where_labels_have_one_part_and_enough_predictions_have_specks() -> None:
    truth = disc()
    record = chosen([(with_speck(truth), truth)] * 12 + [(truth, truth)] * 3)
    assert bare(record) == [KeepLargest(values=(1,))]
    dice = 2 * 64 / (64 + 73)
    assert record.cases == 15
    assert record.dsc_before == {1: pytest.approx((12 * dice + 3) / 15, abs=1e-6)}
    assert record.dsc_after == {1: 1.0}
    assert record.steps[0].gain == {1: pytest.approx(12 * (1 - dice) / 15, abs=1e-6)}
    (trial,) = [trial for trial in record.tried if trial.taken]
    assert (trial.better, trial.worse, trial.p) == (12, 0, pytest.approx(2**-12))
    assert "better in 12" in trial.why
    cleaned = apply_rules(with_speck(truth), record.steps, (1.0, 1.0))
    assert np.array_equal(cleaned, truth)


def test_no_step_is_the_answer_of_good_predictions() -> None:
    record = chosen([(disc(), disc())] * 12)
    assert record.steps == ()
    assert {trial.why for trial in record.tried} == {"changes nothing"}
    assert record.dsc_before == record.dsc_after == {1: 1.0}


def test_a_step_that_removes_a_true_part_of_one_training_label_is_not_taken() -> None:
    """One lesion in every validation case, three in one of many training cases: field report 40."""
    truth = disc()
    record = chosen([(with_speck(truth), truth)] * 15, train=[disc()] * 60 + [disc(3)])
    assert why(record, KeepLargest(values=(1,))) == "1 of 76 labels have several components"
    assert bare(record) == [DropSmall(value=1, below=32, unit="mm2")], "a speck of 9 is below half of the smallest"


def test_components_are_dropped_below_half_of_the_smallest_true_one_only() -> None:
    truth = disc(2)
    small = disc(2)
    small[1:3, 38:40] = 1  # 4 pixels
    speck = [(with_speck(truth, size=5), truth)] * 15
    record = chosen(speck, train=[truth] * 40 + [small])
    assert record.steps == ()
    first, second = (trial for trial in record.tried if isinstance(trial.step, DropSmall))
    assert first.step.below == 32
    assert first.why == "the smallest true component has 4 mm2, so that 2 mm2 is the limit"
    assert (second.step.below, second.why) == (2, "changes nothing")
    tiny = [(with_speck(truth, size=1), truth)] * 15
    assert chosen(tiny, train=[truth] * 40).steps == (), "0.004 is not worth a step"
    assert "less than 0.005" in why(chosen(tiny), DropSmall(value=1, below=32, unit="mm2"))


def test_hollow_organs_stay_hollow() -> None:
    holed = [(disc(hole=True), disc())] * 15
    assert bare(chosen(holed)) == [FillHoles(value=1)]
    record = chosen(holed, train=[disc()] * 40 + [disc(hole=True)])
    assert why(record, FillHoles(value=1)) == "1 of 56 labels have true holes"


def test_a_class_that_few_labels_hold_is_left_alone() -> None:
    """A lesion in one case only, and spurious ones in all the others."""
    organ = disc()
    lesion = organ.copy()
    lesion[:4, 28:32] = 2
    pairs = [(with_speck(organ, value=2), organ)] * 14 + [(lesion, lesion)]
    record = chosen(pairs, values=(1, 2), train=[organ] * 60)
    assert all(2 not in (getattr(step, "values", None) or (step.value,)) for step in record.steps)
    told = [trial.why for trial in record.tried if trial.step == KeepLargest(values=(2,))]
    assert told == ["changes nothing"]
    many = chosen([(with_speck(lesion, value=2), lesion)] * 15, values=(1, 2), train=[organ] * 60)
    assert many.steps == ()
    assert why(many, KeepLargest(values=(2,))) == "15 labels of training and validation with the class, fewer than 30"


def test_each_of_two_classes_is_judged_by_itself() -> None:
    both = disc(2)
    both[:, 12:][both[:, 12:] == 1] = 2  # two organs apart
    record = chosen([(with_speck(both, value=2), both)] * 15, values=(1, 2))
    assert bare(record) == [KeepLargest(values=(2,))]
    assert why(record, KeepLargest(values=(1, 2))).startswith("removes a true component that was found, in 15")
    assert record.steps[0].gain[1] == 0


def test_few_cases_choose_nothing_and_say_so() -> None:
    pairs = [(with_speck(disc()), disc())] * (FEWEST_CASES - 1)
    record = chosen(pairs)
    assert record.steps == record.tried == ()
    assert record.why == "9 validation cases predicted, fewer than 10"
    assert record.dsc_before == record.dsc_after
    assert choose_rules([], (1, 2), list).why == "0 validation cases predicted, fewer than 10"


def test_a_gain_in_few_cases_may_be_chance_and_one_case_may_not_pay_for_the_others() -> None:
    truth = disc()
    record = chosen([(with_speck(truth), truth)] * 4 + [(truth, truth)] * 12)
    assert record.steps == ()
    assert "may be chance: better in 4, worse in 0 cases, p = 0.062" in why(record, KeepLargest(values=(1,)))
    cut = truth.copy()
    cut[:, 5] = 0  # the organ in two pieces
    paid = chosen([(with_speck(truth), truth)] * 14 + [(cut, truth)])
    assert why(paid, KeepLargest(values=(1,))).startswith("costs a case 0.")


def test_a_true_part_that_was_found_is_not_lost_for_any_gain() -> None:
    truth = disc(2)
    truth[1:3, 30:32] = 1
    found = truth.copy()
    found[1:3, 30:32] = 0
    found[1, 30] = 1  # one pixel of the small part
    pairs = [(with_speck(disc(2), size=6), disc(2))] * 14 + [(found, truth)]
    record = chosen(pairs, train=[disc(2)] * 40)
    assert why(record, DropSmall(value=1, below=2, unit="mm2")) == "removes a true component that was found, in 1 case"
    assert record.steps == ()


def test_all_classes_together_need_labels_of_each() -> None:
    """One case with a lesion, at the organ: what would become of a lesion that lies apart is not known."""
    organ, ill = disc(), disc()
    ill[4:6, 4:6] = 2
    pairs = [(with_speck(organ), organ)] * 14 + [(ill, ill)]
    record = chosen(pairs, values=(1, 2), train=[organ] * 60)
    assert why(record, KeepLargest(values=(1, 2))).startswith("1 label of training and validation with")
    assert bare(record) == [KeepLargest(values=(1,))]
    pairs = [(with_speck(ill), ill)] * 15
    assert bare(chosen(pairs, values=(1, 2))) == [KeepLargest(values=(1, 2))]


def test_ignored_pixels_do_not_count() -> None:
    truth = disc()
    ignored = truth.copy()
    ignored[:3, -3:] = 9
    assert chosen([(with_speck(truth), ignored)] * 15, ignore_label=9).steps == ()
    assert bare(chosen([(with_speck(truth), truth)] * 15, ignore_label=9)) == [KeepLargest(values=(1,))]


def test_labels_are_read_once_and_only_where_a_step_would_help() -> None:
    reads = []

    def labels() -> Labels:
        reads.append(1)
        return [(disc(), (1.0, 1.0))] * FEWEST_LABELS

    def choose(predicted: np.ndarray) -> Postprocess:
        return choose_rules([CaseLabels(predicted, disc(), (1.0, 1.0)) for _ in range(12)], (1,), labels)

    choose(disc())
    assert reads == []
    spoilt = with_speck(disc(hole=True))
    assert {type(step) for step in choose(spoilt).steps} == {KeepLargest, FillHoles}
    assert reads == [1]


@pytest.mark.parametrize("calls", [3, 14, 40])
def test_the_end_of_the_time_ends_the_choice_with_what_was_found(calls: int) -> None:
    left = iter(range(calls))

    def check_time() -> None:
        if next(left, None) is None:
            raise TimeIsUp

    cases = [CaseLabels(with_speck(disc(hole=True)), disc(), (1.0, 1.0)) for _ in range(12)]
    record = choose_rules(cases, (1,), lambda: [(disc(), (1.0, 1.0))] * 40, check_time=check_time)
    assert record.steps == ()
    assert record.why == "the time budget is used, so that not every step was tried"


def test_the_facts_of_labels() -> None:
    holed = disc(2, hole=True)
    holed[0, 0] = 2
    facts = label_facts([(holed, (2.0, 0.5)), (disc(value=2), (1.0, 1.0))], (1, 2), lambda: None)
    assert facts == {
        (1,): LabelFacts(cases=1, several=1, holes=1, smallest=60),
        (2,): LabelFacts(cases=2, several=0, holes=0, smallest=1),
        (1, 2): LabelFacts(cases=2, several=1, holes=0, smallest=1),
    }


def test_cases_are_cropped_and_in_3d_sizes_are_in_ml() -> None:
    truth = np.zeros((8, 24, 24), np.uint8)
    truth[2:6, 2:12, 2:12], truth[2:6, 14:18, 14:18] = 1, 1
    predicted = truth.copy()
    predicted[6, 20:23, 1:20] = 1
    record = chosen([(predicted, truth)] * 12)
    assert bare(record) == []
    small = truth.copy()
    small[6, 20:23, 1:5] = 1
    record = chosen([(small, truth)] * 12)
    assert bare(record) == [DropSmall(value=1, below=0.032, unit="ml")]
    case = CaseLabels(np.zeros((3, 3, 3), np.uint8), truth[:3, :3, :3] * 0, (1.0, 1.0, 1.0))
    assert case.predicted.size == 1
    kept = CaseLabels(np.pad(truth, 3), np.pad(truth, 3), (1.0, 1.0, 1.0))
    assert kept.predicted.shape == (4, 16, 16)
    again = chosen([(small, truth)] * 12)
    assert again == record
