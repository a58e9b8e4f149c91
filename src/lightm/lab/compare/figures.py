"""Figures of a comparison: differences, single cases, cost, lesions, and training curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lightm.errors import LightMError
from lightm.evaluation.figures import BLUE, INK, MUTED, VERMILION, History, new_figure, plain, tidy, to_png
from lightm.files import atomic_file
from lightm.lab.bubbles import comparison_figure
from lightm.lab.compare.lesions import BinRow
from lightm.lab.compare.results import Comparison, Score, Summary
from lightm.lab.complexity.report import Dice, Row

# Okabe and Ito's, then four of Paul Tol's muted ones; the marker tells apart what a reader cannot.
_COLOURS = f"{BLUE} {VERMILION} #009E73 #CC79A7 #E69F00 #56B4E9 #882255 #332288 #999933 #661100 #44AA99".split()
_MARKERS = "osD^vP*X<>hp"
_FULL, _SHORT = 60, 22


@dataclass(frozen=True)
class Look:
    """Colour and marker of one method."""

    colour: str
    marker: str


def looks(methods: Sequence[str], baseline: str | None) -> dict[str, Look]:
    """The look of every method: the baseline in black, the others in the order given."""
    others = [name for name in methods if name != baseline]
    found = {
        name: Look(_COLOURS[i % len(_COLOURS)], _MARKERS[(i + 1) % len(_MARKERS)]) for i, name in enumerate(others)
    }
    return {name: found.get(name, Look(INK, "o")) for name in methods}


def looks_of(summary: Summary) -> dict[str, Look]:
    return looks([method.name for method in summary.methods], summary.baseline)


def short(name: str, most: int = _SHORT) -> str:
    """A name that fits a title: its middle is left out where it is long; dollar signs are no formulas."""
    if len(name) > most:
        half = (most - 1) // 2
        name = f"{name[: most - 1 - half]}…{name[-half:]}"
    return plain(name)


def method_legend(figure: Figure, found: dict[str, Look], extra: Sequence[Line2D] = ()) -> None:
    """One legend of all methods below the panels."""
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, markersize=5, label=short(name, _FULL))
        for name, look in found.items()
    ]
    longest = max(len(name) for name in found)
    columns = max(1, min(6, len(handles) + len(extra), 120 // (longest + 8)))
    figure.legend(
        handles=[*handles, *extra], loc="outside lower center", ncols=columns, frameon=False, fontsize=8, handlelength=2
    )


def titled(axes: Axes, title: str) -> None:
    """A bold title on the left."""
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)


def save(figure: Figure, path: Path, *, vector: bool = True) -> bytes:
    """Write `path`.png, with `vector` also `path`.svg, and return the PNG's bytes; equal figures give equal files."""
    picture = to_png(figure)
    with atomic_file(path.with_name(path.name + ".png")) as file:
        file.write(picture)
    if vector:
        with matplotlib.rc_context({"svg.hashsalt": "lightm"}), atomic_file(path.with_name(path.name + ".svg")) as file:
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return picture


# Scores and cost ------------------------------------------------------------------------------------------------------


_COLUMNS = 4  # panels side by side: the mean over classes and classes, as many as can be read
_BETTER = {"better": BLUE, "worse": VERMILION}


