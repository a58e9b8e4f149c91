"""The comparison of networks as a picture: bubbles of their parameters over operations, and Dice where runs exist."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from lightm.errors import InputError
from lightm.evaluation.figures import BLUE, INK, MUTED, VERMILION, new_figure, plain, tidy, to_png
from lightm.evaluation.run_folder import read_run
from lightm.files import atomic_file, write_text
from lightm.lab.complexity.report import Dice, Row, as_csv, as_markdown
from lightm.nets.presets import PRESETS

_SMALLEST = 5.0  # points: the diameter below which a bubble is not seen
_LARGEST = 56.0  # points: the diameter of the network with most parameters


def read_dice(folders: Sequence[Path]) -> dict[str, list[Dice]]:
    """Return the test scores of run folders by the name of their network: the mean Dice over classes.

    A folder without an evaluation of its own stands for the scored runs directly in it. Of several runs of one network
    on one data set the last counts. Raises InputError for a folder without a scored run, and for a run that names no
    network.
    """
    found: dict[str, dict[str, Dice]] = {}
    for run_dir in _scored_runs(folders):
        run = read_run(run_dir)
        network = run.model.get("network") or run.config.get("network")
        name = network.get("name") if isinstance(network, Mapping) else network
        if not isinstance(name, str):
            raise InputError(f"{run_dir}: neither model/model.json nor config.yaml names the network of this run")
        if run.evaluation is None or run.evaluation.overall.dsc.mean is None:
            raise InputError(f"{run_dir / 'evaluation' / 'metrics.json'}: holds no Dice of any class")
        data = run.plan.get("dataset") or Path(str(run.config.get("dataset", run_dir))).name
        dsc = run.evaluation.overall.dsc
        found.setdefault(name, {})[str(data)] = Dice(str(data), float(dsc.mean or 0.0), dsc.low, dsc.high)
    return {name: list(scores.values()) for name, scores in found.items()}


def _scored_runs(folders: Sequence[Path]) -> list[Path]:
    runs = []
    for folder in map(Path, folders):
        scores = Path("evaluation", "metrics.json")
        inside = [folder] if (folder / scores).is_file() else sorted(p.parents[1] for p in folder.glob(f"*/{scores}"))
        if not inside:
            raise InputError(
                f"{folder}: neither a run with scores (evaluation/metrics.json) nor a folder of such runs; make scores "
                "with `lightm evaluate RUN`"
            )
        runs += inside
    return runs


def write_comparison(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the comparison as comparison.csv, comparison.md and comparison.png, and return their paths."""
    folder = Path(folder)
    paths = [folder / f"comparison.{kind}" for kind in ("csv", "md", "png")]
    write_text(paths[0], as_csv(rows))
    write_text(paths[1], as_markdown(rows))
    with atomic_file(paths[2]) as file:
        file.write(to_png(comparison_figure(rows)))
    return paths


def comparison_figure(
    rows: Sequence[Row], *, colours: Mapping[str, str] | None = None, counted: str = "one image"
) -> Figure:
    """Draw networks: with scores Dice over operations, a panel for each data set; without them operations alone.

    `colours` by name replace those that tell presets from baselines; `counted` is what the operations are of. Raises
    InputError when all networks refuse the size.
    """
    drawn = [row for row in rows if not row.refused]
    if not drawn:
        raise InputError("no network to draw: all refuse this size")
    data = list(dict.fromkeys(dice.data for row in drawn for dice in row.dice))
    return _bubbles(drawn, data, colours, counted) if data else _points(drawn)


def _diameter(parameters: int, most: int) -> float:
    """Diameter in points: the area is proportional to the parameters."""
    return max(_SMALLEST, _LARGEST * math.sqrt(parameters / most))


def _colour(name: str) -> str:
    return BLUE if name in PRESETS else VERMILION


def _points(rows: Sequence[Row]) -> Figure:
    """One line for each network, fewest operations on top; every bubble stands at its operations."""
    rows = sorted(rows, key=lambda row: -row.multiply_adds)
    most = max(row.parameters for row in rows)
    places, height = [], 0.0
    for row in rows:
        step = max(24.0, _diameter(row.parameters, most) + 3)  # points of height of its line
        places.append(height + step / 2)
        height += step
    figure = new_figure(9.6, height / 72 + 1.9)
    axes = figure.subplots()
    for row, place in zip(rows, places, strict=True):
        size, colour = _diameter(row.parameters, most), _colour(row.name)
        adds = row.multiply_adds / 1e9
        axes.plot([adds], [place], "o", ms=size, mfc=colour, mec=colour, alpha=0.35, mew=0)
        axes.plot([adds], [place], "o", ms=2.5, color=colour)
        text, beside = f"{_millions(row.parameters)}, {_short(adds)} G", (size / 2 + 5, 0)
        axes.annotate(text, (adds, place), beside, textcoords="offset points", va="center", fontsize=8, color=INK)
    axes.set_ylim(0, height)
    axes.set_yticks(places, [plain(row.name) for row in rows])
    _operations_axis(axes, [row.multiply_adds / 1e9 for row in rows], room_right=5.0)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0, labelsize=9)
    _legend(figure, rows, most)
    return figure


