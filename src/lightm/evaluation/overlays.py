"""One case as slices: image with the contours of label and prediction, and where the two differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from skimage.measure import find_contours

from lightm.evaluation.figures import INK, PURPLE, SKY, VERMILION, class_colour, class_patches, legend_below, new_figure
from lightm.labels import bounding_box

# Radiological convention for a (Z, Y, X) array whose axes run to superior, anterior and right: the patient's
# right is on the reader's left, superior (axial: anterior) is up. name, sliced axis, letters left/right/top/bottom.
PLANES = (("axial", 0, "RLAP"), ("coronal", 1, "RLSI"), ("sagittal", 2, "APSI"))

MISSED, SPURIOUS, WRONG_CLASS = VERMILION, SKY, PURPLE
_ERRORS = ((MISSED, "missed (label only)"), (SPURIOUS, "spurious (prediction only)"), (WRONG_CLASS, "wrong class"))


def best_slice(label: NDArray[Any], pred: NDArray[Any], values: Sequence[int], axis: int) -> int:
    """Return the slice across `axis` with the largest area of label and prediction, the middle one without foreground.

    Areas are summed over classes as fractions of each class's largest slice, so that a tumour counts as much as the
    organ around it.
    """
    others = tuple(i for i in range(label.ndim) if i != axis)
    arrays = (label,) if pred is label else (label, pred)
    score = np.zeros(label.shape[axis])
    for value in values:
        area = sum(np.count_nonzero(array == value, axis=others) for array in arrays) * 1.0
        if area.max() > 0:
            score += area / area.max()
    return int(score.argmax()) if score.max() > 0 else label.shape[axis] // 2


def overlay(
    image: NDArray[Any],
    label: NDArray[Any],
    pred: NDArray[Any],
    spacing_mm: Sequence[float],
    classes: dict[str, int],
    *,
    window: tuple[float, float] | None = None,
) -> Figure:
    """Draw a case: one column per plane in 3D (axial, coronal, sagittal), one row in 2D.

    All arrays have one shape: (Z, Y, X) in closest-RAS orientation, or (Y, X) as stored. Slices are those of
    `best_slice`, cut to the structures with a margin, at the aspect of `spacing_mm`. `window` is the shown range of
    intensities (default: percentiles 1 and 99 of what is shown).
    """
    values = list(classes.values())
    if label.ndim == 2:
        figure = new_figure(9.6, 3.9)
        grid = figure.subplots(1, 3)
        view = _view(image, label, pred, values, tuple(spacing_mm), flip=False)
        _show(grid[0], view, window, "image")
        _show(grid[1], view, window, "contours")
        _contours(grid[1], view, values)
        _show(grid[2], view, window, "differences", fade=True)
        _differences(grid[2], view, values)
    else:
        figure = new_figure(9.6, 6.9)
        grid = figure.subplots(2, 3)
        for column, (plane, axis, letters) in enumerate(PLANES):
            index = best_slice(label, pred, values, axis)
            rest = tuple(s for i, s in enumerate(spacing_mm) if i != axis)
            cut = [np.take(array, index, axis=axis) for array in (image, label, pred)]
            view = _view(cut[0], cut[1], cut[2], values, rest, flip=True)
            title = f"{plane}, slice {index + 1} of {label.shape[axis]}"
            _show(grid[0, column], view, window, title)
            _contours(grid[0, column], view, values)
            _show(grid[1, column], view, window, "differences", fade=True)
            _differences(grid[1, column], view, values)
            for axes, anchor in zip(grid[:, column], "SN", strict=True):
                axes.set_anchor(anchor)  # the two pictures of one slice belong together
                _letters(axes, letters)
    handles = [
        *class_patches(list(classes)[:7]),
        *(Line2D([], [], color=INK, ls=style, label=kind) for kind, style in _BOTH),
        *(Patch(facecolor=c, label=text) for c, text in _ERRORS if text != "wrong class" or len(classes) > 1),
    ]
    legend_below(figure, handles, columns=min(len(handles), 8), columnspacing=1.3, handlelength=1.6)
    return figure


def overlay_prediction(
    slices: Sequence[tuple[str, NDArray[Any], NDArray[Any], tuple[float, float]]], classes: dict[str, int]
) -> Figure:
    """Draw a prediction that has no label to compare it with: each slice whole above, cut to its structures below.

    slices: (title, image, pred, spacing_mm) with arrays (rows, columns). Titles that start with the name of a plane of
    PLANES are slices across its axis of a closest-RAS volume: they are turned upright and get the plane's letters;
    others are drawn as stored. classes: as in `overlay`. Memory: that of the slices, in float64.
    """
    values = list(classes.values())
    figure = new_figure(3.2 * max(2, len(slices)), 6.9)
    grid = figure.subplots(2, len(slices), squeeze=False)
    for column, (title, image, pred, spacing) in enumerate(slices):
        letters = next((plane[2] for plane in PLANES if title.startswith(plane[0])), None)
        if letters is not None:
            image, pred = image[::-1, ::-1], pred[::-1, ::-1]
        close = _view(image, pred, pred, values, spacing, flip=False)
        for axes, view, heading in (
            (grid[0, column], _View(image, pred, pred, spacing), title),
            (grid[1, column], close, "close-up" if np.isin(pred, values).any() else "nothing found here"),
        ):
            _show(axes, view, None, heading)
            _contours(axes, view, values, (("prediction", "-"),))
            if letters is not None:
                _letters(axes, letters)
    legend_below(figure, class_patches(classes), columns=min(len(classes), 6))
    return figure


class _View(NamedTuple):
    """One slice as it is drawn: arrays with row 0 on top, and the size of a pixel."""

    image: NDArray[Any]
    label: NDArray[Any]
    pred: NDArray[Any]
    spacing: tuple[float, float]

    @property
    def extent(self) -> tuple[float, float, float, float]:
        rows, columns = self.label.shape
        return (0.0, columns * self.spacing[1], rows * self.spacing[0], 0.0)


def _view(
    image: NDArray[Any],
    label: NDArray[Any],
    pred: NDArray[Any],
    values: Sequence[int],
    spacing: tuple[float, ...],
    *,
    flip: bool,
) -> _View:
    if flip:
        image, label, pred = (array[::-1, ::-1] for array in (image, label, pred))
    box = _crop_box(np.isin(label, values) | np.isin(pred, values), spacing)
    return _View(image[box], label[box], pred[box], (spacing[0], spacing[1]))


def _crop_box(mask: NDArray[np.bool_], spacing: tuple[float, ...]) -> tuple[slice, slice]:
    """Return a nearly square window around the mask: small structures in a large scan stay visible."""
    if not mask.any():
        return slice(None), slice(None)
    bounds = [(part.start, part.stop) for part in bounding_box(mask)]
    side = max(1.35 * max((b - a) * s for (a, b), s in zip(bounds, spacing, strict=True)), 32 * min(spacing))
    box = []
    for (a, b), s, size in zip(bounds, spacing, mask.shape, strict=True):
        margin = max(0, round((side / s - (b - a)) / 2))
        box.append(slice(max(0, a - margin), min(size, b + margin)))
    return box[0], box[1]


def _show(axes: Axes, view: _View, window: tuple[float, float] | None, title: str, *, fade: bool = False) -> None:
    finite = view.image[np.isfinite(view.image)]
    low, high = window or (np.percentile(finite, [1, 99]) if finite.size else (0.0, 1.0))
    if high <= low:
        high = low + 1.0
    grey = np.clip((view.image.astype(np.float64) - low) / (high - low), 0.0, 1.0)
    if fade:  # the differences are the message there, the image only says where one is
        grey = 0.35 * grey + 0.1
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=view.extent, interpolation="nearest")
    axes.set_title(title, fontsize=9, color=INK)
    axes.set_axis_off()


_BOTH: tuple[tuple[str, Any], ...] = (("label", "-"), ("prediction", (0, (2, 1.2))))


def _contours(axes: Axes, view: _View, values: Sequence[int], kinds: Sequence[tuple[str, Any]] = _BOTH) -> None:
    width = 1.7
    for i, value in enumerate(values):
        for kind, style in kinds:
            array = view.label if kind == "label" else view.pred
            # A frame of background closes the contours of what touches the edge of the slice.
            paths = find_contours(np.pad(array == value, 1).astype(np.float64), 0.5)
            lines = [
                np.stack([(p[:, 1] - 0.5) * view.spacing[1], (p[:, 0] - 0.5) * view.spacing[0]], axis=1) for p in paths
            ]
            if lines:
                # Beside a label the prediction is lighter, alone it has the full colour.
                colour: tuple[float, ...] = to_rgb(class_colour(i))
                if kind != kinds[0][0]:
                    colour = tuple(0.45 * channel + 0.55 for channel in colour)
                axes.add_collection(
                    LineCollection(
                        lines,
                        colors=colour,
                        linestyles=[style],
                        linewidths=width,
                        label=f"{kind} {value}",
                        path_effects=[withStroke(linewidth=width + 1.3, foreground=(0, 0, 0, 0.55))],
                    ),
                    autolim=False,
                )


def _differences(axes: Axes, view: _View, values: Sequence[int]) -> None:
    in_label, in_pred = np.isin(view.label, values), np.isin(view.pred, values)
    picture = np.zeros((*view.label.shape, 4))
    picture[in_label & in_pred] = (1.0, 1.0, 1.0, 0.28)
    picture[in_label & ~in_pred] = to_rgba(MISSED)
    picture[in_pred & ~in_label] = to_rgba(SPURIOUS)
    picture[in_label & in_pred & (view.label != view.pred)] = to_rgba(WRONG_CLASS)
    axes.imshow(picture, extent=view.extent, interpolation="nearest")


def _letters(axes: Axes, letters: str) -> None:
    places = (
        (0.02, 0.5, "left", "center"),
        (0.98, 0.5, "right", "center"),
        (0.5, 0.98, "center", "top"),
        (0.5, 0.02, "center", "bottom"),
    )
    for letter, (x, y, horizontal, vertical) in zip(letters, places, strict=True):
        style: dict[str, Any] = {
            "ha": horizontal,
            "va": vertical,
            "color": "white",
            "fontsize": 9,
            "fontweight": "bold",
        }
        box = {"facecolor": "black", "alpha": 0.55, "pad": 1.2, "edgecolor": "none"}
        axes.text(x, y, letter, transform=axes.transAxes, bbox=box, **style)