def forest(summary: Summary) -> Figure | None:
    """Differences to the baseline with 95% intervals and Holm's p: DSC, NSD and HD95, all classes and each.

    None for one method alone, and without a result of the baseline.
    """
    others = [method for method in summary.methods if method.overall.dsc.difference is not None]
    if not others:
        return None
    groups: list[str | None] = [None] if len(summary.labels) == 1 else [None, *list(summary.labels)[:6]]
    lines = [(group, method) for group in groups for method in others]
    figure = new_figure(9.6, 1.3 + 0.27 * len(lines) + 0.3 * len(groups))
    panels = figure.subplots(1, 3, sharey=True, width_ratios=(1.25, 1, 1))
    gap = 1.0
    places = [i + gap * (i // len(others)) for i in range(len(lines))]
    for axes, metric, title, right in (
        (panels[0], "dsc", "DSC", True),
        (panels[1], "nsd", "NSD", True),
        (panels[2], "hd95_mm", f"HD95, {summary.distance_unit}", False),
    ):
        for place, (group, method) in zip(places, lines, strict=True):
            scores = method.overall if group is None else method.classes[group]
            score: Score = getattr(scores, metric)
            found = score.difference
            if found is None or found.mean is None:
                axes.text(0, place, "undefined", ha="center", va="center", fontsize=7.5, color=MUTED)
                continue
            colour = _BETTER.get(found.verdict, MUTED)
            if found.low is not None and found.high is not None:
                axes.plot([found.low, found.high], [place, place], color=colour, linewidth=2)
            # a filled marker is a difference that is shown
            fill = colour if found.verdict in _BETTER else "white"
            axes.plot([found.mean], [place], "o", color=colour, markerfacecolor=fill, markersize=5.5)
            text = "" if found.p_holm is None else p_text(found.p_holm)
            axes.text(1.01, place, text, transform=axes.get_yaxis_transform(), fontsize=7.5, va="center", color=INK)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_xlabel(f"difference in {title}\n{'better →' if right else '← better'}")
        axes.margins(x=0.12)
        axes.locator_params(axis="x", nbins=5)
        tidy(axes, grid="x")
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(places, [short(method.name, 44) for _, method in lines])
    panels[0].set_ylim(places[-1] + 0.7, -1.3)
    heading = {"transform": panels[0].get_yaxis_transform(), "fontsize": 8.5, "fontweight": "bold", "va": "center"}
    for number, group in enumerate(groups):
        place = number * (len(others) + gap) - 0.75
        panels[0].text(0.0, place, short(_over(summary) if group is None else group, 40), color=INK, **heading)
    return figure


def case_slopes(summary: Summary) -> Figure:
    """DSC of every case by every method, a thin line per case: whether methods fail on the same cases."""
    shown = looks_of(summary)
    names = list(shown)
    groups = list(summary.labels)[:_COLUMNS]
    table = case_table(summary)
    figure = new_figure(9.6, 1.2 + 0.42 * max(3, len(names)))
    panels = figure.subplots(1, len(groups), sharey=True, sharex=True, squeeze=False)[0]
    for axes, group in zip(panels, groups, strict=True):
        values = table[group]
        for case in values.T:
            known = np.isfinite(case)
            axes.plot(case[known], np.arange(len(names))[known], color=MUTED, linewidth=0.5, alpha=0.45, zorder=1)
        for place, name in enumerate(names):
            dsc = values[place][np.isfinite(values[place])]
            look = shown[name]
            if not dsc.size:
                axes.text(0.5, place, "no DSC", ha="center", va="center", color=MUTED, fontsize=8)
                continue
            axes.scatter(dsc, np.full(dsc.size, place), s=11, color=look.colour, alpha=0.55, linewidth=0, zorder=2)
            axes.plot([dsc.mean()], [place], "|", color=look.colour, markersize=17, markeredgewidth=3, zorder=3)
        axes.set_xlabel("DSC")
        axes.set_xlim(-0.02, 1.02)
        tidy(axes, grid="x")
        titled(axes, short(group))
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(names)), [short(name, 40) for name in names])
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def case_table(summary: Summary) -> dict[str, np.ndarray]:
    """DSC by class as (methods, cases), each the mean over seeds; NaN where there is none."""
    rows = {method.name: i for i, method in enumerate(summary.methods)}
    columns = {case: i for i, case in enumerate(summary.test_cases)}
    classes = {name: i for i, name in enumerate(summary.labels)}
    total, count = np.zeros((2, len(classes), len(rows), len(columns)))
    for row in summary.cases:
        if row.dsc is not None:
            at = classes[row.class_name], rows[row.method], columns[row.case]
            total[at] += row.dsc
            count[at] += 1
    means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return dict(zip(classes, means, strict=True))


def bubbles(summary: Summary) -> Figure | None:
    """DSC over multiply-adds, the area of a bubble the parameters; None where no network was measured."""
    rows = []
    for method in summary.methods:
        dsc, cost = method.overall.dsc, method.cost
        if cost is None or dsc.mean is None:
            continue
        scored = Dice(_over(summary), dsc.mean, dsc.low, dsc.high)
        rows.append(Row(method.name, "", cost.parameters, cost.multiply_adds, dice=(scored,)))
    if not rows:
        return None
    patch = next(m.cost.patch_size for m in summary.methods if m.cost is not None)
    return comparison_figure(
        rows,
        colours={name: look.colour for name, look in looks_of(summary).items()},
        counted=f"a patch of {' x '.join(map(str, patch))}",
    )


