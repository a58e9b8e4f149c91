"""Fine detail of one case: Dice of every connected part of a class by its size, and of a vessel by its radius.

A Dice over a whole case says little about small lesions and thin branches: the large ones hold most voxels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial import cKDTree
from skimage.morphology import skeletonize

from lightm.errors import InputError
from lightm.labels import bounding_box

Mask = NDArray[np.bool_]

# A class is tubular when its skeleton is as long as this many of its diameters, and when discs of the skeleton's
# radii along it (in 2D lines) make up this part of its volume: a blob's skeleton is short, or a sheet.
_DIAMETERS, _FILLED = 10.0, (0.65, 1.5)
_RADIUS_STEP = 1e-3  # mm: radii closer than this are one, so that sums over voxels stay small tables


@dataclass(frozen=True)
class Part:
    """One connected component of a class's label: its size and how one prediction did in its territory."""

    voxels: int
    size: float
    dsc: float
    found: bool


@dataclass(frozen=True)
class RadiusCounts:
    """Voxel counts by local radius (mm): `skeleton` voxels, `label`, and for each prediction `pred` and `common`."""

    radius: NDArray[np.float64]
    skeleton: NDArray[np.int64]
    label: NDArray[np.int64]
    pred: list[NDArray[np.int64]]
    common: list[NDArray[np.int64]]


def part_scores(
    label: Mask, predictions: Sequence[Mask], spacing_mm: Sequence[float], *, pixels: bool = False
) -> list[list[Part]]:
    """Score every connected component of a label in every prediction; one list of parts a prediction, same order.

    Components touch by face, edge or corner. The territory of a component is all voxels nearer to it (mm, between
    voxel centres) than to any other component of the class, so every predicted voxel belongs to one, spurious ones
    to the nearest. Within it DSC = 2|P & G| / (|P| + |G|); a component is found when the prediction shares a voxel
    with it. Sizes are in ml in 3D and mm2 in 2D, with `pixels` in pixels.

    label, predictions: bool arrays (Z, Y, X) or (Y, X) of one shape. Raises InputError for shapes that differ.
    Cost: one distance transform of the box around all masks; 12 bytes of memory a voxel of it in 3D.
    """
    _same_shape(label, predictions)
    if not label.any():
        return [[] for _ in predictions]
    box = bounding_box(np.logical_or.reduce([label, *predictions]), margin=0)
    label, predictions = label[box], [pred[box] for pred in predictions]
    numbered, count = ndimage.label(label, np.ones((3,) * label.ndim))
    nearest = ndimage.distance_transform_edt(~label, sampling=spacing_mm, return_distances=False, return_indices=True)
    territory = numbered[tuple(nearest)]
    voxels = np.bincount(numbered.ravel(), minlength=count + 1)[1:]
    unit = 1.0 if pixels else math.prod(spacing_mm) / (1000.0 if label.ndim == 3 else 1.0)
    scores = []
    for pred in predictions:
        common = np.bincount(numbered[pred], minlength=count + 1)[1:]
        near = np.bincount(territory[pred], minlength=count + 1)[1:]
        scores.append(
            [
                Part(int(size), float(size * unit), float(2 * both / (size + own)), bool(both))
                for size, both, own in zip(voxels, common, near, strict=True)
            ]
        )
    return scores


