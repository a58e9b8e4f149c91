"""Looks that all figures of a comparison share: each method's colour and marker, axes, and saving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightm.evaluation.figures import BLUE, GREEN, GRID, INK, MUTED, ORANGE, PURPLE, SKY, VERMILION, plain, to_png
from lightm.files import atomic_file

# Okabe and Ito's, then four of Paul Tol's muted ones; the marker tells apart what a reader cannot.
_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, "#882255", "#332288", "#999933", "#661100", "#44AA99")
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


def tidy(axes: Axes, title: str = "", *, grid: str = "both") -> None:
    """The report's look: no frame, a pale grid, a bold title on the left."""
    if title:
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=8.5)
    axes.xaxis.label.set(color=MUTED, fontsize=9)
    axes.yaxis.label.set(color=MUTED, fontsize=9)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)  # type: ignore[arg-type]


def save(figure: Figure, path: Path, *, vector: bool = True) -> bytes:
    """Write `path`.png, with `vector` also `path`.svg, and return the PNG's bytes; equal figures give equal files."""
    picture = to_png(figure)
    with atomic_file(path.with_name(path.name + ".png")) as file:
        file.write(picture)
    if vector:
        with (
            matplotlib.rc_context({"svg.hashsalt": "lightm"}),
            atomic_file(path.with_name(path.name + ".svg")) as file,
        ):
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return picture
