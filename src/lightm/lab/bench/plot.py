"""Time and peak memory over size, on logarithmic axes beside a line that grows linearly with the voxels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightm.errors import InputError
from lightm.files import replacing

if TYPE_CHECKING:
    from lightm.lab.bench.records import Row

FORMATS = (".svg", ".png", ".pdf")


def check_plot(path: Path | str) -> None:
    """Raise InputError unless the name ends in .svg, .png or .pdf."""
    if Path(path).suffix.lower() not in FORMATS:
        raise InputError(f"{path}: a plot is written as {', '.join(FORMATS)}; name the file so")


def draw_scaling(rows: Sequence[Row], path: Path | str) -> None:
    """Draw time and peak memory of the `scaling` rows over the number of voxels; the file's ending is its format.

    Both axes are logarithmic; the dashed line through each network's largest size grows linearly with the voxels, so
    a curve above it at the left is fixed cost, one that is steeper is worse than linear. Raises InputError without
    scaling rows of two sizes or for an unknown ending, LightMError when the file cannot be written.
    """
    check_plot(path)
    chosen = [row for row in rows if row.level == "scaling"]
    if len({row.edge for row in chosen}) < 2:
        raise InputError("scaling plot: rows of two sizes or more are needed; run `lightm bench scaling`")
    from matplotlib.figure import Figure  # a figure of its own: no window system, no global state

    figure = Figure(figsize=(9, 4), layout="constrained")
    names = list(dict.fromkeys((row.case, row.mode) for row in chosen))
    modes = {mode for _, mode in names}
    for axes, column, label in zip(figure.subplots(1, 2), ("p50_s", "peak_mb"), ("seconds", "peak MB"), strict=True):
        ticks: dict[int, str] = {}
        for index, (name, mode) in enumerate(names):
            points = sorted(
                (row.edge**3, value)
                for row in chosen
                if (row.case, row.mode) == (name, mode) and (value := getattr(row, column)) is not None
            )
            if not points:
                continue
            voxels, values = zip(*points, strict=True)
            color = f"C{index}"
            shown = name if len(modes) == 1 else f"{name}, {mode}"
            axes.plot(voxels, values, "o-", color=color, label=shown)
            axes.plot(voxels, [values[-1] * v / voxels[-1] for v in voxels], "--", color=color, alpha=0.5, linewidth=1)
            ticks.update({v: f"{round(v ** (1 / 3))}³" for v in voxels})
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(sorted(ticks), [ticks[v] for v in sorted(ticks)], minor=False)
        axes.minorticks_off()
        axes.set_xlabel("voxels")
        axes.set_ylabel(f"{label}{'' if len(modes) > 1 else ', ' + next(iter(modes))}")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(title="dashed: linear in the voxels", title_fontsize="small", fontsize="small")
    first = chosen[0]
    figure.suptitle(
        f"{first.cpu}, {first.threads} threads, LightM {first.lightm}, torch {first.torch}", fontsize="small"
    )
    kind = Path(path).suffix.lower().lstrip(".")
    with replacing(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=150)
