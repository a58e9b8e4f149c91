"""Curves and the per-case plot, as matplotlib figures without global state.

Every function returns a `Figure`; `to_png` turns one into bytes. Colours are Okabe and Ito's, which people
with any common colour vision can tell apart; each plot also tells its series apart by line or marker.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from lightm.errors import InputError
from lightm.evaluation.evaluation import Evaluation

BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, YELLOW = "#56B4E9", "#CC79A7", "#F0E442"
# The last three mark errors in the overlays, so that they come last here.
CLASS_COLOURS = (ORANGE, GREEN, BLUE, YELLOW, SKY, PURPLE, VERMILION)
INK, MUTED, GRID = "#1F2933", "#6B7785", "#E3E7EB"

History = dict[str, list[float]]

_REQUIRED = ("epoch", "train_loss")


def class_colour(index: int) -> str:
    """Return the colour of the class at this position among the foreground classes."""
    return CLASS_COLOURS[index % len(CLASS_COLOURS)]


def class_patches(classes: Iterable[str]) -> list[Any]:
    """Return what a legend shows of each class."""
    return [Patch(facecolor=class_colour(i), label=plain(name)) for i, name in enumerate(classes)]


def legend_below(figure: Figure, handles: list[Any], *, columns: int, fontsize: float = 8, **more: Any) -> None:
    """Give the figure a legend without a frame below its axes."""
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=fontsize, **more)


def read_history(path: Path) -> History:
    """Read `history.csv` into columns of floats, NaN where a cell is empty; `InputError` if it is none."""
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as CSV: {error}") from error
    if not rows:
        return {}
    if missing := [name for name in _REQUIRED if name not in rows[0]]:
        raise InputError(f"{path}: has no column {', '.join(missing)}; expected a history.csv of `lightm train`")
    columns: History = {name: [] for name in rows[0] if name}
    for number, row in enumerate(rows, start=2):
        for name, values in columns.items():
            cell = row.get(name)
            try:
                values.append(float(cell) if cell else math.nan)
            except ValueError as error:
                raise InputError(f"{path}, line {number}: '{cell}' in column {name} is no number") from error
    if "pseudo_dice_ema" in columns:  # of earlier versions, which averaged otherwise
        columns["pseudo_dice_smoothed"] = columns.pop("pseudo_dice_ema")
    return columns


def curves(history: History) -> Figure:
    """Draw loss, smoothed pseudo Dice beside the Dice of whole cases, learning rate and seconds per epoch."""
    figure = new_figure(9.6, 5.8)
    axes = figure.subplots(2, 2)
    epoch = history["epoch"]
    loss, dice, rate, seconds = axes.flat
    train, val = history.get("train_loss"), history.get("val_loss")
    _lines(loss, epoch, [("training", train, BLUE, "-"), ("validation", val, VERMILION, "--")])
    _finish(loss, "Loss", "loss", legend=True)

    classes = [name for name in history if name.startswith("pseudo_dice/")]
    shown = classes if 1 < len(classes) <= 6 else []
    lines = [(name.split("/", 1)[1], history[name], class_colour(i), ":") for i, name in enumerate(shown)]
    _lines(dice, epoch, [*lines, ("mean", history.get("pseudo_dice"), MUTED, "-")], width=1.0)
    _lines(dice, epoch, [("smoothed mean", history.get("pseudo_dice_smoothed"), INK, "-")], width=2.2)
    _lines(dice, epoch, [("whole cases", history.get("whole_case_dice"), VERMILION, "-")])
    _finish(dice, "Pseudo Dice (patches), whole cases", "Dice", legend=True)
    dice.set_ylim(0, 1)

    _lines(rate, epoch, [("learning rate", history.get("lr"), GREEN, "-")])
    _finish(rate, "Learning rate", "learning rate")
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))

    _lines(seconds, epoch, [("seconds", history.get("epoch_seconds"), PURPLE, "-")])
    _finish(seconds, "Time per epoch", "seconds")
    seconds.set_ylim(bottom=0)
    return figure


def case_strip(evaluation: Evaluation) -> Figure:
    """Draw each class's DSC per case as points over a box (quartiles; whiskers to 1.5 times their range)."""
    names = [summary.class_name for summary in evaluation.classes]
    figure = new_figure(9.6, 1.1 + 0.62 * len(names))
    axes = figure.subplots()
    random = np.random.default_rng(0)  # jitter only: the picture must not change from one call to the next
    for position, name in enumerate(names):
        rows = [row for row in evaluation.rows if row.class_name == name and row.dsc is not None]
        values = np.array([row.dsc for row in rows], dtype=np.float64)
        if not values.size:
            axes.text(0.5, position, "absent in every case", ha="center", va="center", color=MUTED)
            continue
        colour = class_colour(position)
        style: dict[str, Any] = {
            "boxprops": {"facecolor": colour, "alpha": 0.25, "edgecolor": colour},
            "medianprops": {"color": INK, "linewidth": 2},
            **{part: {"color": colour} for part in ("whiskerprops", "capprops")},
        }
        box: dict[str, Any] = {"orientation": "horizontal", "widths": 0.5, "showfliers": False, "patch_artist": True}
        axes.boxplot(values, positions=[position], **box, **style)
        jitter = position + random.uniform(-0.16, 0.16, values.size)
        found = np.array([row.status == "present" for row in rows])
        axes.scatter(values[found], jitter[found], s=20, color=colour, edgecolor=INK, linewidth=0.4, zorder=3)
        axes.scatter(values[~found], jitter[~found], s=30, color=VERMILION, marker="x", zorder=3)
    if any(row.status in ("missed", "spurious") for row in evaluation.rows):
        axes.scatter([], [], s=30, color=VERMILION, marker="x", label="missed or spurious (DSC 0)")
        axes.legend(frameon=False, loc="lower left", fontsize=8)
    axes.set_yticks(range(len(names)), [plain(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    low = min((row.dsc for row in evaluation.rows if row.dsc is not None), default=0.0)
    axes.set_xlim(max(-0.02, min(0.5, math.floor(low * 10) / 10) - 0.02), 1.01)
    axes.set_xlabel("DSC")
    tidy(axes, grid="x")
    return figure


def new_figure(width: float, height: float) -> Figure:
    """Return an empty white figure of this size in inches with an Agg canvas and no tie to pyplot."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Figure, *, dpi: int = 120) -> bytes:
    """Render to the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def plain(text: str) -> str:
    """Return the text with dollar signs escaped: names come from files and are no formulas."""
    return text.replace("$", r"\$")


_Series = tuple[str, Sequence[float] | None, str, str]  # name, values, colour, line


def _lines(axes: Axes, epoch: Sequence[float], series: Sequence[_Series], *, width: float = 1.6) -> None:
    for name, values, colour, style in series:
        if values is None:
            continue
        x, y = np.asarray(epoch), np.asarray(values)
        defined = np.isfinite(x) & np.isfinite(y)
        if defined.any():
            # A line of one point is invisible; an epoch without validation must not cut the line.
            marker = "o" if defined.sum() < 3 else None
            axes.plot(x[defined], y[defined], style, color=colour, label=plain(name), linewidth=width, marker=marker)


def _finish(axes: Axes, title: str, ylabel: str, *, legend: bool = False) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
    axes.set_xlabel("epoch")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axes)
    if not axes.lines:
        axes.text(0.5, 0.5, "not recorded", ha="center", va="center", color=MUTED, transform=axes.transAxes)
    elif legend:
        axes.legend(frameon=False, fontsize=8)


def tidy(axes: Axes, *, grid: Literal["both", "x", "y"] = "both") -> None:
    """Give axes the look of all figures: no frame, muted labels, a pale grid."""
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=8.5)
    axes.xaxis.label.set(color=MUTED, fontsize=9)
    axes.yaxis.label.set(color=MUTED, fontsize=9)