def dice_over_time(summary: Summary) -> Figure | None:
    """DSC over training time: a large marker per method with its interval over cases, a small one per seed."""
    shown = looks_of(summary)
    figure = new_figure(9.6, 4.6)
    axes = figure.subplots()
    drawn = {}
    for method in summary.methods:
        look, dsc, seconds = shown[method.name], method.overall.dsc, method.training.mean_seconds
        if dsc.mean is None or seconds is None:
            continue
        drawn[method.name] = look
        if dsc.low is not None and dsc.high is not None:
            axes.plot([seconds, seconds], [dsc.low, dsc.high], color=look.colour, linewidth=1.2, alpha=0.6)
        axes.plot([seconds], [dsc.mean], look.marker, color=look.colour, markersize=10)
        for time, value in zip(method.training.seconds, dsc.seed_means, strict=True):
            if time is not None and value is not None and len(method.seeds) > 1:
                axes.plot([time], [value], look.marker, color=look.colour, markersize=4, alpha=0.5)
    if not drawn:
        return None
    axes.set_xlabel("seconds of training, validation included")
    axes.set_ylabel(f"DSC, {_over(summary)}")
    axes.margins(x=0.08, y=0.1)
    tidy(axes)
    method_legend(figure, drawn)
    return figure


def detail_figure(rows: Sequence[BinRow], summary: Summary) -> Figure | None:
    """DSC, its difference to the baseline, and the share of found components by bins; a row of panels per class."""
    classes = list(dict.fromkeys(row.class_name for row in rows))
    if not classes:
        return None
    shown = looks_of(summary)
    size = rows[0].what == "size"
    panels = ["DSC", "difference in DSC to the baseline", *(["share found"] if size else [])]
    figure = new_figure(9.6, 1.0 + 2.6 * len(classes))
    grid = figure.subplots(len(classes), len(panels), squeeze=False)
    for line, name in enumerate(classes):
        here = [row for row in rows if row.class_name == name]
        edges = list(dict.fromkeys((row.low_edge, row.high_edge) for row in here))
        for column, panel in enumerate(panels):
            axes = grid[line, column]
            for i, (method, look) in enumerate(shown.items()):
                shift = 0.6 * ((i + 0.5) / len(shown) - 0.5)  # methods side by side, so that intervals do not cover
                for row in here:
                    if row.method == method:
                        _point(axes, edges.index((row.low_edge, row.high_edge)) + shift, row, column, look)
            if column == 1:
                axes.axhline(0, color=INK, linewidth=0.9)
            else:
                axes.set_ylim(-0.03, 1.03)
            unit, what = here[0].unit, "components" if size else "cases"
            most = {k: max((row.n for row in here if (row.low_edge, row.high_edge) == k), default=0) for k in edges}
            axes.set_xticks(
                range(len(edges)), [f"{_short(low)}–{_short(high)}\nn={most[low, high]}" for low, high in edges]
            )
            axes.set_xlim(-0.5, len(edges) - 0.5)
            axes.set_xlabel(f"{'size' if size else 'radius'}, {unit} (n {what})")
            tidy(axes, grid="y")
            titled(axes, f"{short(name)}: {panel}" if column == 0 else panel)
    method_legend(figure, shown)
    return figure


def _point(axes: Axes, x: float, row: BinRow, column: int, look: Look) -> None:
    value, low, high = (
        (row.dsc, row.dsc_low, row.dsc_high),
        (row.difference, row.difference_low, row.difference_high),
        (row.found, None, None),
    )[column]
    if low is not None and high is not None:
        axes.plot([x, x], [low, high], color=look.colour, linewidth=1.3, alpha=0.7)
    if value is not None:
        axes.plot([x], [value], look.marker, color=look.colour, markersize=4.5)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def p_text(p: float, gap: str = "") -> str:
    return f"p{gap}<{gap}0.001" if p < 0.001 else f"p{gap}={gap}{p:.3f}"


def _over(summary: Summary) -> str:
    return "mean over classes" if len(summary.labels) > 1 else next(iter(summary.labels))


# Training curves ------------------------------------------------------------------------------------------------------


Histories = dict[str, list[History]]
Style = str | tuple[int, tuple[float, ...]]

_DASHED: Style = (0, (3, 1.5))
_CLASSES = 4  # of alpha and beta: more do not fit a page


def read_histories(comparison: Comparison) -> tuple[Histories, list[str]]:
    """The histories of every method, one per seed, and what could not be read."""
    histories: Histories = {}
    problems = []
    for name, trials in comparison.methods():
        for trial in trials:
            try:
                history = trial.history()
            except LightMError as error:
                problems.append(str(error))
                continue
            if history:
                histories.setdefault(name, []).append(history)
    return histories, problems


