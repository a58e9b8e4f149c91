"""Training curves of all methods, over epochs and over seconds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lightm.errors import LightMError
from lightm.evaluation.figures import INK, MUTED, History, new_figure, plain
from lightm.lab.compare.results import Comparison
from lightm.lab.compare.style import Look, looks, method_legend, short, tidy

Histories = dict[str, list[History]]
Style = str | tuple[int, tuple[float, float]]

_CLASSES = 4  # of alpha and beta: more do not fit a page


def read_histories(comparison: Comparison) -> tuple[Histories, list[str]]:
    """The histories of every method, one a seed, and what could not be read."""
    histories: Histories = {}
    problems = []
    for name, cells in comparison.methods():
        for cell in cells:
            try:
                history = cell.history()
            except LightMError as error:
                problems.append(str(error))
                continue
            if history:
                histories.setdefault(name, []).append(history)
    return histories, problems


def training_curves(comparison: Comparison, histories: Histories) -> Figure:
    """Loss (a row for each loss, as heights of different losses cannot be compared), pseudo Dice and its average.

    The left column is over epochs, the right one over seconds of training. A method is the mean over its seeds, as far
    as all of them went, at the mean of their times; each seed is a thin line.
    """
    loss_of = {name: cells[0].cell.loss for name, cells in comparison.methods()}
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
                _draw(axes, found, "val_loss", shown[name], seconds, (0, (3, 1.5)))
            tidy(axes, f"Loss {short(loss, 40)}" if not column else "")
        for row, key, title in (
            (rows - 2, "pseudo_dice", "Pseudo Dice on validation patches"),
            (rows - 1, "pseudo_dice_ema", "Its moving average"),
        ):
            axes = grid[row, column]
            for name, found in histories.items():
                _draw(axes, found, key, shown[name], seconds, "-")
            axes.set_ylim(0, 1)
            tidy(axes, title if not column else "")
        grid[-1, column].set_xlabel("seconds of training" if seconds else "epoch")
    grid[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    styles = [("-", "training loss"), ((0, (3, 1.5)), "validation loss")]
    method_legend(
        figure,
        {name: look for name, look in shown.items() if name in histories},
        [Line2D([], [], color=MUTED, linestyle=style, label=text) for style, text in styles],
    )
    return figure


def coefficient_curves(comparison: Comparison, histories: Histories) -> Figure | None:
    """Alpha and beta of the adaptive region-specific loss by class over epochs; None where no run has them."""
    having = {
        name: [history for history in found if any(key.startswith("arsl_alpha/") for key in history)]
        for name, found in histories.items()
    }
    having = {name: found for name, found in having.items() if found}
    if not having:
        return None
    columns = dict.fromkeys(key.split("/", 1)[1] for found in having.values() for h in found for key in h if
                            key.startswith("arsl_alpha/"))  # fmt: skip
    classes = list(columns)[:_CLASSES]
    shown = looks([name for name, _ in comparison.methods()], comparison.baseline)
    figure = new_figure(9.6, 1.0 + 2.0 * len(classes))
    grid = figure.subplots(len(classes), 2, sharex=True, sharey=True, squeeze=False)
    for row, name in enumerate(classes):
        for column, which in enumerate(("alpha", "beta")):
            axes = grid[row, column]
            for method, found in having.items():
                _draw(axes, found, f"arsl_{which}/{name}", shown[method], False, "-")
            weighs = "false voxels" if which == "alpha" else "missed voxels"
            tidy(axes, f"{short(name)}: {which} ({weighs})")
            axes.axhline(0.5, color=INK, linewidth=0.8, linestyle=":")
    for axes in grid[-1]:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    method_legend(figure, {name: shown[name] for name in having})
    return figure


def _draw(
    axes: Axes,
    found: Sequence[History],
    key: str,
    look: Look,
    seconds: bool,
    style: str | tuple[int, tuple[float, ...]],
) -> None:
    lines = [_line(history, key, seconds) for history in found]
    lines = [(x, y) for x, y in lines if np.isfinite(y).any()]
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
    axes.plot(
        x[known],
        y[known],
        linestyle=style,
        color=look.colour,
        linewidth=1.6,
        marker=look.marker,
        markersize=4,
        markevery=max(1, int(known.sum()) // 6),
        label=plain(key),
    )


def _line(history: History, key: str, seconds: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    values = np.array(history.get(key, []), dtype=np.float64)
    if not seconds:
        return np.array(history["epoch"], dtype=np.float64)[: values.size] + 1, values
    spent = np.array(history.get("epoch_seconds", []), dtype=np.float64)
    return (np.cumsum(spent), values) if spent.size == values.size else (np.zeros(0), np.zeros(0))
