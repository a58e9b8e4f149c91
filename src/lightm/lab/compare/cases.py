"""The same test case by every configuration: read, chosen, and drawn as slices and surfaces."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from lightm.evaluation import pictures
from lightm.evaluation.figures import INK, class_colour, new_figure, plain
from lightm.lab.compare.figures import case_table, short
from lightm.lab.compare.results import Summary
from lightm.lab.compare.statistics import finite_mean
from lightm.labels import Values

_SURFACES = 5  # methods drawn as surfaces beside the label: each takes about half a second


@dataclass(frozen=True)
class ChosenCase:
    """A case to show: why, and every method's DSC (mean over seeds and over the classes defined in it)."""

    what: str
    case: str
    dsc: dict[str, float]


def choose_cases(summary: Summary) -> list[ChosenCase]:
    """Worst, median and best case of the baseline, and that with the largest difference between two methods.

    Where the baseline has no result the first method stands for it. One case may be several of these.
    """
    table = case_dsc(summary)
    names = [method.name for method in summary.methods]
    reference = next((i for i, method in enumerate(summary.methods) if method.is_baseline), 0)
    ranked = [int(i) for i in np.argsort(table[reference], kind="stable") if np.isfinite(table[reference, i])]
    if not ranked:
        return []
    places: dict[int, list[str]] = {}
    for what, place in (("worst", 0), ("median", (len(ranked) - 1) // 2), ("best", len(ranked) - 1)):
        places.setdefault(ranked[place], []).append(what)
    words = {i: f"{' and '.join(what)} case of {names[reference]}" for i, what in places.items()}
    if len(ranked) == 1:
        words = {ranked[0]: "the only case"}
    spread = np.array([np.ptp(c[np.isfinite(c)]) if np.isfinite(c).any() else -1.0 for c in table.T])
    if len(names) > 1:
        largest = int(spread.argmax())
        words[largest] = (f"{words[largest]}, and " if largest in words else "") + "largest difference between methods"
    return [
        ChosenCase(
            what,
            summary.test_cases[i],
            {name: float(dsc) for name, dsc in zip(names, table[:, i], strict=True) if math.isfinite(dsc)},
        )
        for i, what in words.items()
    ]


def case_dsc(summary: Summary) -> NDArray[np.float64]:
    """(methods, cases): mean DSC over the defined classes, NaN where none is."""
    return finite_mean(np.stack(list(case_table(summary).values())), 0)


def case_slices(
    image: NDArray[Any],
    label: NDArray[Any],
    predictions: Mapping[str, NDArray[Any]],
    dsc: Mapping[str, float],
    spacing_mm: Sequence[float],
    classes: Mapping[str, Values],
    *,
    window: tuple[float, float] | None = None,
) -> Figure:
    """Draw one slice by every method: contours above, errors below; the first column is the image with its label.

    Arrays of one shape, (Z, Y, X) in closest-RAS orientation or (Y, X). In 3D the slice is across the coarsest axis
    (axial where all are alike), where the label's area is largest; slice and cut-out are the same for all methods.
    """
    values = list(classes.values())
    note = letters = ""
    if label.ndim == 3:
        axis = int(np.argmax(np.round(spacing_mm, 3)))
        name, _, letters = next(plane for plane in pictures.PLANES if plane[1] == axis)
        guide = label if pictures.any_of(label, values).any() else next(iter(predictions.values()), label)
        index = pictures.best_slice(guide, guide, values, axis)
        note = f"{name} slice {index + 1} of {label.shape[axis]}"
        image, label = (np.take(array, index, axis=axis)[::-1, ::-1] for array in (image, label))
        predictions = {method: np.take(pred, index, axis=axis)[::-1, ::-1] for method, pred in predictions.items()}
        spacing_mm = [s for i, s in enumerate(spacing_mm) if i != axis]
    spacing = (float(spacing_mm[0]), float(spacing_mm[1]))
    shown = np.logical_or.reduce([pictures.any_of(array, values) for array in (label, *predictions.values())])
    box = pictures._crop_box(shown, spacing)
    titles = [("label", label), *predictions.items()]
    columns = min(len(titles), 4 if len(titles) < 5 else 5 if len(titles) < 11 else 7)
    blocks = -(-len(titles) // columns)
    rows, width = label[box].shape[0] * spacing[0], label[box].shape[1] * spacing[1]
    side = 9.6 / columns
    figure = new_figure(9.6, 0.6 + blocks * (2 * side * min(1.6, rows / width) + 0.6))
    grid = figure.subplots(2 * blocks, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    styles: list[tuple[str, Any]] = [("label", "-"), ("prediction", _DASHES)]
    for number, (title, pred) in enumerate(titles):
        row, column = 2 * (number // columns), number % columns
        view = pictures._View(image[box], label[box], pred[box], spacing)
        upper, lower = grid[row, column], grid[row + 1, column]
        heading = title if number == 0 else f"{_broken(title, 100 // columns)}\nDSC {_number(dsc.get(title))}"
        pictures._show(upper, view, window, heading if number else f"{heading}\n{note}")
        pictures._contours(upper, view, values, styles if number else styles[:1])
        if number == 0:
            pictures._show(lower, view, window, "")  # the bare image, where the others have their errors
            if letters:
                pictures._letters(upper, letters)
        else:
            pictures._show(lower, view, window, "", fade=True)
            pictures._differences(lower, view, values)
        for axes, anchor in ((upper, "S"), (lower, "N")):
            axes.set_anchor(anchor)
            axes.title.set_fontsize(8.5 if columns < 7 else 7)
    errors = [(colour, text) for colour, text in pictures._ERRORS if text != "wrong class" or len(classes) > 1]
    handles: list[Any] = [Patch(fc=class_colour(i), label=plain(name)) for i, name in enumerate(list(classes)[:7])]
    handles += [Line2D([], [], color=INK, ls=style, label=text) for text, style in styles]
    handles += [Patch(fc=colour, label=text) for colour, text in errors]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=8, columnspacing=1.3)
    return figure


def case_surfaces(
    label: NDArray[Any],
    predictions: Mapping[str, NDArray[Any]],
    spacing_mm: Sequence[float],
    classes: Mapping[str, Values],
) -> tuple[Figure, int]:
    """Draw the label and the first five methods as surfaces; also returns how many methods were left out."""
    chosen = dict(list(predictions.items())[:_SURFACES])
    masks = {"label": label, **{short(name, 30): pred for name, pred in chosen.items()}}
    columns = len(masks) if len(masks) <= 4 else 3
    figure = pictures.surfaces_figure(masks, spacing_mm, classes, columns=columns, max_voxels=36)
    return figure, len(predictions) - len(chosen)


_DASHES: Any = (0, (2, 1.2))


def _broken(name: str, width: int) -> str:
    """A name on at most two lines, as the columns are narrow."""
    lines = textwrap.wrap(name, width) or [""]
    return plain(lines[0]) if len(lines) == 1 else f"{plain(lines[0])}\n{short(' '.join(lines[1:]), width)}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
