"""The outcome of a comparison in plain sentences."""

from __future__ import annotations

from collections.abc import Sequence

from lightm.lab.compare.bins import BinRow
from lightm.lab.compare.summary import MethodSummary, Summary


def answer(summary: Summary) -> list[str]:
    """Who is better by how much in mean DSC, the decided score, in a few sentences; the baseline's numbers first."""
    baseline = next((method for method in summary.methods if method.is_baseline), None)
    over = "mean over classes" if len(summary.labels) > 1 else next(iter(summary.labels))
    if baseline is None:
        best = _highest(summary.methods)
        told = ""
        if best is not None:
            told = f" The highest mean DSC is that of {best.name}, {_mean(best)}; no test stands behind it."
        return [f"The baseline, {summary.baseline}, has no result, so no method is tested against it.{told}"]
    sentences = [f"The baseline, {baseline.name}, reaches a Dice (DSC, {over}) of {_mean(baseline)}."]
    others = [method for method in summary.methods if not method.is_baseline]
    if not others:
        return [*sentences, "No other method has a result yet, so nothing is compared."]
    by_verdict: dict[str, list[MethodSummary]] = {}
    for method in others:
        found = method.overall.dsc.difference
        by_verdict.setdefault(found.verdict if found else "not tested", []).append(method)
    for verdict in ("better", "worse"):
        for method in by_verdict.get(verdict, []):
            sentences.append(f"{method.name} is {verdict} by {_difference(method)}.")
    if unshown := by_verdict.get("no difference shown"):
        listed = "; ".join(f"{method.name} ({_difference(method, sign=True)})" for method in unshown)
        sentences.append(
            f"No difference to the baseline is shown for {listed}. That does not show that there is none: the "
            "intervals say how large one could still be."
        )
    for method in by_verdict.get("not tested", []):
        found = method.overall.dsc.difference
        why = found.note if found is not None and found.note else "there is no pair of cases to test"
        sentences.append(f"{method.name} was not tested: {why}.")
    best = _highest(summary.methods)
    if best is not None and len(others) > 1:
        sentences.append(
            f"The highest mean is that of {best.name}, {_mean(best)}; only differences to the baseline were tested, "
            "not those between other methods."
        )
    return sentences


def unshown(summary: Summary) -> list[str]:
    """What this comparison cannot tell, beside the notes on its own gaps."""
    finished = sum(len(method.seeds) for method in summary.methods)
    seeds = max(len(method.seeds) for method in summary.methods)
    return [
        f"{finished} of {summary.planned} trainings are finished, {len(summary.failed)} failed and "
        f"{len(summary.missing)} have not run.",
        *summary.notes,
        f"Intervals and tests are over the {len(summary.test_cases)} test cases of this data set, for the networks as "
        f"they were trained ({seeds} seed{'s' if seeds > 1 else ''} a method at most). Other data, other seeds or a "
        "longer training may turn out differently.",
        "p is corrected for the number of methods, not for the number of scores and classes: among many of them a few "
        "differences look real by chance.",
    ]


def detail_words(rows: Sequence[BinRow]) -> list[str]:
    """What the smallest bin of every class says: the best method there against the baseline, where intervals allow."""
    sentences = []
    for name in dict.fromkeys(row.class_name for row in rows):
        here = [row for row in rows if row.class_name == name]
        edges = sorted({(row.low_edge, row.high_edge) for row in here})
        if len(edges) < 2:
            sentences.append(f"{name}: too few components or cases for more than one bin.")
            continue
        small = [row for row in here if (row.low_edge, row.high_edge) == edges[0]]
        clear = [r for r in small if r.difference_low is not None and r.difference_high is not None
                 and (r.difference_low > 0 or r.difference_high < 0)]  # fmt: skip
        kind = "smallest" if rows[0].what == "size" else "thinnest"
        what = f"{name}, the {kind} (up to {edges[0][1]:.3g} {here[0].unit})"
        if not any(row.difference is not None for row in small):
            sentences.append(f"{what}: nothing to compare with.")
        elif not clear:
            sentences.append(f"{what}: no method's interval of the difference to the baseline lies off zero.")
        else:
            listed = "; ".join(
                f"{r.method} {r.difference:+.3f} [{r.difference_low:+.3f}, {r.difference_high:+.3f}]" for r in clear
            )
            sentences.append(f"{what}: off zero are {listed} (not corrected for several methods).")
    return sentences


def _highest(methods: Sequence[MethodSummary]) -> MethodSummary | None:
    known = [method for method in methods if method.overall.dsc.mean is not None]
    return max(known, key=lambda method: method.overall.dsc.mean or 0.0) if known else None


def _mean(method: MethodSummary) -> str:
    dsc = method.overall.dsc
    if dsc.mean is None:
        return "no defined value"
    interval = "" if dsc.low is None or dsc.high is None else f" [{dsc.low:.3f}, {dsc.high:.3f}]"
    return f"{dsc.mean:.3f}{interval}"


def _difference(method: MethodSummary, *, sign: bool = False) -> str:
    found = method.overall.dsc.difference
    if found is None or found.mean is None:
        return "an undefined amount"
    flip = -1.0 if found.mean < 0 and not sign else 1.0
    form = "+.3f" if sign else ".3f"
    text = f"{flip * found.mean:{form}}"
    if found.low is not None and found.high is not None:
        low, high = sorted((flip * found.low, flip * found.high))
        text += f" [{low:{form}}, {high:{form}}]"
    p = "" if found.p_holm is None else ", p < 0.001" if found.p_holm < 0.001 else f", p = {found.p_holm:.3f}"
    return text + p
