"""The report of a comparison: its figures, its answer in sentences, and one HTML page that needs nothing else."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from lightm import __version__
from lightm.errors import LightMError
from lightm.evaluation.report import duration, embed, render
from lightm.files import write_text
from lightm.lab.compare import figures
from lightm.lab.compare.cases import ChosenCase, case_slices, case_surfaces, choose_cases
from lightm.lab.compare.lesions import BinRow, Detail, bins_csv, measure_detail
from lightm.lab.compare.results import Comparison, FinishedTrial, MethodSummary, Summary, TestImages
from lightm.lab.compare.tables import class_texts, interval, legend, method_texts
from lightm.progress import Progress


def write_page(comparison: Comparison, summary: Summary, *, progress: Progress | None = None) -> Path:
    """Write `comparison.html`, `figures/` and the tables of fine detail, and return the page's path.

    The page answers first, then shows tables, differences, training curves, fine detail, single cases and cost, and how
    to repeat the comparison. Pictures are embedded; no script, no outside address; all names are escaped. What is
    missing (trainings, histories, the data set) is named. Raises LightMError when the disk refuses. Takes some ten
    seconds for small cases, and the memory of one case with all its predictions.
    """
    drawn = write_figures(comparison, summary, progress=progress)
    documents = {name: comparison.folder / name for name in ("experiment.yaml", "plan.yaml", "split.json")}
    html = render(
        "compare.html.j2",
        package=__package__,
        summary=summary,
        answer=answer(summary),
        unshown=unshown(summary),
        intro=_intro(comparison),
        cards=_cards(comparison, summary),
        method_table=method_texts(summary),
        class_table=class_texts(summary),
        legend=legend(summary),
        colours={name: look.colour for name, look in figures.looks_of(summary).items()},
        pictures={name: embed(picture) for name, picture in drawn.pictures.items()},
        drawn=drawn,
        embed=embed,
        size_words=detail_words(drawn.detail.size) if drawn.detail else [],
        radius_words=detail_words(drawn.detail.radius) if drawn.detail else [],
        facts=_facts(comparison),
        documents=[(name, path.read_text(encoding="utf-8")) for name, path in documents.items() if path.is_file()],
        command=f"lightm compare experiment.yaml -o {comparison.folder.resolve().name}",
        version=__version__,
    )
    target = comparison.folder / "comparison.html"
    write_text(target, html)
    return target


def _intro(comparison: Comparison) -> dict[str, str]:
    """What was compared, on which data and how trained, as parts of sentences."""
    experiment, plan, split = comparison.experiment, comparison.plan, comparison.split
    methods = experiment.methods()
    epochs, time = experiment.epochs, experiment.max_time
    ends = [] if epochs is None else [f"{epochs} epochs"]
    if time is not None:
        ends.append(time if isinstance(time, str) else duration(time))
    return {
        "methods": f"{len(methods)} method{'s' if len(methods) > 1 else ''}",
        "networks": ", ".join(experiment.networks),
        "losses": ", ".join(experiment.losses),
        "recipes": ", ".join(experiment.recipes),
        "seeds": f"{len(experiment.seeds)} seed{'s' if len(experiment.seeds) > 1 else ''}",
        "data": plan.dataset,
        "classes": ", ".join(plan.targets),
        "dims": f"{plan.spatial_dims}D",
        "channels": ", ".join(plan.channels),
        "split": f"{len(split.train)} cases to train, {len(split.val)} to validate, {len(split.test)} to test",
        "budget": " or ".join(ends) + (", whichever came first" if len(ends) > 1 else ""),
        "patch": " x ".join(map(str, plan.patch_size)),
        "batch": str(plan.batch_size),
    }


def _cards(comparison: Comparison, summary: Summary) -> list[dict[str, str]]:
    finished = sum(len(method.seeds) for method in summary.methods)
    tested = [method.overall.dsc.difference for method in summary.methods]
    verdicts: list[str] = [difference.verdict for difference in tested if difference is not None]
    seconds = sum(trial.record.seconds for trial in comparison.finished)
    left = f"{len(summary.failed)} failed, {len(summary.missing)} not run"
    better, worse = (f"{verdicts.count(verdict)} of {len(verdicts)}" for verdict in ("better", "worse"))
    cards = (
        ("Trainings finished", f"{finished} of {summary.planned}", left),
        ("Test cases", str(len(summary.test_cases)), "the same for every method"),
        ("Better than the baseline", better, "in mean DSC, corrected p"),
        ("Worse than the baseline", worse, "in mean DSC, corrected p"),
        ("Time of all trainings", duration(seconds), "with the scoring of test cases"),
    )
    return [dict(zip(("title", "value", "note"), card, strict=True)) for card in cards]


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    experiment, records = comparison.experiment, [trial.record for trial in comparison.finished]
    versions: dict[str, dict[str, None]] = {}
    for record in records:
        for package, version in record.versions.items():
            versions.setdefault(package, {})[version] = None
    facts = [
        ("Data set", comparison.plan.dataset),
        ("Data hash (SHA-256)", ", ".join(dict.fromkeys(record.data_hash for record in records))),
        ("Split", f"{comparison.split.kind}, seed {comparison.split.seed}"),
        ("Seeds", ", ".join(map(str, experiment.seeds))),
        ("Patch, batch", f"{' x '.join(map(str, comparison.plan.patch_size))}, {comparison.plan.batch_size}"),
        ("Device", experiment.device),
        ("Threads per training", ", ".join(dict.fromkeys(str(record.threads) for record in records))),
        ("Versions of the trainings", "; ".join(f"{name} {' and '.join(found)}" for name, found in versions.items())),
        ("Trained between", " and ".join(sorted(record.started for record in records)[:: max(1, len(records) - 1)])),
        ("Page written by", f"LightM {__version__}, Python {platform.python_version()}"),
    ]
    return [(name, value) for name, value in facts if value]


# Figures --------------------------------------------------------------------------------------------------------------


@dataclass
class DrawnCase:
    """One case with its pictures (PNG), or why there are none."""

    chosen: ChosenCase
    seeds: dict[str, int] = field(default_factory=dict)
    slices: bytes | None = None
    surfaces: bytes | None = None
    surfaces_left_out: int = 0
    problem: str = ""


@dataclass
class Drawn:
    """PNG pictures by name, the cases, the fine detail (None where it could not be measured), and what is missing."""

    pictures: dict[str, bytes]
    cases: list[DrawnCase]
    detail: Detail | None
    images_problem: str
    history_problems: list[str]


def write_figures(comparison: Comparison, summary: Summary, *, progress: Progress | None = None) -> Drawn:
    """Draw everything into `figures/` (PNG, and SVG but for slices and surfaces) and `tables/size.csv`, `radius.csv`.

    Replaces the figures of an earlier call, and leaves out what needs a missing data set or prediction. Raises
    LightMError, naming the file, when the disk refuses. Cost: about ten seconds, and reading every prediction.
    """
    folder = comparison.folder / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.png"), *folder.glob("*.svg")]:
        old.unlink()
    histories, history_problems = figures.read_histories(comparison)
    pictures: dict[str, bytes] = {}

    def draw(name: str, make: Callable[[], Figure | None]) -> None:
        if progress is not None:
            progress(f"figures: {name}", len(pictures), 8)
        figure = make()
        if figure is not None:
            pictures[name] = figures.save(figure, folder / name)

    draw("differences", lambda: figures.forest(summary))
    draw("cases", lambda: figures.case_slopes(summary))
    draw("curves", lambda: figures.training_curves(comparison, histories) if histories else None)
    draw("coefficients", lambda: figures.coefficient_curves(comparison, histories))
    draw("bubbles", lambda: figures.bubbles(summary))
    draw("time", lambda: figures.dice_over_time(summary))
    detail, problem = None, ""
    chosen = [DrawnCase(case) for case in choose_cases(summary)]
    try:
        images = TestImages(comparison)
    except LightMError as error:
        problem = str(error)
    else:
        found = detail = measure_detail(comparison, summary, images, progress=progress)
        draw("size", lambda: figures.detail_figure(found.size, summary))
        draw("radius", lambda: figures.detail_figure(found.radius, summary))
        for number, case in enumerate(chosen, start=1):
            if progress is not None:
                progress("figures: cases", number - 1, len(chosen))
            _draw_case(case, comparison, summary, images, folder / f"case_{number}")
    tables = comparison.folder / "tables"
    tables.mkdir(parents=True, exist_ok=True)
    for name in ("size", "radius"):
        if detail is not None:
            write_text(tables / f"{name}.csv", bins_csv(getattr(detail, name)))
        else:  # numbers of an earlier call would not belong to this page
            (tables / f"{name}.csv").unlink(missing_ok=True)
    if progress is not None:
        progress("figures", 8, 8)
    return Drawn(pictures, chosen, detail, problem, history_problems)


def _draw_case(case: DrawnCase, comparison: Comparison, summary: Summary, images: TestImages, path: Path) -> None:
    """Draw a case by the first seed of every method that has a prediction of it."""
    name = case.chosen.case
    trials: dict[str, FinishedTrial] = {}
    for method, finished in comparison.methods():
        for trial in finished:
            if name in images.predictions[trial.record.id]:
                trials.setdefault(method, trial)
    case.seeds = {method: trial.trial.seed for method, trial in trials.items()}
    try:
        image = images.image(name)
        found = images.labels(name, list(trials.values()))
    except LightMError as error:
        case.problem = str(error)
        return
    if image.shape != found.label.shape:
        case.problem = f"case {name}: image and label have shapes {image.shape} and {found.label.shape}"
        return
    predictions = {method: found.predictions[trial.record.id] for method, trial in trials.items()}
    if not predictions:
        case.problem = f"case {name}: no training left a prediction of it"
        return
    dsc = _drawn_dsc(summary, name, case.seeds)
    figure = case_slices(
        image, found.label, predictions, dsc, found.spacing_mm, summary.labels, window=images.run.window
    )
    case.slices = figures.save(figure, path.with_name(path.name + "_slices"), vector=False)
    if found.label.ndim == 3:
        surfaces, case.surfaces_left_out = case_surfaces(found.label, predictions, found.spacing_mm, summary.labels)
        case.surfaces = figures.save(surfaces, path.with_name(path.name + "_surfaces"), vector=False)


def _drawn_dsc(summary: Summary, case: str, seeds: dict[str, int]) -> dict[str, float]:
    """Each method's mean DSC over classes by the seed that is drawn: the title belongs to the picture."""
    values: dict[str, list[float]] = {}
    for row in summary.cases:
        if row.case == case and row.dsc is not None and seeds.get(row.method) == row.seed:
            values.setdefault(row.method, []).append(row.dsc)
    return {method: sum(dsc) / len(dsc) for method, dsc in values.items()}


