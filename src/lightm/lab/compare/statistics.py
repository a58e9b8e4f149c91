"""From scored trials to means, intervals, tests, convergence, and the sentences a reader needs beside them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, rankdata

from lightm.errors import InputError
from lightm.evaluation import evaluation
from lightm.evaluation.evaluation import METRICS, Evaluation
from lightm.evaluation.figures import History
from lightm.evaluation.metrics import STATUSES
from lightm.lab.compare import results
from lightm.lab.compare.results import Comparison, Difference, FinishedTrial, Score

Floats = NDArray[np.float64]

_SMALLER_IS_BETTER = ("hd95_mm",)


def summarize_comparison(comparison: Comparison, *, bootstrap: int = 2000, seed: int = 0) -> results.Summary:
    """Return means, intervals and tests of every method with a finished trial, per class and over classes.

    A case's value is its mean over the method's seeds; the mean over cases has a percentile bootstrap interval
    (95%, `bootstrap` resamples of the cases from `seed`, the same for all methods; 0 leaves them out). Overall values
    are means over classes of class means, as in `lightm evaluate`. Differences to the baseline are paired by case, with
    intervals from the same resamples, and tested by `signed_rank` over cases (overall: over each case's mean difference
    over its classes). p is corrected by `holm` for the methods tested within one metric and class; metrics and classes
    are not corrected for each other, so name the one that counts before looking. "better" or "worse" needs a corrected
    p <= 0.05, and that mean and rank sum point the same way.

    Undefined values (HD95 of a missed or spurious class, everything of an absent one) are no zeros: a case's mean is
    over the seeds that have the value, a case without any is left out, and so is a pair where either method lacks it;
    `left_out` and `counts` say how often. A method that misses more is thus spared its worst HD95: read HD95 with the
    counts. A class found where there is none has DSC 0, one rightly left empty no DSC.

    Intervals and tests are over cases and hold for the networks as trained; only `seed_sd` speaks of other seeds.
    Raises InputError where no trial has finished, or trials were scored with different classes, tolerances or units.
    Cost: reads one metrics.json and one history.csv per trial; methods x bootstrap x cases x classes multiply-adds.
    """
    if bootstrap < 0:
        raise InputError(f"bootstrap is {bootstrap}: expected a number of resamples, or 0 for no intervals")
    scored = [_Scored(name, trials, [t.evaluation() for t in trials]) for name, trials in comparison.methods()]
    if not scored:
        failed = f" ({len(comparison.failed)} failed)" if comparison.failed else ""
        raise InputError(
            f"{comparison.folder}: no training of the comparison has finished{failed}; run `lightm compare`"
        )
    first = _same_scoring(scored)
    # Sorted, so that the resamples do not depend on the order in which cases were scored.
    cases = sorted({case for method in scored for found in method.evaluations for case in found.cases})
    labels = list(first.labels)
    weights = evaluation.bootstrap_weights(len(cases), bootstrap, seed)
    baseline = next((i for i, method in enumerate(scored) if method.name == comparison.baseline), None)
    scores = {metric: _metric_scores(scored, metric, cases, labels, weights, baseline) for metric in METRICS}
    level = None if baseline is None else level_of([trial.history() for trial in scored[baseline].trials])
    planned = comparison.experiment.trials()
    records = {trial.record.id: trial.record for trial in comparison.finished} | {r.id: r for r in comparison.failed}
    methods = []
    for i, method in enumerate(scored):
        network, loss, recipe = method.trials[0].trial.method
        by_column = [
            results.Scores(**{metric: scores[metric][i][column] for metric in METRICS}) for column in [None, *labels]
        ]
        methods.append(
            results.MethodSummary(
                name=method.name,
                network=network,
                loss=loss,
                recipe=recipe,
                is_baseline=i == baseline,
                seeds=[trial.trial.seed for trial in method.trials],
                cases=len({case for found in method.evaluations for case in found.cases}),
                counts=method.counts(labels),
                overall=by_column[0],
                classes=dict(zip(labels, by_column[1:], strict=True)),
                training=_training(method.trials),
                convergence=convergence_of([trial.history() for trial in method.trials], level),
                cost=comparison.networks.get(network),
            )
        )
    missing = [trial.id for trial in planned if trial.id not in records]
    failed_trials = [results.FailedTrial(id=record.id, error=record.error) for record in comparison.failed]
    return results.Summary(
        name=comparison.experiment.name,
        baseline=comparison.baseline,
        spatial_dims=first.spatial_dims,
        distance_unit=first.distance_unit,
        labels=first.labels,
        nsd_tolerance_mm=first.nsd_tolerance_mm,
        seeds=comparison.experiment.seeds,
        test_cases=cases,
        bootstrap=bootstrap,
        bootstrap_seed=seed,
        alpha=ALPHA,
        planned=len(planned),
        missing=missing,
        failed=failed_trials,
        notes=notes_on(comparison, missing, {c.record.id: e.cases for m in scored for c, e in m.pairs()}),
        convergence_level=level,
        methods=methods,
        trials=[records[trial.id] for trial in planned if trial.id in records],
        cases=[
            results.CaseResult(method=method.name, seed=trial.trial.seed, **row.model_dump())
            for method in scored
            for trial, found in method.pairs()
            for row in found.rows
        ],
    )


@dataclass(frozen=True)
class _Scored:
    """A method with its trials and their evaluations, one per seed."""

    name: str
    trials: list[FinishedTrial]
    evaluations: list[Evaluation]

    def pairs(self) -> list[tuple[FinishedTrial, Evaluation]]:
        return list(zip(self.trials, self.evaluations, strict=True))

    def table(self, metric: str, cases: Sequence[str], labels: Sequence[str]) -> Floats:
        """(seeds, cases, classes), NaN where undefined or not scored."""
        table = np.full((len(self.trials), len(cases), len(labels)), np.nan)
        row_of, column_of = ({name: i for i, name in enumerate(names)} for names in (cases, labels))
        for s, found in enumerate(self.evaluations):
            for row in found.rows:
                table[s, row_of[row.case], column_of[row.class_name]] = evaluation.as_number(getattr(row, metric))
        return table

    def seen(self, cases: Sequence[str], labels: Sequence[str]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """(cases, classes) twice: whether a seed scored it, and whether it was then anything but absent."""
        rows = [row for found in self.evaluations for row in found.rows]
        scored = {(row.case, row.class_name) for row in rows}
        there = {(row.case, row.class_name) for row in rows if row.status != "absent"}
        at = [[(case, name) for name in labels] for case in cases]
        return np.array([[x in scored for x in line] for line in at]), np.array([[x in there for x in y] for y in at])

    def counts(self, labels: Sequence[str]) -> dict[str, dict[str, int]]:
        rows = [(row.class_name, row.status) for found in self.evaluations for row in found.rows]
        return {name: {status: rows.count((name, status)) for status in STATUSES} for name in labels}


def _metric_scores(
    scored: Sequence[_Scored],
    metric: str,
    cases: Sequence[str],
    labels: Sequence[str],
    weights: Floats,
    baseline: int | None,
) -> list[dict[str | None, Score]]:
    """results.Scores of one metric: for every method by class, None for the mean over classes."""
    tables = [method.table(metric, cases, labels) for method in scored]
    values = [finite_mean(table, 0) for table in tables]
    seen = [method.seen(cases, labels) for method in scored]
    by_class: list[dict[str | None, Score]] = [{} for _ in scored]
    for name, columns in [(None, slice(None)), *((name, slice(k, k + 1)) for k, name in enumerate(labels))]:
        differences: dict[int, tuple[Difference, int]] = {}
        for i in range(len(scored)):
            if baseline is None or i == baseline:
                continue
            both, there = seen[i][0] & seen[baseline][0], seen[i][1] | seen[baseline][1]
            paired = values[i] - values[baseline]
            left_out = int((both & there & ~np.isfinite(paired))[:, columns].sum())
            differences[i] = _difference(paired[:, columns], left_out, weights)
        corrected = holm([found.p for found, _ in differences.values()])
        for (found, sign), p in zip(differences.values(), corrected, strict=True):
            found.p_holm = p
            found.verdict = _verdict(found, sign, metric)
        for i, table in enumerate(tables):
            n, centre = _centre(values[i][:, columns], weights)
            means = finite_mean(finite_mean(table[:, :, columns], 1), 1)
            known = means[np.isfinite(means)]
            by_class[i][name] = Score(
                n=n,
                mean=centre.mean,
                low=centre.low,
                high=centre.high,
                seed_means=[float(mean) if np.isfinite(mean) else None for mean in means],
                seed_sd=float(known.std(ddof=1)) if known.size > 1 else None,
                difference=differences[i][0] if i in differences else None,
            )
    return by_class


def _centre(values: Floats, weights: Floats) -> tuple[int, evaluation.Statistic]:
    """Cases with a value, and mean and interval of the mean over classes; values (cases, classes)."""
    n = int(np.isfinite(values).any(axis=1).sum())
    draws = evaluation.resampled_means(values, weights)
    return n, evaluation.statistic_of(finite_mean(values, 0), evaluation.row_means(draws), several=n > 1)


def _difference(paired: Floats, left_out: int, weights: Floats) -> tuple[Difference, int]:
    """The difference with its uncorrected p, and the sign of its rank sum; paired (cases, classes)."""
    n, centre = _centre(paired, weights)
    by_case = evaluation.row_means(paired)
    p, sign = signed_rank(by_case[np.isfinite(by_case)])
    note = None
    if not n:
        note = "no case has a value by both methods"
    elif p is None:
        note = f"fewer than {FEWEST_PAIRS} cases differ, so that no test could show a difference"
    fields = {"n": n, "left_out": left_out, "mean": centre.mean, "low": centre.low, "high": centre.high}
    return Difference(**fields, p=p, p_holm=None, verdict="not tested", note=note), sign


def _verdict(found: Difference, sign: int, metric: str) -> results.Verdict:
    if found.p_holm is None or found.mean is None:
        return "not tested"
    # with a few large differences against many small ones mean and ranks may disagree: no verdict then
    if found.p_holm > ALPHA or found.mean * sign <= 0:
        return "no difference shown"
    return "better" if (found.mean < 0) == (metric in _SMALLER_IS_BETTER) else "worse"


def _training(trials: Sequence[FinishedTrial]) -> results.Training:
    records = [trial.record for trial in trials]
    epochs, steps = [record.epochs for record in records], [record.steps for record in records]
    seconds = [record.train_seconds for record in records]
    means = []
    for values in (epochs, steps, seconds):
        known = [value for value in values if value is not None]
        means.append(sum(known) / len(known) if known else None)
    return results.Training(
        epochs=epochs,
        steps=steps,
        seconds=seconds,
        threads=[record.threads for record in records],
        mean_epochs=means[0],
        mean_steps=means[1],
        mean_seconds=means[2],
    )


def _same_scoring(scored: Sequence[_Scored]) -> Evaluation:
    """The first evaluation; InputError where another one was measured differently."""
    first = scored[0].evaluations[0]
    for method in scored:
        for trial, found in method.pairs():
            for key in ("labels", "distance_unit", "nsd_tolerance_mm", "spatial_dims"):
                got, expected = getattr(found, key), getattr(first, key)
                if got != expected:
                    raise InputError(
                        f"{trial.path / 'evaluation' / 'metrics.json'}: {key} is {got}, but {expected} in "
                        f"{scored[0].trials[0].path.name}; delete the folder of one of them and run it again"
                    )
    return first


def finite_mean(values: Floats, axis: int) -> Floats:
    """Mean of the finite values along an axis, NaN where there is none."""
    finite = np.isfinite(values)
    count = finite.sum(axis=axis)
    total = np.where(finite, values, 0.0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


# Tests ----------------------------------------------------------------------------------------------------------------


ALPHA = 0.05
FEWEST_PAIRS = 6
"""Differences other than zero that a test needs: five give p = 2 / 2^5 = 0.0625 at best."""

_DIGITS = 10  # differences closer than this are ties: a mean over seeds is exact to its last bits only
_MOST_EXACT = 200


def signed_rank(differences: NDArray[np.float64]) -> tuple[float | None, int]:
    """Return the two-sided p of Wilcoxon's signed-rank test and the sign of the larger rank sum (-1, 0, 1).

    Null hypothesis: each difference is as likely with the other sign. Zeros by Pratt (JASA 54, 1959, 655): ranked with
    the others and then dropped, so that many equal cases weigh against a difference; tied absolute values share their
    mean rank. For up to 200 differences p is exact given the ranks, ties and zeros included, by counting all choices of
    signs (the "exact" of `scipy.stats.wilcoxon` allows neither, and its normal approximation is rough for the few cases
    of a test set); above, the normal approximation with the variance of these ranks.

    `differences`: (pairs,), finite. p is None for fewer than six nonzero differences, which no choice of signs could
    make significant at 0.05; 1 where all are zero. Cost: O(n^3) additions, under 20 ms for 200 pairs.
    """
    values = np.round(np.asarray(differences, dtype=np.float64), _DIGITS)
    nonzero = values != 0
    if values.size and not nonzero.any():
        return 1.0, 0
    if nonzero.sum() < FEWEST_PAIRS:
        return None, 0
    doubled = np.rint(2 * rankdata(np.abs(values)))[nonzero].astype(np.int64)  # mean ranks are halves
    total = int(doubled.sum())
    positive = int(doubled[values[nonzero] > 0].sum())
    sign = int(np.sign(2 * positive - total))
    smaller = min(positive, total - positive)
    if doubled.size <= _MOST_EXACT:
        chance = np.zeros(total + 1)  # of each doubled sum of the positive ranks
        chance[0] = 1.0
        for rank in doubled:
            chance[rank:] = 0.5 * (chance[rank:] + chance[: total + 1 - rank])
            chance[:rank] *= 0.5
        p = 2 * float(chance[: smaller + 1].sum())
    else:
        p = 2 * float(norm.cdf((smaller - total / 2) / np.sqrt((doubled**2).sum() / 4)))
    return min(1.0, p), sign


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p adjusted for all tests of the sequence (Holm, Scand. J. Statist. 6, 1979, 65); None, no test, stays."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[i] = largest
    return adjusted


# Convergence ----------------------------------------------------------------------------------------------------------


PART_OF_BEST = 0.95


def level_of(baseline: Sequence[History]) -> float | None:
    """95% of the best pseudo Dice, median over the baseline's seeds; None where there is none above 0."""
    finite = [[v for v in history.get("pseudo_dice", []) if math.isfinite(v)] for history in baseline]
    best = [max(values) for values in finite if values]
    level = PART_OF_BEST * statistics.median(best) if best else 0.0
    return level if level > 0 else None


