"""Figures and tables of docs/results/arsl-cliff.md, from the CSV files that arsl_cliff.py wrote.

python benchmarks/arsl_cliff_figures.py CSV_FOLDER FIGURE_FOLDER > tables.md
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from lightm.evaluation.figures import BLUE, GREEN, GRID, INK, MUTED, ORANGE, PURPLE, VERMILION, new_figure, to_png

EPS_COLOURS = (PURPLE, BLUE, GREEN, ORANGE, VERMILION)
EPS_STYLES = ("-", "--", "-.", ":", "-")
VARIANTS = (("published", "published", BLUE, "-"), ("skip-empty", "skip-empty", VERMILION, "--"))
VARIANTS += (("dice", "cross-entropy + Dice", GREEN, "-."),)
Rows = list[dict[str, str]]


def read_csv(path: Path) -> Rows:
    """Read rows as text, none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def column(rows: Rows, name: str) -> np.ndarray:
    """A column as floats."""
    return np.array([float(row[name]) for row in rows])


def curve_figure(rows: Rows) -> Figure:
    """Loss of an empty region and its slope by ln FP, against FP, a line an eps."""
    figure = new_figure(9.6, 3.4)
    value, slope = figure.subplots(1, 2)
    for eps, colour, style in zip(dict.fromkeys(row["eps"] for row in rows), EPS_COLOURS, EPS_STYLES, strict=True):
        of = [row for row in rows if row["eps"] == eps]
        fp = column(of, "fp_voxels")
        value.plot(fp, column(of, "loss"), style, color=colour, label=f"eps {float(eps):g}")
        slope.plot(fp, column(of, "dloss_dln_fp"), style, color=colour)
    for axes, title, label in (
        (value, "Loss of a region without foreground", "loss"),
        (slope, "Its slope", "d loss / d ln FP"),
    ):
        axes.set_xscale("log")
        finish(axes, title, "soft FP of the region, voxels", label)
    value.legend(frameon=False, fontsize=8)
    return figure


def parts_figure(rows: Rows) -> Figure:
    """For both optimisers: the published loss by parts, the total loss of the variants, and FP of empty regions."""
    figure = new_figure(11.5, 6.2)
    grid = figure.subplots(2, 3)
    for line, optimizer, title in zip(grid, ("adamw", "sgd"), ("AdamW", "SGD"), strict=True):
        of = [row for row in rows if row["run"] == f"{optimizer} published"]
        for name, label, colour, style in (
            ("loss", "total", INK, "-"),
            ("ce", "cross-entropy", GREEN, "-."),
            ("arsl_empty", "ARSL, empty regions", VERMILION, "--"),
            ("arsl_rest", "ARSL, other regions", BLUE, ":"),
        ):
            line[0].plot(column(of, "epoch"), column(of, name), style, color=colour, label=label)
        finish(line[0], f"{title}: published loss by parts", "epoch", "training loss")
        for variant, label, colour, style in VARIANTS:
            of = [row for row in rows if row["run"] == f"{optimizer} {variant}"]
            if not of:
                continue
            line[1].plot(column(of, "epoch"), column(of, "loss"), style, color=colour, label=label)
            line[2].plot(column(of, "epoch"), column(of, "fp_empty_median"), style, color=colour)
        finish(line[1], f"{title}: total loss", "epoch", "training loss")
        line[2].set_yscale("log")
        finish(line[2], f"{title}: FP of an empty region", "epoch", "median, voxels")
        for height, label in ((takeover(1e-5, 8), "takeover"), (1e-5 / 0.7, "eps / 0.7")):
            line[2].axhline(height, color=MUTED, linewidth=0.8, linestyle=":")
            line[2].text(20, height * 1.4, label, color=MUTED, fontsize=8, ha="right")
        for axes in line[:2]:
            axes.set_ylim(bottom=0)
            axes.legend(frameon=False, fontsize=8)
    return figure


def eps_figure(rows: Rows) -> Figure:
    """The empty regions' loss and FP by epoch, a line an eps."""
    figure = new_figure(9.6, 3.4)
    part, fp = figure.subplots(1, 2)
    names = ("adamw eps 1e-07", "adamw published", "adamw eps 0.001", "adamw eps 0.1", "adamw eps 1")
    for name, eps, colour, style in zip(names, (1e-7, 1e-5, 1e-3, 1e-1, 1.0), EPS_COLOURS, EPS_STYLES, strict=True):
        of = [row for row in rows if row["run"] == name]
        if of:
            share = column(of, "arsl_empty") / column(of, "share_empty")
            part.plot(column(of, "epoch"), share, style, color=colour, label=f"eps {eps:g}")
            fp.plot(column(of, "epoch"), column(of, "fp_empty_median"), style, color=colour)
    of = [row for row in rows if row["run"] == "adamw skip-empty"]
    fp.plot(column(of, "epoch"), column(of, "fp_empty_median"), color=MUTED, linewidth=1.0, label="skip-empty")
    fp.set_yscale("log")
    part.axhline(0.5, color=MUTED, linewidth=0.8, linestyle=":")
    part.legend(frameon=False, fontsize=8)
    fp.legend(frameon=False, fontsize=8)
    finish(part, "Mean loss of the empty regions", "epoch", "loss")
    finish(fp, "FP of an empty region", "epoch", "median, voxels")
    part.set_ylim(0, 1.02)
    return figure