# Sentences ------------------------------------------------------------------------------------------------------------


def answer(summary: Summary) -> list[str]:
    """Who is better by how much in mean DSC, the decided score, in a few sentences; the baseline's numbers first."""
    baseline = next((method for method in summary.methods if method.is_baseline), None)
    over = "mean over classes" if len(summary.labels) > 1 else next(iter(summary.labels))
    best = _highest(summary.methods)
    if baseline is None:
        untested = "" if best is None else f" The highest mean DSC, not tested, is {best.name}'s, {_mean(best)}."
        return [f"The baseline, {summary.baseline}, has no result, so no method is tested against it.{untested}"]
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
        f"they were trained ({seeds} seed{'s' if seeds > 1 else ''} per method at most). Other data, other seeds or a "
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
        clear = [row for row in small if (row.difference_low or 0) > 0 or (row.difference_high or 0) < 0]
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
    return "no defined value" if dsc.mean is None else interval(dsc.mean, dsc.low, dsc.high, ".3f")


def _difference(method: MethodSummary, *, sign: bool = False) -> str:
    found = method.overall.dsc.difference
    if found is None or found.mean is None:
        return "an undefined amount"
    flip = -1.0 if found.mean < 0 and not sign else 1.0
    form = "+.3f" if sign else ".3f"
    low, high = (None if bound is None else flip * bound for bound in (found.low, found.high))
    text = interval(flip * found.mean, *((low, high) if flip > 0 else (high, low)), form)
    return text if found.p_holm is None else f"{text}, {figures.p_text(found.p_holm, ' ')}"