def convergence_of(histories: Sequence[History], level: float | None) -> results.Convergence:
    """When each history first reached the level, and the medians in which "not reached" is later than all.

    The pseudo Dice is measured on patches of the validation cases, once per epoch. Seconds are those of the
    epochs in history.csv, validation included; of an epoch that a training was resumed in only the rest was timed.
    """
    reached = [_reached(history, level) for history in histories]
    epochs, seconds = [epoch for epoch, _ in reached], [second for _, second in reached]
    return results.Convergence(
        epochs=epochs, seconds=seconds, median_epochs=_late_median(epochs), median_seconds=_late_median(seconds)
    )


def _reached(history: History, level: float | None) -> tuple[int | None, float | None]:
    reached = [i for i, value in enumerate(history.get("pseudo_dice", [])) if level is not None and value >= level]
    if not reached:
        return None, None
    row = reached[0]
    seconds = sum(history.get("epoch_seconds", [math.nan])[: row + 1])
    return int(history["epoch"][row]) + 1, seconds if math.isfinite(seconds) else None


def _late_median(values: Sequence[float | None]) -> float | None:
    median = statistics.median(math.inf if value is None else value for value in values)
    return median if math.isfinite(median) else None


# Caveats --------------------------------------------------------------------------------------------------------------


def notes_on(comparison: Comparison, missing: Sequence[str], scored: Mapping[str, Sequence[str]]) -> list[str]:
    """Sentences about missing and failed trainings, seeds, test cases and what makes times incomparable.

    `missing`: ids of trials that have not run; `scored`: the cases scored in each finished trial, by its id.
    """
    notes = []
    planned = len(comparison.experiment.trials())
    for what, names in (("have not run", missing), ("failed", [record.id for record in comparison.failed])):
        if names:
            notes.append(f"{len(names)} of {planned} trainings {what}: {_some(names)}.")
    methods = {name: [trial.trial.seed for trial in trials] for name, trials in comparison.methods()}
    if comparison.baseline not in methods:
        notes.append(f"The baseline, {comparison.baseline}, has no finished training: nothing is tested against it.")
    if len(set(map(tuple, methods.values()))) > 1:
        counts = ", ".join(f"{name}: {len(seeds)}" for name, seeds in methods.items())
        notes.append(f"Methods have different seeds, some fewer than others ({counts}).")
    elif max(map(len, methods.values())) == 1:
        notes.append("One seed per method: how much results vary from training to training is not known.")
    tested = comparison.split.test
    short = [trial for trial, cases in scored.items() if set(cases) != set(tested)]
    if short:
        notes.append(f"Not exactly the {len(tested)} test cases of the split were scored in {_some(short)}.")
    if len(tested) < FEWEST_PAIRS:
        notes.append(f"{len(tested)} test cases: fewer than {FEWEST_PAIRS} cannot show a difference in any test.")
    records = [trial.record for trial in comparison.finished]
    threads = sorted({record.threads for record in records})
    if len(threads) > 1:
        notes.append(f"Trainings ran on {' and '.join(map(str, threads))} threads: their times cannot be compared.")
    if len({record.data_hash for record in records}) > 1:
        notes.append("Trainings saw different data (data_hash in trials.csv): run the older ones again.")
    packages = {name for record in records for name in record.versions}
    differing = sorted(name for name in packages if len({record.versions.get(name) for record in records}) > 1)
    if differing:
        notes.append(f"Trainings ran with different versions of {', '.join(differing)} (trials.csv).")
    return notes


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