def _bubbles(rows: Sequence[Row], data: Sequence[str], colours: Mapping[str, str] | None, counted: str) -> Figure:
    """Dice over operations for every data set, the interval as a line."""
    figure = new_figure(9.6, 5.6 * len(data))
    panels = figure.subplots(len(data), 1, squeeze=False)[:, 0]
    rows = [row for row in rows if row.dice]
    most = max(row.parameters for row in rows)
    for axes, name in zip(panels, data, strict=True):
        scored = [(row, dice) for row in rows for dice in row.dice if dice.data == name]
        bounds = [value for _, dice in scored for value in (dice.value, dice.low, dice.high) if value is not None]
        spread = max(max(bounds) - min(bounds), 0.02)
        axes.set_ylim(min(bounds) - 0.25 * spread, min(1.0, max(bounds)) + 0.25 * spread)
        _operations_axis(axes, [row.multiply_adds / 1e9 for row, _ in scored], room_right=2.0, counted=counted)
        for row, dice in scored:
            x, size = row.multiply_adds / 1e9, _diameter(row.parameters, most)
            colour = _colour(row.name) if colours is None else colours[row.name]
            if dice.low is not None and dice.high is not None:
                axes.plot([x, x], [dice.low, dice.high], "-", color=colour, linewidth=1.0, alpha=0.5)
            axes.plot([x], [dice.value], "o", ms=size, mfc=colour, mec=colour, alpha=0.35, mew=0)
            axes.plot([x], [dice.value], "o", ms=3, color=colour)
        axes.set_title(plain(name), loc="left", fontsize=10.5, fontweight="bold", color=INK)
        axes.set_ylabel("mean Dice of the test cases, 95% interval")
    _legend(figure, rows, most, origins=colours is None)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # labels are placed in points from here on
    for axes, name in zip(panels, data, strict=True):
        _place_labels(axes, [(row, dice) for row in rows for dice in row.dice if dice.data == name], most)
    return figure


def _operations_axis(axes: Axes, values: Sequence[float], *, room_right: float, counted: str = "one image") -> None:
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 2.2, max(values) * room_right)
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"multiply-adds of {counted}, 1e9, the scan included (logarithmic)")
    tidy(axes)


def _legend(figure: Figure, rows: Sequence[Row], most: int, *, origins: bool = True) -> None:
    """One line below the panels: what the areas and, with `origins`, the colours mean."""
    handles = [Line2D([], [], linestyle="", label="area: parameters")]
    for number in _round_numbers(most):
        look = {"ms": _diameter(number, most), "mfc": "none", "mec": MUTED}
        handles.append(Line2D([], [], marker="o", linestyle="", label=_millions(number), **look))  # type: ignore[arg-type]
    for own, text in ((True, "LightM's presets"), (False, "baselines")):
        if origins and any((row.name in PRESETS) == own for row in rows):
            colour = BLUE if own else VERMILION
            handles.append(Line2D([], [], marker="o", linestyle="", color=colour, alpha=0.6, label=text))
    gaps = {"borderpad": 1.5, "columnspacing": 1.2, "handlelength": 2.5, "handletextpad": 0.6}
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False, **gaps)


def _round_numbers(most: int) -> list[int]:
    """Two numbers of parameters to explain the areas with: powers of ten whose bubbles fit a line of the legend."""
    top = 10 ** math.floor(math.log10(max(most, 100)))
    while top > 100 and _diameter(top, most) > 26:
        top //= 10
    return [top // 10, top]


def _millions(parameters: int) -> str:
    value = parameters / 1e6
    return f"{value:.0f} M" if value >= 10 else f"{value:.1f} M" if value >= 1 else f"{value:.2f} M"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _place_labels(axes: Axes, scored: Sequence[tuple[Row, Dice]], most: int) -> None:
    """Write every name beside its bubble where it covers no other name or bubble; a line leads to far ones."""
    points = axes.get_figure(root=True).dpi / 72  # type: ignore[union-attr]
    inside = axes.get_window_extent()
    circles = []
    for row, dice in scored:
        x, y = axes.transData.transform((row.multiply_adds / 1e9, dice.value))
        circles.append((x, y, points * _diameter(row.parameters, most) / 2))
    taken: list[Bbox] = []
    for (row, _), (x, y, radius) in sorted(zip(scored, circles, strict=True), key=lambda item: -item[1][2]):
        label = f"{plain(row.name)}\n{_millions(row.parameters)}"
        probe = axes.text(0, 0, label, fontsize=8)
        width, height = probe.get_window_extent().width, probe.get_window_extent().height
        probe.remove()
        best: tuple[float, Bbox, int] | None = None
        for ring in range(6):
            away = radius + points * (4 + 14 * ring)
            for step in range(12):
                angle = math.pi * step / 6
                left = x + away * math.cos(angle) - width * (1 - math.cos(angle)) / 2
                bottom = y + away * math.sin(angle) - height * (1 - math.sin(angle)) / 2
                box = Bbox.from_bounds(left, bottom, width, height)
                cost = 30.0 * ring + sum(_overlap(box, other) for other in taken)
                # a name over a pale area can be read, one over a centre hides it
                for reach, weight in ((1.0, 0.1), (0.0, 20.0)):
                    for a, b, r in circles:
                        r = max(reach * r, 4 * points)
                        cost += weight * _overlap(box, Bbox.from_bounds(a - r, b - r, 2 * r, 2 * r))
                cost += 1e6 * (box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1)
                if best is None or cost < best[0]:
                    best = (cost, box, ring)
        if best is None:
            continue
        _, box, ring = best
        taken.append(box)
        centre = ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
        to_data = axes.transData.inverted()
        line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.7, "shrinkB": 2, "relpos": (0.5, 0.5)}
        at, to = (tuple(to_data.transform(point)) for point in ((x, y), centre))
        halo = [withStroke(linewidth=2.5, foreground="white")]
        look: dict[str, Any] = {"fontsize": 8, "color": INK, "ha": "center", "va": "center", "path_effects": halo}
        axes.annotate(label, at, to, arrowprops=line if ring else None, **look)


def _overlap(one: Bbox, other: Bbox) -> float:
    """Area that two boxes share, in pixels."""
    shared = Bbox.intersection(one, other)
    return 0.0 if shared is None else shared.width * shared.height
