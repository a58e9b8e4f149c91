"""Abdominal CT phantom: a deformed liver (1) with low-contrast tumours (2) among organs of like density.

Coordinates are millimetres in the LPS frame (x to the patient's left, y to the back, z to the head) with the
origin in the middle of the liver's height; arrays are (z, y, x). What lies around the liver is in `abdomen`.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from lightm.datasets.phantoms.abdomen import (
    Body,
    bumps,
    heart_distance,
    kidney_distance,
    make_body,
    paint_surroundings,
    spine_distance,
)
from lightm.datasets.phantoms.shapes import (
    Array,
    add_tube,
    coverage,
    ct_noise,
    ellipsoid,
    empty_distance,
    flip_volume,
    largest_part,
    lps_affine,
    mesh,
    paint,
    rotation_3d,
    smooth_cut,
    smooth_field,
    smooth_union,
    spline_curve,
)
from lightm.images.volume import Volume

LABELS = {"background": 0, "liver": 1, "tumour": 2}
CHANNELS = {"0": "CT"}
MAX_TUMOURS = 6

_AIR_HU = -1000.0


def liver_case(size: int, rng: np.random.Generator, *, tumours: int | None = None) -> tuple[Volume, Volume]:
    """Return one (image, label) pair of the abdominal CT phantom.

    `size` is the typical number of voxels across the patient; shape and spacing vary around it. `tumours` is
    their number, 0 to 6, drawn when None (one case in five has none). The image is int16 HU, the label uint8
    with 0 background, 1 liver, 2 tumour. Cost grows with size^3: about 0.1 s at size 64.
    """
    count = tumours if tumours is not None else int(rng.integers(1, MAX_TUMOURS + 1) * (rng.random() >= 0.2))
    body = make_body(size, rng)
    liver = _liver_distance(body, rng)
    image = np.full_like(body.z, _AIR_HU)
    liver_hu = float(rng.uniform(92, 125) if rng.random() < 0.8 else rng.uniform(70, 90))
    paint_surroundings(image, body, liver_hu, rng)
    gallbladder = _gallbladder(body, liver, rng)
    if gallbladder is not None:
        liver = smooth_cut(liver, gallbladder - 1.5, 3.0)
    paint(image, liver, liver_hu + 3.0 * smooth_field(body.axes, 30.0, rng), body.width_mm)
    _paint_vessels(image, body, liver, liver_hu, rng)
    lesion = _paint_tumours(image, body, liver, liver_hu, count, rng)
    if gallbladder is not None:
        paint(image, gallbladder, rng.uniform(5, 22), body.width_mm)
    label = np.where(liver < 0, np.where(lesion < 0, 2, 1), 0).astype(np.uint8)
    return _scan(image, label, body, rng)


def _liver_distance(body: Body, rng: np.random.Generator) -> Array:
    """Return the signed distance of the liver: two lobes, moulded by everything around them."""

    def j(spread: float) -> float:
        return float(rng.uniform(-spread, spread))

    coords = body.coords
    right = ellipsoid(
        coords, (-8 + j(12), 2 + j(6), -78 + j(5)), (88 + j(12), 82 + j(8), 66 + j(7)), rotation_3d(rng, 12)
    )
    left = ellipsoid(
        coords, (22 + j(10), -42 + j(6), -5 + j(14)), (38 + j(9), 34 + j(7), 78 + j(14)), rotation_3d(rng, 18)
    )
    liver = smooth_union(right, left, 22.0)
    liver = liver + bumps(body, 45.0, 4.5, rng) + bumps(body, 22.0, 1.5, rng)
    # The notch of the falciform ligament, from the front and from below.
    notch = np.hypot(body.x + 12 + j(8), 0.35 * (body.y + 75)) - 5
    liver = smooth_cut(liver, np.maximum(notch, body.z - 10 - j(15)), 8.0)
    # The hilum: a hollow on the inner lower face.
    liver = smooth_cut(liver, ellipsoid(coords, (-38, 2, -22), (36, 20, 24)), 10.0)
    for other, gap in ((kidney_distance(body, -1), 5.0), (spine_distance(body), 9.0), (heart_distance(body), 4.0)):
        liver = smooth_cut(liver, other - gap, 8.0)
    ivc = np.hypot(body.x + 20, body.y - 34) - 12
    liver = smooth_cut(liver, ivc - 1.0, 5.0)
    liver = smooth_cut(liver, -(body.cavity + 3.0), 6.0)
    return largest_part(np.maximum(liver, body.z - body.diaphragm + 3.0), 5.0)


def _gallbladder(body: Body, liver: Array, rng: np.random.Generator) -> Array | None:
    """Return the signed distance of a gallbladder under the liver (dark, and no tumour), or None."""
    if rng.random() < 0.2:
        return None
    centre = (-42 + rng.uniform(-8, 8), -38 + rng.uniform(-8, 8), -42 + rng.uniform(-8, 8))
    shape = ellipsoid(body.coords, centre, (rng.uniform(20, 30), rng.uniform(11, 16), rng.uniform(11, 16)))
    # Most of it hangs out of the liver, so that it lies in its fossa and not inside like a tumour.
    return np.maximum(shape, -liver - 12).astype(np.float32)


def _random_inside(body: Body, liver: Array, depth_mm: float, rng: np.random.Generator) -> Array | None:
    """Return a random (z, y, x) position in mm at least `depth_mm` inside of the liver, or None."""
    inside = np.flatnonzero(liver < -depth_mm)
    if not len(inside):
        return None
    index = np.unravel_index(int(inside[rng.integers(len(inside))]), liver.shape)
    return np.array([float(a[i]) for a, i in zip(body.axes, index, strict=True)])


def _paint_vessels(image: Array, body: Body, liver: Array, liver_hu: float, rng: np.random.Generator) -> None:
    """Paint portal and hepatic veins inside of the liver; they belong to the liver's label."""
    tubes = empty_distance(body.axes)
    for start in (np.array([-20.0, -2.0, -35.0]), np.array([52.0, 30.0, -24.0])):
        for _ in range(5):
            end = _random_inside(body, liver, 10.0, rng)
            if end is None:
                continue
            middle = (start + end) / 2 + rng.normal(0, 10, 3)
            curve = spline_curve(np.stack([start, middle, end]), 6)
            add_tube(tubes, body.axes, curve, np.linspace(rng.uniform(5, 7), 1.5, len(curve)), 2 * body.width_mm)
    contrast = rng.uniform(8, 40)
    paint(image, np.maximum(tubes, liver + 1), liver_hu + contrast, body.width_mm)