def finish(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Title, labels and grid, as in the run's own figures."""
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
    axes.set_xlabel(xlabel, color=MUTED, fontsize=9)
    axes.set_ylabel(ylabel, color=MUTED, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=8.5)
    if xlabel == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_axisbelow(True)
    axes.grid(color=GRID, linewidth=0.8)


def takeover(eps: float, voxels: float, *, classes: int = 2, regions: int = 1) -> float:
    """FP in voxels below which ARSL pushes an empty region's logits harder than mean cross-entropy does.

    Per region ARSL adds loss (1 - loss) / (pairs) to the gradient by the region's mean logit, cross-entropy
    FP / (voxels of the patch); with loss (1 - loss) near eps / ((A+B) FP) both are equal at this FP. `regions`: 1 for
    the mean over regions, their number for the sum.
    """
    return float(np.sqrt(voxels * regions * eps / (0.7 * classes)))


def table(rows: Rows, columns: Sequence[tuple[str, str | Callable[[dict[str, str]], str]]]) -> str:
    """A Markdown table: heading and key (or function of the row) of each column."""
    lines = ["| " + " | ".join(head for head, _ in columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    for row in rows:
        cells = [key(row) if callable(key) else row[key] for _, key in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def fixed(name: str, digits: int) -> Callable[[dict[str, str]], str]:
    """Cell text of a number with this many digits after the point; a dash where there is none."""
    return lambda row: f"{float(row[name]):.{digits}f}" if row[name] else "-"


def short(name: str) -> Callable[[dict[str, str]], str]:
    """Cell text of a number with two significant digits."""
    return lambda row: f"{float(row[name]):.2g}" if row[name] else "-"


def tables(folder: Path) -> str:
    """All tables of the page, as Markdown."""
    points = (1e-7, 1e-5, 1e-3, 1e-1, 1, 10)
    curve = [row for row in read_csv(folder / "curve.csv") if any(np.isclose(float(row["fp_voxels"]), points))]
    wide = [
        {"eps": eps, **{row["fp_voxels"]: row["loss"] for row in curve if row["eps"] == eps}}
        for eps in dict.fromkeys(row["eps"] for row in curve)
    ]
    heads: list[tuple[str, str | Callable[[dict[str, str]], str]]] = [
        (f"FP {float(key):g}", fixed(key, 4)) for key in wide[0] if key != "eps"
    ]
    shares = [row for row in read_csv(folder / "shares.csv") if row["regions_per_axis"] in ("16", "4", "1")]
    text = table(wide, [("eps", "eps"), *heads])
    text += "\n" + table(
        shares,
        [
            ("data", "data"),
            ("patch", "patch"),
            ("regions per axis", "regions_per_axis"),
            ("voxels per region", fixed("voxels_per_region", 1)),
            ("empty", fixed("share_empty", 3)),
            ("by class", "share_empty_by_class"),
            ("empty, samples pooled", lambda row: f"{float(row['share_empty_batch']):.3f} ({row['batch']})"),
        ],
    )
    runs = read_csv(folder / "runs.csv")
    text += "\n" + table(
        [row for row in runs if row["epoch_cliff"]],
        [
            ("run", "run"),
            ("takeover FP", short("fp_takeover")),
            ("cliff without own gradient", "epoch_cliff_without"),
            ("takeover", "epoch_takeover"),
            ("cliff", "epoch_cliff"),
            ("epochs", lambda row: f"{row['fall_from']}-{row['fall_to']}" if row["fall_from"] else "-"),
            ("total", fixed("fall_loss", 3)),
            ("cross-entropy", fixed("fall_ce", 3)),
            ("empty", fixed("fall_empty", 3)),
            ("other", fixed("fall_rest", 3)),
        ],
    )
    last: list[tuple[str, str | Callable[[dict[str, str]], str]]] = [
        (key.replace("_", " "), fixed(key, 3)) for key in ("ce", "dice_liver", "dice_tumour")
    ]
    return text + "\n" + table(runs, [("run", "run"), ("median FP, voxels", short("fp_median")), *last])


def draw(folder: Path, to: Path) -> None:
    """Write the three figures as PNG of 64 colours, which is half the size and looks the same."""
    to.mkdir(parents=True, exist_ok=True)
    epochs = read_csv(folder / "epochs.csv")
    for name, figure in (
        ("curve", curve_figure(read_csv(folder / "curve.csv"))),
        ("parts", parts_figure(epochs)),
        ("eps", eps_figure(epochs)),
    ):
        with Image.open(io.BytesIO(to_png(figure, dpi=100))) as image:
            image.convert("RGB").quantize(64).save(to / f"arsl-cliff-{name}.png", optimize=True)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
    print(tables(Path(sys.argv[1])), end="")
