"""Brain MR phantom: a head without its skull and a glioma in four sequences, labelled by overlapping regions.

Labels are those of BraTS in nnU-Net's form: 1 oedema, 2 necrosis, 3 enhancing tumour, of which the regions are made
that are scored: the whole tumour (1, 2, 3), its core (2, 3) and the enhancing tumour (3). Coordinates are millimetres
in the LPS frame with the origin in the middle of the brain; arrays are (z, y, x). No sequence shows every region by
itself: FLAIR and T2w show the whole tumour, the contrast of T1gd its core.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from lightm.datasets.phantoms.shapes import (
    centred_axis,
    coverage,
    ellipsoid,
    empty_distance,
    lps_affine,
    mesh,
    rotation_3d,
    smooth_field,
    smooth_union,
)
from lightm.images.volume import Volume

LABELS = {"background": 0, "whole tumour": [1, 2, 3], "tumour core": [2, 3], "enhancing tumour": [3]}
REGIONS_CLASS_ORDER = [1, 2, 3]
CHANNELS = {"0": "FLAIR", "1": "T1w", "2": "T1gd", "3": "T2w"}

_BRAIN_MM = (65.0, 82.0, 68.0)  # half axes along z, y, x
_TISSUES = ("grey", "white", "fluid", "oedema", "necrosis", "enhancing")
_SIGNAL = (
    (260, 220, 60, 420, 190, 350),
    (260, 340, 90, 230, 150, 270),
    (270, 350, 90, 240, 150, 540),
    (300, 240, 520, 430, 470, 330),
)
"""Signal of each tissue in each sequence."""


def brain_case(size: int, rng: np.random.Generator) -> tuple[list[Volume], Volume]:
    """Return the four sequences, in the order of `CHANNELS`, and the label map of one case.

    size: voxels along each axis, about, for a field of view of 180 mm. Images are int16, 0 outside of the brain; the
    label is uint8. Cost grows with size^3: about 0.2 s at size 64.
    """
    step = 180.0 / size * float(rng.uniform(0.95, 1.05))
    axes = [centred_axis(count, step) for count in (round(0.85 * size), size, round(0.85 * size))]
    coords = mesh(axes)
    brain = ellipsoid(coords, (0, 0, 0), [half * rng.uniform(0.94, 1.04) for half in _BRAIN_MM], rotation_3d(rng, 6))
    brain = brain + np.float32(1.5) * smooth_field(axes, 25.0, rng)
    folds = np.float32(3.0) * smooth_field(axes, 12.0, rng)
    fluid = empty_distance(axes)
    for side in (-1, 1):
        ventricle = ellipsoid(coords, (6, 4, 11 * side), (9, 26, 6), rotation_3d(rng, 10))
        fluid = smooth_union(fluid, ventricle, 4.0)
    oedema, core, necrosis = _tumour(axes, coords, step, rng)
    shares = {
        "white": coverage(brain + 11 + folds, 2 * step),
        "fluid": coverage(fluid, step),
        "oedema": coverage(oedema, 2 * step),
        "enhancing": coverage(core, step),
        "necrosis": coverage(necrosis, step),
    }
    inside = brain < 0
    blurred = ndimage.gaussian_filter
    images = []
    for signal in _SIGNAL:
        of = dict(zip(_TISSUES, signal, strict=True))
        image = np.full(brain.shape, of["grey"], np.float32)
        for tissue, share in shares.items():
            image += share * (of[tissue] - image)
        # Receive coils and scanners scale every sequence of every patient in their own way.
        image *= np.exp(0.08 * smooth_field(axes, 90.0, rng)) * rng.uniform(0.7, 1.4)
        image = blurred(image, rng.uniform(0.4, 0.6)) + rng.normal(0, 14, brain.shape)
        images.append(np.where(inside, np.clip(image, 1, 4000), 0).astype(np.int16))
    label = np.zeros(brain.shape, np.uint8)
    for value, distance in ((1, oedema), (3, core), (2, necrosis)):
        label[(distance < 0) & inside] = value
    affine = lps_affine((step,) * 3, (-float(axes[2][0]), -float(axes[1][0]), float(axes[0][0])))
    spacing = (step,) * 3
    return [Volume(image, spacing, affine) for image in images], Volume(label, spacing, affine)


def _tumour(
    axes: list[np.ndarray], coords: tuple[np.ndarray, ...], step: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the signed distances of oedema, core and necrosis, each around the next."""
    side = rng.choice((-1, 1))
    centre = (rng.uniform(-20, 30), rng.uniform(-35, 35), side * rng.uniform(22, 38))
    radius = rng.uniform(12, 19)
    radii = [max(radius * rng.uniform(0.85, 1.2), 2.5 * step) for _ in range(3)]
    turn = rotation_3d(rng, 90)
    core = ellipsoid(coords, centre, radii, turn) + np.float32(1.5) * smooth_field(axes, 12.0, rng)
    around = [half + rng.uniform(7, 15) for half in radii]
    oedema = ellipsoid(coords, centre, around, turn) + np.float32(3.0) * smooth_field(axes, 18.0, rng)
    rim = max(rng.uniform(3, 5), 1.2 * step)
    return np.minimum(oedema, core + 1), core, core + np.float32(rim)
