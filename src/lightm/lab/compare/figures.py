"""Figures of a comparison's scores: differences, single cases, cost, and fine detail."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightm.evaluation.figures import BLUE, INK, MUTED, VERMILION, new_figure
from lightm.lab.bubbles import comparison_figure
from lightm.lab.compare.bins import BinRow
from lightm.lab.compare.style import looks, method_legend, short, tidy
from lightm.lab.compare.summary import Score, Summary
from lightm.lab.complexity.table import Dice, Row

_COLUMNS = 4  # panels side by side: the mean over classes and classes, as many as can be read
_BETTER = {"better": BLUE, "worse": VERMILION}


def forest(summary: Summary) -> Figure | None:
    """Differences to the baseline with 95% intervals and Holm's p: DSC, NSD and HD95, all classes and each.

    None where nothing is compared: one method, or no result of the baseline.
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
            text = "" if found.p_holm is None else "p<0.001" if found.p_holm < 0.001 else f"p={found.p_holm:.3f}"
            axes.text(1.01, place, text, transform=axes.get_yaxis_transform(), fontsize=7.5, va="center", color=INK)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_xlabel(f"difference in {title}\n{'better →' if right else '← better'}")
        axes.margins(x=0.12)
        axes.locator_params(axis="x", nbins=5)
        tidy(axes, grid="x")
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(places, [short(method.name, 44) for _, method in lines])
    panels[0].set_ylim(places[-1] + 0.7, -1.3)
    for number, group in enumerate(groups):
        only = f"{next(iter(summary.labels))}" if len(summary.labels) == 1 else "mean over classes"
        place = number * (len(others) + gap) - 0.75
        panels[0].text(
            0.0,
            place,
            short(group if group is not None else only, 40),
            transform=panels[0].get_yaxis_transform(),
            fontsize=8.5,
            fontweight="bold",
            color=INK,
            va="center",
        )
    return figure


def case_slopes(summary: Summary) -> Figure:
    """DSC of every case by every method, a thin line a case: whether methods fail on the same cases."""
    names = [method.name for method in summary.methods]
    shown = looks(names, summary.baseline)
    groups: list[str] = list(summary.labels)[:_COLUMNS]
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
        tidy(axes, short(group), grid="x")
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(names)), [short(name, 40) for name in names])
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def case_table(summary: Summary) -> dict[str, np.ndarray]:
    """DSC by class as (methods, cases), each the mean over seeds; NaN where there is none."""
    rows = {method.name: i for i, method in enumerate(summary.methods)}
    columns = {case: i for i, case in enumerate(summary.test_cases)}
    shape = (len(rows), len(columns))
    total = {name: np.zeros(shape) for name in summary.labels}
    count = {name: np.zeros(shape) for name in summary.labels}
    for row in summary.cases:
        if row.dsc is not None:
            at = rows[row.method], columns[row.case]
            total[row.class_name][at] += row.dsc
            count[row.class_name][at] += 1
    return {
        name: np.where(count[name] > 0, total[name] / np.maximum(count[name], 1), np.nan) for name in summary.labels
    }


def bubbles(summary: Summary) -> Figure | None:
    """DSC over multiply-adds, the area of a bubble the parameters; None where no network was measured."""
    shown = looks([method.name for method in summary.methods], summary.baseline)
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
        colours={name: look.colour for name, look in shown.items()},
        counted=f"a patch of {' x '.join(map(str, patch))}",
    )


def dice_over_time(summary: Summary) -> Figure | None:
    """DSC over training time: a large marker a method with its interval over cases, a small one a seed."""
    shown = looks([method.name for method in summary.methods], summary.baseline)
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
    """DSC, its difference to the baseline, and the share of found components by bins; a row of panels a class."""
    classes = list(dict.fromkeys(row.class_name for row in rows))
    if not classes:
        return None
    shown = looks([method.name for method in summary.methods], summary.baseline)
    size = rows[0].what == "size"
    panels = ("DSC", "difference in DSC to the baseline", "share found") if size else ("DSC", "difference in DSC to "
              "the baseline")  # fmt: skip
    figure = new_figure(9.6, 1.0 + 2.6 * len(classes))
    grid = figure.subplots(len(classes), len(panels), squeeze=False)
    for line, name in enumerate(classes):
        here = [row for row in rows if row.class_name == name]
        edges = list(dict.fromkeys((row.low_edge, row.high_edge) for row in here))
        for column, panel in enumerate(panels):
            axes = grid[line, column]
            for i, (method, look) in enumerate(shown.items()):
                shift = 0.6 * ((i + 0.5) / len(shown) - 0.5)  # methods side by side, so that intervals do not cover
                own = [
                    (edges.index((row.low_edge, row.high_edge)) + shift, row) for row in here if row.method == method
                ]
                _points(axes, own, column, look.colour, look.marker)
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
            tidy(axes, f"{short(name)}: {panel}" if column == 0 else panel, grid="y")
    method_legend(figure, shown)
    return figure


def _points(axes: Axes, own: Sequence[tuple[float, BinRow]], column: int, colour: str, marker: str) -> None:
    for x, row in own:
        value, low, high = (
            (row.dsc, row.dsc_low, row.dsc_high),
            (row.difference, row.difference_low, row.difference_high),
            (row.found, None, None),
        )[column]
        if value is None:
            continue
        if low is not None and high is not None:
            axes.plot([x, x], [low, high], color=colour, linewidth=1.3, alpha=0.7)
        axes.plot([x], [value], marker, color=colour, markersize=4.5)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _over(summary: Summary) -> str:
    return "mean over classes" if len(summary.labels) > 1 else next(iter(summary.labels))
