"""Statistics of a comparison against numbers made by hand, scipy, and `lightm.evaluation.summarize`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import wilcoxon

from lightm.errors import InputError
from lightm.lab.compare import read_comparison
from lightm.lab.compare.experiment import Trial
from lightm.lab.compare.results import Summary, load_summary
from lightm.lab.compare.statistics import convergence_of, holm, level_of, signed_rank, summarize_comparison
from tests.lab.compare.made import make_comparison

BASE = (0.80, 0.75, 0.82, 0.70, 0.91, 0.66, 0.78, 0.85)


def summary_of(folder: Path, score: Callable[[Trial, int, str], float | str] | None = None, **options) -> Summary:
    options.setdefault("methods", {"base": 0.8, "other": 0.8})
    options.setdefault("seeds", [0])
    options.setdefault("classes", ["organ"] if score else None)
    return summarize_comparison(read_comparison(make_comparison(folder, score=score, **options)))


def shifted(by: float) -> Callable[[Trial, int, str], float]:
    return lambda trial, case, name: BASE[case] + (by if trial.network == "other" else 0.0)


@pytest.mark.parametrize("by", [0.03, -0.03])
def test_a_method_shifted_by_a_constant_is_told_apart(tmp_path: Path, by: float):
    summary = summary_of(tmp_path / "c", shifted(by))
    base, other = summary.methods
    assert base.is_baseline
    assert base.overall.dsc.difference is None
    assert base.overall.dsc.mean == pytest.approx(np.mean(BASE))
    assert base.overall.dsc.low < base.overall.dsc.mean < base.overall.dsc.high
    found = other.overall.dsc.difference
    assert [found.mean, found.low, found.high] == pytest.approx([by] * 3)
    assert found.n == 8
    assert found.p == pytest.approx(2 / 2**8)
    assert found.verdict == ("better" if by > 0 else "worse")
    # HD95 is 10 (1 - DSC) + 1: a higher DSC makes it smaller, and that is better too.
    hd95 = other.overall.hd95_mm.difference
    assert hd95.mean == pytest.approx(-10 * by)
    assert hd95.verdict == found.verdict


def test_identical_methods_do_not_differ(tmp_path: Path):
    found = summary_of(tmp_path / "c", shifted(0.0)).methods[1].overall.dsc.difference
    assert (found.mean, found.p, found.p_holm, found.verdict) == (0.0, 1.0, 1.0, "no difference shown")


def test_a_case_is_its_mean_over_seeds_and_seeds_have_a_spread(tmp_path: Path):
    summary = summary_of(tmp_path / "c", lambda trial, case, name: BASE[case] + 0.02 * trial.seed, seeds=[0, 1, 2])
    score = summary.methods[0].overall.dsc
    assert score.mean == pytest.approx(np.mean(BASE) + 0.02)
    assert score.seed_means == pytest.approx([np.mean(BASE) + shift for shift in (0, 0.02, 0.04)])
    assert score.seed_sd == pytest.approx(0.02)


def test_one_seed_has_no_spread_and_agrees_with_evaluate(tmp_path: Path):
    comparison = read_comparison(make_comparison(tmp_path / "c", seeds=[3], cases=10))
    summary = summarize_comparison(comparison, bootstrap=50)
    for method, (_, (trial,)) in zip(summary.methods, comparison.methods(), strict=True):
        evaluation = trial.evaluation()
        assert method.seeds == [3]
        assert method.overall.dsc.seed_sd is None
        for metric in ("dsc", "iou", "hd95_mm", "nsd"):
            mine, theirs = getattr(method.overall, metric), getattr(evaluation.overall, metric)
            # The same resamples, as the made-up cases are sorted, the seed is 0 and the number of draws the same.
            assert [mine.mean, mine.low, mine.high] == pytest.approx([theirs.mean, theirs.low, theirs.high])
            for found in evaluation.classes:
                score = getattr(method.classes[found.class_name], metric)
                assert score.mean == pytest.approx(getattr(found, metric).mean)
                assert score.n == getattr(found, metric).n
    assert any("One seed" in note for note in summary.notes)


def test_the_order_of_cases_changes_nothing(tmp_path: Path):
    folder = make_comparison(tmp_path / "c", cases=9)
    before = summarize_comparison(read_comparison(folder))
    for path in folder.glob("trials/*/evaluation/metrics.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        order = np.random.default_rng(len(path.parts[-3])).permutation(len(content["rows"]))
        content["rows"] = [content["rows"][i] for i in order]
        path.write_text(json.dumps(content), encoding="utf-8")
    after = summarize_comparison(read_comparison(folder))
    assert after.cases != before.cases
    assert after.methods == before.methods


def test_undefined_values_are_left_out_and_counted(tmp_path: Path):
    given = {("base", 0): "missed", ("other", 1): "missed", ("base", 2): "absent", ("other", 2): "absent"}
    given |= {("base", 3): "absent", ("other", 3): "spurious"}
    summary = summary_of(tmp_path / "c", lambda trial, case, name: given.get((trial.network, case), BASE[case]))
    base, other = summary.methods
    assert base.counts["organ"] == {"present": 5, "missed": 1, "spurious": 0, "absent": 2}
    assert base.overall.dsc.n == 6
    assert base.overall.dsc.mean == pytest.approx((0 + sum(BASE) - BASE[0] - BASE[2] - BASE[3]) / 6)
    assert base.overall.hd95_mm.n == 5
    dsc, hd95 = other.overall.dsc.difference, other.overall.hd95_mm.difference
    assert (dsc.n, dsc.left_out) == (6, 1)  # case 3; in case 2 there is nothing to find
    assert dsc.mean == pytest.approx((BASE[0] - BASE[1]) / 6)
    assert (hd95.n, hd95.left_out, hd95.mean) == (4, 3, 0.0)


def test_a_seed_without_a_value_leaves_the_other_seeds_one(tmp_path: Path):
    def score(trial: Trial, case: int, name: str) -> float | str:
        return "missed" if (case, trial.seed) == (0, 1) else BASE[case]

    method = summary_of(tmp_path / "c", score, seeds=[0, 1]).methods[0]
    assert method.overall.hd95_mm.n == 8
    assert method.overall.hd95_mm.mean == pytest.approx(np.mean([11 - 10 * dsc for dsc in BASE]))
    assert method.overall.dsc.mean == pytest.approx((sum(BASE) - BASE[0] / 2) / 8)


def test_overall_differences_compare_the_same_classes(tmp_path: Path):
    """A method that misses the hard class must not gain HD95 by it."""

    def score(trial: Trial, case: int, name: str) -> float | str:
        if name == "small":
            return "missed" if trial.network == "other" and case < 4 else 0.3
        return BASE[case]

    other = summary_of(tmp_path / "c", score, classes=["large", "small"]).methods[1]
    assert other.overall.hd95_mm.difference.mean == 0.0
    assert other.overall.hd95_mm.difference.left_out == 4


def test_too_few_cases_are_not_tested(tmp_path: Path):
    summary = summary_of(tmp_path / "c", shifted(0.05), cases=5)
    found = summary.methods[1].overall.dsc.difference
    assert (found.p, found.p_holm, found.verdict) == (None, None, "not tested")
    assert "fewer than 6" in found.note
    assert any("5 test cases" in note for note in summary.notes)


def test_a_mean_against_the_ranks_shows_nothing(tmp_path: Path):
    def score(trial: Trial, case: int, name: str) -> float:
        if trial.network == "base":
            return 0.7
        return 0.7 - 0.65 if case == 0 else 0.7 + 0.02 + case / 1000

    found = summary_of(tmp_path / "c", score, cases=20).methods[1].overall.dsc.difference
    assert found.p < 0.05
    assert found.mean < 0
    assert found.verdict == "no difference shown"


def test_holm_is_over_all_methods(tmp_path: Path):
    shift = {"a": 0.0, "b": 0.01, "c": 0.02, "d": 0.03}
    summary = summary_of(
        tmp_path / "c", lambda trial, case, name: BASE[case] + shift[trial.network], methods=dict.fromkeys(shift, 0.8)
    )
    assert [m.overall.dsc.difference.p_holm for m in summary.methods[1:]] == pytest.approx([3 * 2 / 2**8] * 3)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, None, 0.5]) == [1.0, None, 1.0]
    assert holm([]) == []


def test_signed_rank_equals_scipy_without_ties():
    random = np.random.default_rng(1)
    for n in (6, 7, 13, 40):
        values = random.normal(0.4, 1, n)
        p, sign = signed_rank(values)
        assert p == pytest.approx(wilcoxon(values, method="exact").pvalue, rel=1e-9)
        ranks = np.abs(values).argsort().argsort() + 1
        assert sign == np.sign((np.sign(values) * ranks).sum())


def test_signed_rank_equals_scipy_for_many_pairs_with_ties_and_zeros():
    values = np.random.default_rng(2).integers(-9, 11, 400) / 100
    expected = wilcoxon(values, zero_method="pratt", correction=False, method="approx").pvalue
    assert signed_rank(values)[0] == pytest.approx(expected, rel=1e-6)
    assert signed_rank(values[:190])[0] == pytest.approx(
        wilcoxon(values[:190], zero_method="pratt", correction=False, method="approx").pvalue, rel=0.05
    )


def test_signed_rank_with_ties_and_zeros_is_exact():
    values = np.array([0.0, 0.1, 0.1, -0.1, 0.2, 0.2, 0.3, 0.0, 0.4, 0.4 + 1e-15])
    ranks = np.array([4, 4, 4, 6.5, 6.5, 8, 9.5, 9.5])  # Pratt: the two zeros hold ranks 1 and 2
    seen = abs(ranks.sum() - 2 * 4)
    sums = [abs(np.dot(signs, ranks)) for signs in itertools.product((-1, 1), repeat=8)]
    assert signed_rank(values) == (pytest.approx(np.mean([s >= seen - 1e-9 for s in sums])), 1)
    assert signed_rank(-values)[1] == -1


def test_signed_rank_without_a_test():
    assert signed_rank(np.zeros(4)) == (1.0, 0)
    assert signed_rank(np.zeros(0)) == (None, 0)
    assert signed_rank(np.array([1.0, 2, 3, 4, 5, 0, 0])) == (None, 0)
    assert signed_rank(np.full(20, 1e-17))[0] == 1.0


def test_missing_and_failed_trainings_are_told(tmp_path: Path):
    summary = summary_of(tmp_path / "c", shifted(0.03), seeds=[0, 1], leave_out=[("other", 1)], fail=[("base", 1)])
    assert (summary.planned, len(summary.missing), len(summary.failed)) == (4, 1, 1)
    assert summary.missing[0].startswith("other")
    assert summary.failed[0].error == "loss is not finite in step 17"
    assert any(note.startswith("1 of 4 trainings have not run: other") for note in summary.notes)
    assert any(note.startswith("1 of 4 trainings failed: base") for note in summary.notes)
    assert [method.seeds for method in summary.methods] == [[0], [0]]
    assert summary.methods[1].overall.dsc.difference.verdict == "better"


def test_without_the_baseline_nothing_is_tested(tmp_path: Path):
    summary = summary_of(tmp_path / "c", shifted(0.03), leave_out=[("base", 0)])
    assert [method.name for method in summary.methods] == ["other"]
    assert summary.methods[0].overall.dsc.difference is None
    assert summary.convergence_level is None
    assert summary.methods[0].convergence.epochs == [None]
    assert any("The baseline, base, has no finished training" in note for note in summary.notes)


def test_nothing_finished_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"no training .* has finished \(1 failed\)"):
        summary_of(tmp_path / "c", shifted(0.0), leave_out=[("base", 0)], fail=[("other", 0)])


def test_trials_scored_differently_are_refused(tmp_path: Path):
    folder = make_comparison(tmp_path / "c", methods={"base": 0.8, "other": 0.7}, seeds=[0], cases=6)
    path = next(folder.glob("trials/other*/evaluation/metrics.json"))
    content = json.loads(path.read_text(encoding="utf-8"))
    content["nsd_tolerance_mm"]["liver"] = 3.0
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match=r"other.*nsd_tolerance_mm is .*3\.0"):
        summarize_comparison(read_comparison(folder))


def test_training_and_costs(tmp_path: Path):
    base, other = summary_of(tmp_path / "c", shifted(0.0), seeds=[0, 1]).methods
    assert base.training.seconds == [60, 61]
    assert base.training.mean_seconds == 60.5
    assert other.training.mean_seconds == 67.5
    assert (base.training.mean_epochs, base.training.mean_steps) == (12, 120)
    assert (base.cost.parameters, other.cost.parameters) == (265_811, 265_811 * 4)


def test_convergence_by_hand():
    def history(*moving: float) -> dict[str, list[float]]:
        n = len(moving)
        return {"epoch": [float(i) for i in range(n)], "pseudo_dice": list(moving), "epoch_seconds": [3.0] * n}

    nan = float("nan")
    level = level_of([history(0.1, 0.4, 0.8), history(nan, 0.6, 0.5), history(0.2, 0.7, 0.6)])
    assert level == pytest.approx(0.95 * 0.7)
    found = convergence_of([history(0.2, 0.7), history(nan, 0.6, 0.5, 0.7), history(0.1, 0.2)], level)
    assert (found.epochs, found.seconds) == ([2, 4, None], [6.0, 12.0, None])
    assert (found.median_epochs, found.median_seconds) == (4, 12.0)
    assert convergence_of([history(0.7), history(0.1), history(0.2)], level).median_epochs is None
    assert level_of([history(0.0, 0.0)]) is None
    assert convergence_of([{}], 0.5).epochs == [None]


def test_a_summary_is_read_back_and_repeats(tmp_path: Path):
    summary = summary_of(tmp_path / "c", shifted(0.03), seeds=[0, 1])
    summary.to_json(tmp_path / "results.json")
    assert load_summary(tmp_path / "results.json") == summary
    assert summarize_comparison(read_comparison(tmp_path / "c")) == summary
    other = summarize_comparison(read_comparison(tmp_path / "c"), seed=1)
    assert other.methods[0].overall.dsc.low != summary.methods[0].overall.dsc.low
    bare = summarize_comparison(read_comparison(tmp_path / "c"), bootstrap=0).methods[1].overall.dsc
    assert (bare.low, bare.difference.low) == (None, None)
    assert bare.difference.verdict == "better"
    (tmp_path / "results.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"results\.json: not a summary"):
        load_summary(tmp_path / "results.json")
    with pytest.raises(InputError, match="bootstrap is -1"):
        summarize_comparison(read_comparison(tmp_path / "c"), bootstrap=-1)