def training_curves(comparison: Comparison, histories: Histories) -> Figure:
    """Loss (a row per loss, as their heights cannot be compared), pseudo Dice, and that smoothed.

    The left column is over epochs, the right one over seconds of training. A method is the mean over its seeds, as far
    as all of them went, at the mean of their times; each seed is a thin line.
    """
    loss_of = {name: trials[0].trial.loss for name, trials in comparison.methods()}
    losses = [loss for loss in comparison.experiment.losses if any(loss_of[name] == loss for name in histories)]
    shown = looks(list(loss_of), comparison.baseline)
    rows = len(losses) + 2
    figure = new_figure(9.6, 1.0 + 2.1 * rows)
    grid = figure.subplots(rows, 2, sharex="col", sharey="row", squeeze=False)
    for column, seconds in enumerate((False, True)):
        for row, loss in enumerate(losses):
            axes = grid[row, column]
            chosen = {name: found for name, found in histories.items() if loss_of[name] == loss}
            for name, found in chosen.items():
                _draw(axes, found, "train_loss", shown[name], seconds, "-")
                _draw(axes, found, "val_loss", shown[name], seconds, _DASHED)
            tidy(axes)
            titled(axes, f"Loss {short(loss, 40)}" if not column else "")
        for row, key, title in (
            (rows - 2, "pseudo_dice", "Pseudo Dice on validation patches"),
            (rows - 1, "pseudo_dice_smoothed", "The same, smoothed"),
        ):
            axes = grid[row, column]
            for name, found in histories.items():
                _draw(axes, found, key, shown[name], seconds, "-")
            axes.set_ylim(0, 1)
            tidy(axes)
            titled(axes, title if not column else "")
        grid[-1, column].set_xlabel("seconds of training" if seconds else "epoch")
    grid[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    styles: list[tuple[Style, str]] = [("-", "training loss"), (_DASHED, "validation loss")]
    extra = [Line2D([], [], color=MUTED, linestyle=style, label=text) for style, text in styles]
    method_legend(figure, {name: look for name, look in shown.items() if name in histories}, extra)
    return figure


def coefficient_curves(comparison: Comparison, histories: Histories) -> Figure | None:
    """Alpha and beta of the adaptive region-specific loss by class over epochs; None where no run has them."""
    prefix = "arsl_alpha/"
    having: Histories = {}
    columns: dict[str, None] = {}
    for method, found in histories.items():
        for history in found:
            if own := [key.removeprefix(prefix) for key in history if key.startswith(prefix)]:
                having.setdefault(method, []).append(history)
                columns |= dict.fromkeys(own)
    if not having:
        return None
    classes = list(columns)[:_CLASSES]
    shown = looks([name for name, _ in comparison.methods()], comparison.baseline)
    figure = new_figure(9.6, 1.0 + 2.0 * len(classes))
    grid = figure.subplots(len(classes), 2, sharex=True, sharey=True, squeeze=False)
    for row, name in enumerate(classes):
        for column, which in enumerate(("alpha", "beta")):
            axes = grid[row, column]
            for method, found in having.items():
                _draw(axes, found, f"arsl_{which}/{name}", shown[method], False, "-")
            tidy(axes)
            titled(axes, f"{short(name)}: {which} ({'false' if which == 'alpha' else 'missed'} voxels)")
            axes.axhline(0.5, color=INK, linewidth=0.8, linestyle=":")
    for axes in grid[-1]:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    method_legend(figure, {name: shown[name] for name in having})
    return figure


def _draw(axes: Axes, found: Sequence[History], key: str, look: Look, seconds: bool, style: Style) -> None:
    lines = [(x, y) for x, y in (_line(history, key, seconds) for history in found) if np.isfinite(y).any()]
    if not lines:
        return
    if len(lines) > 1:
        for x, y in lines:
            known = np.isfinite(y)
            axes.plot(x[known], y[known], linestyle=style, color=look.colour, linewidth=0.6, alpha=0.4)
    common = min(len(x) for x, _ in lines)
    x = np.mean([x[:common] for x, _ in lines], axis=0)
    y = np.mean([y[:common] for _, y in lines], axis=0)  # an epoch that one seed lacks has no mean
    known = np.isfinite(x) & np.isfinite(y)
    every = max(1, int(known.sum()) // 6)
    marks: dict[str, Any] = {"marker": look.marker, "markersize": 4, "markevery": every, "label": plain(key)}
    axes.plot(x[known], y[known], linestyle=style, color=look.colour, linewidth=1.6, **marks)


def _line(history: History, key: str, seconds: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    values = np.array(history.get(key, []), dtype=np.float64)
    if not seconds:
        return np.array(history["epoch"], dtype=np.float64)[: values.size] + 1, values
    spent = np.array(history.get("epoch_seconds", []), dtype=np.float64)
    return (np.cumsum(spent), values) if spent.size == values.size else (np.zeros(0), np.zeros(0))