def _paint_tumours(
    image: Array, body: Body, liver: Array, liver_hu: float, count: int, rng: np.random.Generator
) -> Array:
    """Paint `count` tumours 15 to 40 HU darker than the liver; return their signed distance."""
    union = empty_distance(body.axes)
    smallest = max(8.0, 1.5 * body.width_mm)
    radii = np.clip(np.exp(rng.normal(np.log(18.0), 0.35, count)), smallest, 38.0)
    if count:
        radii[0] = max(radii[0], rng.uniform(19, 27))  # at least one that nobody overlooks
        room = 0.3 * np.count_nonzero(liver < 0) * float(np.prod(body.spacing_mm))
        radii *= min(1.0, (room / max(float(np.sum(4.19 * radii**3)), 1.0)) ** (1 / 3))
    darker = rng.uniform(20, 36)
    coords = mesh(body.axes)
    for radius in np.sort(radii)[::-1]:
        centre = _random_inside(body, np.maximum(liver, -union + 0.8 * radius), 0.5 * radius, rng)
        if centre is None:
            centre = _random_inside(body, liver, 0.0, rng)
        if centre is None:
            continue
        shape = ellipsoid(coords, list(centre), list(radius * rng.uniform(0.8, 1.25, 3)), rotation_3d(rng, 90))
        shape = shape + bumps(body, max(0.9 * radius, 8.0), 0.10 * radius, rng)
        contrast = float(np.clip(darker + rng.uniform(-8, 8), 15, 40))
        value: float | Array = liver_hu - contrast
        if rng.random() < 0.4:  # a necrotic middle
            value = value - 12 * coverage(shape + 0.5 * radius, 0.5 * radius)
        if rng.random() < 0.25:  # an enhancing rim outside of the tumour
            paint(image, np.maximum(np.abs(shape - 2.5) - 2.5, liver + 1), liver_hu + 12, body.width_mm)
        paint(image, np.maximum(shape, liver), value, max(body.width_mm, 4.0))
        union = np.minimum(union, shape)
    return union


def _scan(image: Array, label: Array, body: Body, rng: np.random.Generator) -> tuple[Volume, Volume]:
    """Blur, add noise, cut the reconstruction circle, round to int16 and give the case its geometry."""
    blur = rng.uniform(0.35, 0.65)
    image = ndimage.gaussian_filter(image, (0.4 * blur, blur, blur))
    image = image + ct_noise(image.shape, rng.uniform(9, 15), rng.uniform(6, 10), rng)
    image = np.clip(image, -1024, 1500)
    if rng.random() < 0.4:
        y, x = (a - a.mean() for a in body.axes[1:])
        circle = np.hypot(y[:, None], x[None, :]) > (abs(x[0]) + body.spacing_mm[2] / 2)
        image[:, circle] = -1024
        label = np.where(circle[None], 0, label).astype(np.uint8)
    origin = (
        -float(body.axes[2][0]),
        -float(body.axes[1][0]),
        float(body.axes[0][0]) + rng.uniform(-900, 100),
    )
    affine = lps_affine(body.spacing_mm, origin)
    flip_x, flip_y = ((False, False), (False, False), (True, True), (True, False))[int(rng.integers(4))]
    (pixels, labels), affine = flip_volume(
        [np.rint(image).astype(np.int16), label.astype(np.uint8)], affine, flip_x, flip_y
    )
    return Volume(pixels, body.spacing_mm, affine), Volume(labels, body.spacing_mm, affine)