def radius_counts(label: Mask, predictions: Sequence[Mask], spacing_mm: Sequence[float]) -> RadiusCounts:
    """Count voxels of label and predictions by the radius of the label at the nearest point of its skeleton.

    The skeleton is that of Lee et al. (CVGIP 56(6):462, 1994; in 2D Zhang and Suen) as `skimage` computes it on
    voxels; the radius at a skeleton voxel is its distance in mm to the nearest voxel centre outside the label, up to
    half a voxel more than that of the object; where the image cuts the object its edge is not outside. Every voxel
    belongs to its nearest skeleton voxel (mm). Components that the skeleton leaves out get their innermost voxel.

    Arrays as in `part_scores`. Cost: thinning, O(voxels of the box x radius), and two distance transforms.
    """
    _same_shape(label, predictions)
    if not label.any():
        empty = np.zeros(0, dtype=np.int64)
        return RadiusCounts(np.zeros(0), empty, empty, [empty for _ in predictions], [empty for _ in predictions])
    box = bounding_box(np.logical_or.reduce([label, *predictions]), margin=1)
    label, predictions = label[box], [pred[box] for pred in predictions]
    distance = _inner_distance(label, spacing_mm)
    skeleton = _skeleton(label, distance)
    nearest = ndimage.distance_transform_edt(
        ~skeleton, sampling=spacing_mm, return_distances=False, return_indices=True
    )
    stepped = np.rint(distance / _RADIUS_STEP).astype(np.int64)
    radii, index = np.unique(stepped[skeleton], return_inverse=True)
    at = np.zeros(label.shape, dtype=np.int64)
    at[skeleton] = index
    at = at[tuple(nearest)]

    def count(mask: Mask) -> NDArray[np.int64]:
        return np.bincount(at[mask], minlength=len(radii)).astype(np.int64)

    return RadiusCounts(
        radii.astype(np.float64) * _RADIUS_STEP,
        count(skeleton),
        count(label),
        [count(pred) for pred in predictions],
        [count(pred & label) for pred in predictions],
    )


def is_tubular(label: Mask, spacing_mm: Sequence[float]) -> bool:
    """Whether the largest component of a label is a tube or a tree of tubes.

    Its holes are filled. The skeleton of L mm (its minimum spanning tree) with radii r then has to be at least 10 mean
    diameters long, and the volume L mean(pi r^2), in 2D the area L mean(2 r), 0.65 to 1.5 of the component's: a solid
    organ fails the first, the sheets in the skeleton of a rough surface the second.
    """
    if not label.any():
        return False
    numbered, _ = ndimage.label(label, np.ones((3,) * label.ndim))
    largest = numbered == np.bincount(numbered[label]).argmax()
    largest = ndimage.binary_fill_holes(largest[bounding_box(largest, margin=1)])
    distance = _inner_distance(largest, spacing_mm)
    skeleton = _skeleton(largest, distance)
    radius = distance[skeleton]
    voxel = math.prod(spacing_mm)
    length = _length(skeleton, spacing_mm)
    section = math.pi * radius**2 if label.ndim == 3 else 2 * radius
    filled = length * float(section.mean()) / (float(largest.sum()) * voxel)
    return bool(length >= _DIAMETERS * 2 * radius.mean() and _FILLED[0] <= filled <= _FILLED[1])


def _inner_distance(label: Mask, spacing_mm: Sequence[float]) -> NDArray[np.float64]:
    if label.all():  # nothing is outside within the image: the edge has to be
        padded: NDArray[np.float64] = ndimage.distance_transform_edt(np.pad(label, 1), sampling=spacing_mm)
        return padded[(slice(1, -1),) * label.ndim]
    distance: NDArray[np.float64] = ndimage.distance_transform_edt(label, sampling=spacing_mm)
    return distance


def _skeleton(label: Mask, distance: NDArray[np.float64]) -> Mask:
    skeleton: Mask = np.asarray(skeletonize(label), dtype=bool) & label
    numbered, count = ndimage.label(label, np.ones((3,) * label.ndim))
    has = np.bincount(numbered[skeleton], minlength=count + 1) > 0
    lost = [k for k in range(1, count + 1) if not has[k]]
    if lost:
        for place in ndimage.maximum_position(distance, numbered, lost):
            skeleton[tuple(int(i) for i in place)] = True
    return skeleton


def _length(skeleton: Mask, spacing_mm: Sequence[float]) -> float:
    """Length in mm of the minimum spanning tree over neighbouring voxels."""
    places = np.argwhere(skeleton)
    first, second = cKDTree(places).query_pairs(1.5, p=np.inf, output_type="ndarray").T
    steps = np.linalg.norm((places[first] - places[second]) * np.asarray(spacing_mm), axis=1)
    tree = minimum_spanning_tree(coo_matrix((steps, (first, second)), shape=(len(places), len(places))))
    return float(tree.sum())


def _same_shape(label: NDArray[Any], predictions: Sequence[NDArray[Any]]) -> None:
    for pred in predictions:
        if pred.shape != label.shape:
            raise InputError(f"label and prediction have shapes {label.shape} and {pred.shape}; predict the case again")
