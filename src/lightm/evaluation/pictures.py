"""One case as pictures: slices with contours of label and prediction, where the two differ, and shaded surfaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from numpy.typing import NDArray
from scipy import ndimage
from skimage.measure import block_reduce, find_contours, marching_cubes

from lightm.evaluation import figures
from lightm.evaluation.figures import INK, MUTED, class_colour, class_patches, legend_below, new_figure
from lightm.labels import Values, bounding_box, each_value, mask_of

# Radiological convention for a (Z, Y, X) array whose axes run to superior, anterior and right: the patient's
# right is on the reader's left, superior (axial: anterior) is up. name, sliced axis, letters left/right/top/bottom.
PLANES = (("axial", 0, "RLAP"), ("coronal", 1, "RLSI"), ("sagittal", 2, "APSI"))

MISSED, SPURIOUS, WRONG_CLASS = figures.VERMILION, figures.SKY, figures.PURPLE
_ERRORS = ((MISSED, "missed (label only)"), (SPURIOUS, "spurious (prediction only)"), (WRONG_CLASS, "wrong class"))


def best_slice(label: NDArray[Any], pred: NDArray[Any], values: Sequence[Values], axis: int) -> int:
    """Return the slice across `axis` with the largest area of label and prediction, the middle one without foreground.

    Areas are summed over classes as fractions of each class's largest slice, so that a tumour counts as much as the
    organ around it.
    """
    others = tuple(i for i in range(label.ndim) if i != axis)
    arrays = (label,) if pred is label else (label, pred)
    score = np.zeros(label.shape[axis])
    for value in values:
        area = sum(np.count_nonzero(mask_of(array, value), axis=others) for array in arrays) * 1.0
        if area.max() > 0:
            score += area / area.max()
    return int(score.argmax()) if score.max() > 0 else label.shape[axis] // 2


def any_of(array: NDArray[Any], values: Sequence[Values]) -> NDArray[np.bool_]:
    """Where an array holds a value of any class or region."""
    return np.isin(array, [one for value in values for one in each_value(value)])


def overlay(
    image: NDArray[Any],
    label: NDArray[Any],
    pred: NDArray[Any],
    spacing_mm: Sequence[float],
    classes: Mapping[str, Values],
    *,
    window: tuple[float, float] | None = None,
) -> Figure:
    """Draw a case: one column per plane in 3D (axial, coronal, sagittal), one row in 2D.

    classes: name to label value, or values of a region.
    All arrays have one shape: (Z, Y, X) in closest-RAS orientation, or (Y, X) as stored. Slices are those of
    `best_slice`, cut to the structures with a margin, at the aspect of `spacing_mm`. `window` is the shown range of
    intensities (default: percentiles 1 and 99 of what is shown).
    """
    values = list(classes.values())

    def pair(contours: Axes, differences: Axes, view: _View, title: str) -> None:
        _show(contours, view, window, title)
        _contours(contours, view, values)
        _show(differences, view, window, "differences", fade=True)
        _differences(differences, view, values)

    if label.ndim == 2:
        figure = new_figure(9.6, 3.9)
        grid = figure.subplots(1, 3)
        view = _cropped(_View(image, label, pred, (spacing_mm[0], spacing_mm[1])), values)
        _show(grid[0], view, window, "image")
        pair(grid[1], grid[2], view, "contours")
    else:
        figure = new_figure(9.6, 6.9)
        grid = figure.subplots(2, 3)
        for column, (plane, axis, letters) in enumerate(PLANES):
            index = best_slice(label, pred, values, axis)
            rows, columns = (s for i, s in enumerate(spacing_mm) if i != axis)
            cut = [np.take(array, index, axis=axis)[::-1, ::-1] for array in (image, label, pred)]
            view = _cropped(_View(cut[0], cut[1], cut[2], (rows, columns)), values)
            pair(grid[0, column], grid[1, column], view, f"{plane}, slice {index + 1} of {label.shape[axis]}")
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
    slices: Sequence[tuple[str, NDArray[Any], NDArray[Any], tuple[float, float]]], classes: Mapping[str, Values]
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
        whole = _View(image, pred, pred, spacing)
        found = "close-up" if any_of(pred, values).any() else "nothing found here"
        for axes, view, heading in zip(grid[:, column], (whole, _cropped(whole, values)), (title, found), strict=True):
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


def _cropped(view: _View, values: Sequence[Values]) -> _View:
    box = _crop_box(any_of(view.label, values) | any_of(view.pred, values), view.spacing)
    return _View(view.image[box], view.label[box], view.pred[box], view.spacing)


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


def _contours(axes: Axes, view: _View, values: Sequence[Values], kinds: Sequence[tuple[str, Any]] = _BOTH) -> None:
    width = 1.7
    for i, value in enumerate(values):
        for kind, style in kinds:
            array = view.label if kind == "label" else view.pred
            # A frame of background closes the contours of what touches the edge of the slice.
            paths = find_contours(np.pad(mask_of(array, value), 1).astype(np.float64), 0.5)
            lines = [((path - 0.5) * view.spacing)[:, ::-1] for path in paths]
            if lines:
                # Beside a label the prediction is lighter, alone it has the full colour.
                colour: tuple[float, ...] = to_rgb(class_colour(i))
                if kind != kinds[0][0]:
                    colour = tuple(0.45 * channel + 0.55 for channel in colour)
                look: dict[str, Any] = {"colors": colour, "linestyles": [style], "linewidths": width}
                look["path_effects"] = [withStroke(linewidth=width + 1.3, foreground=(0, 0, 0, 0.55))]
                axes.add_collection(LineCollection(lines, label=f"{kind} {value}", **look), autolim=False)


def _differences(axes: Axes, view: _View, values: Sequence[Values]) -> None:
    in_label, in_pred = any_of(view.label, values), any_of(view.pred, values)
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
    box = {"facecolor": "black", "alpha": 0.55, "pad": 1.2, "edgecolor": "none"}
    look: dict[str, Any] = {"color": "white", "fontsize": 9, "fontweight": "bold", "bbox": box}
    for letter, (x, y, horizontal, vertical) in zip(letters, places, strict=True):
        axes.text(x, y, letter, ha=horizontal, va=vertical, transform=axes.transAxes, **look)


_MAX_VOXELS = 48  # per axis of the coarse grid: about 10,000 triangles, under two seconds to draw
_LIGHT = np.array([-0.35, -0.75, 0.56])  # from the reader's upper left; unit length


def surfaces_figure(
    masks: Mapping[str, NDArray[Any]],
    spacing_mm: Sequence[float],
    classes: Mapping[str, Values],
    *,
    columns: int = 2,
    max_voxels: int = _MAX_VOXELS,
) -> Figure:
    """Draw the label (the first) and predictions as shaded surfaces from the same viewpoint, to scale in millimetres.

    Arrays are (Z, Y, X) of one shape in closest-RAS orientation, seen from the front, the patient's right on the left.
    Masks are averaged down to at most `max_voxels` per axis and cut where the volume stays the same, so that thin
    structures survive; the picture shows shape, not detail. A class that others lie inside is drawn translucent.
    """
    values = list(classes.values())
    box = bounding_box(np.logical_or.reduce([any_of(array, values) for array in masks.values()]))
    masks = {title: array[box] for title, array in masks.items()}
    label = next(iter(masks.values()))
    extent = np.multiply(label.shape, spacing_mm)
    step = float(extent.max()) / max_voxels
    factors = tuple(max(1, round(step / s)) for s in spacing_mm)
    alphas = _alphas(label, values)
    rows = -(-len(masks) // columns)
    figure = new_figure(9.6, 0.4 + rows * 8.4 / columns)
    for position, (title, array) in enumerate(masks.items()):
        axes: Any = figure.add_subplot(rows, columns, position + 1, projection="3d")
        triangles, colours = [], []
        for index, value in enumerate(values):
            mesh = mesh_mm(mask_of(array, value), spacing_mm, factors)
            if mesh is not None:
                triangles.append(mesh)
                colours.append(_shade(mesh, class_colour(index), alphas[index]))
        if triangles:
            # One collection for all classes: matplotlib sorts triangles by depth only within one.
            axes.add_collection3d(
                Poly3DCollection(np.concatenate(triangles), facecolors=np.concatenate(colours), edgecolors="none")
            )
        else:
            axes.text2D(0.5, 0.5, "empty", transform=axes.transAxes, ha="center", color=MUTED)
        depth, height, width = extent[1], extent[0], extent[2]
        axes.set(xlim=(-width, 0), ylim=(-depth, 0), zlim=(0, height))
        axes.set_box_aspect((width, depth, height), zoom=1.3)
        axes.view_init(elev=18, azim=-68)
        axes.set_axis_off()
        axes.set_title(title, fontsize=11 if columns == 2 else 8.5, fontweight="bold")
    size = " x ".join(f"{v:.0f}" for v in extent[::-1])
    title = f"{size} mm (right-left, back-front, feet-head)"
    handles = class_patches(list(classes)[:7])
    legend_below(figure, handles, columns=7, fontsize=8.5, title=title, title_fontsize=8.5)
    return figure


def mesh_mm(
    mask: NDArray[np.bool_], spacing_mm: Sequence[float], factors: tuple[int, ...]
) -> NDArray[np.float64] | None:
    """Return a mask's surface as triangles (T, 3, 3) of corners (left, posterior, superior) in mm, or None if empty.

    `mask` is (Z, Y, X); voxels are averaged in blocks of `factors` first.
    """
    if not mask.any():
        return None
    coarse = block_reduce(mask.astype(np.float32), factors, np.mean)
    coarse = ndimage.gaussian_filter(np.pad(coarse, 2), 0.7)  # voxel steps would hide the shape
    # The level that keeps the class's volume: half for a solid organ, lower for a vessel thinner than a block.
    ranked = np.sort(coarse, axis=None)[::-1]
    count = max(1, round(float(mask.sum()) / float(np.prod(factors))))
    level = float(np.clip(ranked[min(count, ranked.size) - 1] * 0.999, 0.1 * ranked[0], 0.5 * ranked[0]))
    step = np.multiply(factors, spacing_mm)
    vertices, faces, _, _ = marching_cubes(coarse, level, spacing=tuple(step))
    z, y, x = (vertices - 1.5 * step).T
    return np.stack([-x, -y, z], axis=1)[faces].astype(np.float64)


def _shade(triangles: NDArray[np.float64], colour: str, alpha: float) -> NDArray[np.float64]:
    normal = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
    # Which side of a triangle is outside does not matter: of a closed surface one sees only the outside.
    towards_reader = np.array([0.36, -0.88, 0.31])
    normal *= np.where(normal @ towards_reader < 0, -1.0, 1.0)[:, None]
    light = 0.5 + 0.5 * np.clip(normal @ _LIGHT, 0.0, 1.0)
    rgba = np.empty((len(triangles), 4))
    rgba[:, :3] = np.array(to_rgb(colour)) * light[:, None]
    rgba[:, 3] = alpha
    return rgba


def _alphas(label: NDArray[Any], values: Sequence[Values]) -> list[float]:
    """Return an opacity per class: 0.3 where another class lies within its bounding box."""
    boxes = [bounding_box(mask_of(label, value)) if mask_of(label, value).any() else None for value in values]

    def holds(outer: tuple[slice, ...], inner: tuple[slice, ...]) -> bool:
        return all(o.start <= i.start and i.stop <= o.stop for o, i in zip(outer, inner, strict=True))

    return [
        0.3 if a is not None and any(b is not None and b is not a and holds(a, b) for b in boxes) else 1.0
        for a in boxes
    ]
