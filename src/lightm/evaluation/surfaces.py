"""Label and predictions of one 3D case as surfaces, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from numpy.typing import NDArray
from scipy import ndimage
from skimage.measure import block_reduce, marching_cubes

from lightm.evaluation.figures import MUTED, class_colour, class_patches, legend_below, new_figure
from lightm.labels import bounding_box

_MAX_VOXELS = 48  # per axis of the coarse grid: about 10,000 triangles, under two seconds to draw
_LIGHT = np.array([-0.35, -0.75, 0.56])  # from the reader's upper left; unit length


def surfaces_figure(
    masks: Mapping[str, NDArray[Any]],
    spacing_mm: Sequence[float],
    classes: dict[str, int],
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
    box = bounding_box(np.logical_or.reduce([np.isin(array, values) for array in masks.values()]))
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
            mesh = mesh_mm(array == value, spacing_mm, factors)
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


def _alphas(label: NDArray[Any], values: Sequence[int]) -> list[float]:
    """Return an opacity per class: 0.3 where another class lies within its bounding box."""
    boxes = [bounding_box(label == value) if (label == value).any() else None for value in values]

    def holds(outer: tuple[slice, ...], inner: tuple[slice, ...]) -> bool:
        return all(o.start <= i.start and i.stop <= o.stop for o, i in zip(outer, inner, strict=True))

    return [
        0.3 if a is not None and any(b is not None and b is not a and holds(a, b) for b in boxes) else 1.0
        for a in boxes
    ]
