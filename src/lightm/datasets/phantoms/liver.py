"""Abdominal CT phantom: a deformed liver (1) with low-contrast tumours (2) among organs of like density.

Coordinates are millimetres in the LPS frame (x to the patient's left, y to the back, z to the head) with the
origin in the middle of the liver's height; arrays are (z, y, x). One smooth displacement deforms the whole anatomy;
every organ then gets bumps of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from lightm.datasets.phantoms.shapes import (
    Array,
    add_tube,
    centred_axis,
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
_FAT_HU = -100.0
_HALF_X_MM, _HALF_Y_MM = 165.0, 115.0


def liver_case(size: int, rng: np.random.Generator, *, tumours: int | None = None) -> tuple[Volume, Volume]:
    """Return one (image, label) pair of the abdominal CT phantom.

    `size` is the typical number of voxels across the patient; shape and spacing vary around it. `tumours` is
    their number, 0 to 6, drawn when None (one case in five has none). The image is int16 HU, the label uint8
    with 0 background, 1 liver, 2 tumour. Cost grows with size^3: about 0.1 s at size 64.
    """
    count = tumours if tumours is not None else int(rng.integers(1, MAX_TUMOURS + 1) * (rng.random() >= 0.2))
    body = _make_body(size, rng)
    liver = _liver_distance(body, rng)
    image = np.full_like(body.z, _AIR_HU)
    liver_hu = float(rng.uniform(92, 125) if rng.random() < 0.8 else rng.uniform(70, 90))
    _paint_surroundings(image, body, liver_hu, rng)
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


def _liver_distance(body: _Body, rng: np.random.Generator) -> Array:
    """Return the signed distance of the liver: two lobes, moulded by everything around them."""

    def j(spread: float) -> float:
        return float(rng.uniform(-spread, spread))

    coords = body.coords
    centre, radii = (-8 + j(12), 2 + j(6), -78 + j(5)), (88 + j(12), 82 + j(8), 66 + j(7))
    right = ellipsoid(coords, centre, radii, rotation_3d(rng, 12))
    centre, radii = (22 + j(10), -42 + j(6), -5 + j(14)), (38 + j(9), 34 + j(7), 78 + j(14))
    liver = smooth_union(right, ellipsoid(coords, centre, radii, rotation_3d(rng, 18)), 22.0)
    liver = liver + _bumps(body, 45.0, 4.5, rng) + _bumps(body, 22.0, 1.5, rng)
    # The notch of the falciform ligament, from the front and from below.
    notch = np.hypot(body.x + 12 + j(8), 0.35 * (body.y + 75)) - 5
    liver = smooth_cut(liver, np.maximum(notch, body.z - 10 - j(15)), 8.0)
    # The hilum: a hollow on the inner lower face.
    liver = smooth_cut(liver, ellipsoid(coords, (-38, 2, -22), (36, 20, 24)), 10.0)
    for other, gap in ((_kidney_distance(body, -1), 5.0), (_spine_distance(body), 9.0), (_heart_distance(body), 4.0)):
        liver = smooth_cut(liver, other - gap, 8.0)
    ivc = np.hypot(body.x + 20, body.y - 34) - 12
    liver = smooth_cut(liver, ivc - 1.0, 5.0)
    liver = smooth_cut(liver, -(body.cavity + 3.0), 6.0)
    return largest_part(np.maximum(liver, body.z - body.diaphragm + 3.0), 5.0)


def _gallbladder(body: _Body, liver: Array, rng: np.random.Generator) -> Array | None:
    """Return the signed distance of a gallbladder under the liver (dark, and no tumour), or None."""
    if rng.random() < 0.2:
        return None
    centre = (-42 + rng.uniform(-8, 8), -38 + rng.uniform(-8, 8), -42 + rng.uniform(-8, 8))
    shape = ellipsoid(body.coords, centre, (rng.uniform(20, 30), rng.uniform(11, 16), rng.uniform(11, 16)))
    # Most of it hangs out of the liver, so that it lies in its fossa and not inside like a tumour.
    return np.maximum(shape, -liver - 12).astype(np.float32)


def _random_inside(body: _Body, liver: Array, depth_mm: float, rng: np.random.Generator) -> Array | None:
    """Return a random (z, y, x) position in mm at least `depth_mm` inside of the liver, or None."""
    inside = np.flatnonzero(liver < -depth_mm)
    if not len(inside):
        return None
    index = np.unravel_index(int(inside[rng.integers(len(inside))]), liver.shape)
    return np.array([float(a[i]) for a, i in zip(body.axes, index, strict=True)])


def _paint_vessels(image: Array, body: _Body, liver: Array, liver_hu: float, rng: np.random.Generator) -> None:
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
    image: Array, body: _Body, liver: Array, liver_hu: float, count: int, rng: np.random.Generator
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
        if centre is None and (centre := _random_inside(body, liver, 0.0, rng)) is None:
            continue
        shape = ellipsoid(coords, list(centre), list(radius * rng.uniform(0.8, 1.25, 3)), rotation_3d(rng, 90))
        shape = shape + _bumps(body, max(0.9 * radius, 8.0), 0.10 * radius, rng)
        contrast = float(np.clip(darker + rng.uniform(-8, 8), 15, 40))
        value: float | Array = liver_hu - contrast
        if rng.random() < 0.4:  # a necrotic middle
            value = value - 12 * coverage(shape + 0.5 * radius, 0.5 * radius)
        if rng.random() < 0.25:  # an enhancing rim outside of the tumour
            paint(image, np.maximum(np.abs(shape - 2.5) - 2.5, liver + 1), liver_hu + 12, body.width_mm)
        paint(image, np.maximum(shape, liver), value, max(body.width_mm, 4.0))
        union = np.minimum(union, shape)
    return union


def _scan(image: Array, label: Array, body: _Body, rng: np.random.Generator) -> tuple[Volume, Volume]:
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
    origin = (-float(body.axes[2][0]), -float(body.axes[1][0]), float(body.axes[0][0]) + rng.uniform(-900, 100))
    affine = lps_affine(body.spacing_mm, origin)
    flip_x, flip_y = ((False, False), (False, False), (True, True), (True, False))[int(rng.integers(4))]
    (pixels, labels), affine = flip_volume([np.rint(image).astype(np.int16), label], affine, flip_x, flip_y)
    return Volume(pixels, body.spacing_mm, affine), Volume(labels, body.spacing_mm, affine)


@dataclass
class _Body:
    """The grid of one patient, the deformed coordinates on it and the distances shared by all organs.

    axes: voxel centres in mm along (z, y, x). z, y, x: coordinates of every voxel in the reference body, in mm. skin,
    cavity: signed distances of the body and of the space inside of the muscles. diaphragm: its height z over every
    voxel. width_mm: the mean voxel size, over which surfaces are blurred by partial volume.
    """

    axes: list[Array]
    spacing_mm: tuple[float, float, float]
    z: Array
    y: Array
    x: Array
    skin: Array
    cavity: Array
    diaphragm: Array
    width_mm: float

    @property
    def coords(self) -> tuple[Array, Array, Array]:
        return self.z, self.y, self.x


def _make_body(size: int, rng: np.random.Generator) -> _Body:
    """Draw the patient's size, the field of view and spacing, and the deformed coordinates."""
    half_x = rng.uniform(148, 185)
    half_y = half_x * rng.uniform(0.64, 0.74)
    cropped = rng.random() < 0.35
    view = 2 * half_x * (rng.uniform(0.8, 0.94) if cropped else rng.uniform(1.02, 1.15))
    nx = max(16, round(size * rng.uniform(0.88, 1.12)))
    in_plane = view / nx
    step_z = in_plane * rng.uniform(1.05, 1.6)
    low, high = rng.uniform(-150, -105), rng.uniform(75, 120)
    if rng.random() < 0.15:  # the scan starts or ends inside of the liver
        low, high = (low, rng.uniform(35, 60)) if rng.random() < 0.5 else (rng.uniform(-70, -45), high)
    nz = max(10, round((high - low) / step_z))
    shift = rng.uniform(-0.08, 0.08, 2) * view if cropped else rng.uniform(-0.02, 0.02, 2) * view
    axes = [centred_axis(nz, step_z, (low + high) / 2), *(centred_axis(nx, in_plane, float(s)) for s in shift)]
    coords = mesh(axes)
    # The anatomy is written for one reference body; a patient's size scales the coordinates, not every number.
    scales = (rng.uniform(0.93, 1.08), half_y / _HALF_Y_MM, half_x / _HALF_X_MM)
    z, y, x = (
        (c + rng.uniform(4, 8) * smooth_field(axes, 90.0, rng)) / np.float32(s)
        for c, s in zip(coords, scales, strict=True)
    )
    power = rng.uniform(2.1, 2.6)  # the outline is a superellipse; distances go along the ray from the middle
    taper = 1 - 0.0004 * z
    norm = (np.abs(x / (_HALF_X_MM * taper)) ** power + np.abs(y / (_HALF_Y_MM * taper)) ** power) ** (1 / power)
    radius = np.hypot(x, y)
    skin = radius - radius / np.maximum(norm, 1e-3)
    fat = rng.uniform(8, 24) * (1 - 0.25 * y / _HALF_Y_MM)
    cavity = skin + fat + rng.uniform(16, 22)
    domes = [(rng.uniform(68, 84), -72.0, 0.0), (rng.uniform(52, 70), 78.0, 5.0), (rng.uniform(45, 54), 5.0, -20.0)]
    diaphragm = np.max([h - ((x - cx) ** 2 + 0.7 * (y - cy) ** 2) / 110.0 for h, cx, cy in domes], axis=0)
    width = float((in_plane + step_z) / 2)
    return _Body(axes, (step_z, in_plane, in_plane), z, y, x, skin, cavity, diaphragm.astype(np.float32), width)


def _bumps(body: _Body, length_mm: float, height_mm: float, rng: np.random.Generator) -> Array:
    """Return a smooth random height in mm to add to a signed distance."""
    return np.float32(height_mm) * smooth_field(body.axes, length_mm, rng)


def _heart_distance(body: _Body) -> Array:
    return ellipsoid(body.coords, (98, -38, 28), (46, 48, 62))


def _kidney_distance(body: _Body, side: int) -> Array:
    """Return the signed distance of the kidney on a side, -1 right and 1 left."""
    return ellipsoid(body.coords, (-48 - 9 * (side < 0), 42, 60 * side), (50, 25, 27))


def _spine_distance(body: _Body) -> Array:
    return np.asarray(np.hypot(body.x, 0.9 * (body.y - 62)) - 22, dtype=np.float32)


def _paint_surroundings(image: Array, body: _Body, liver_hu: float, rng: np.random.Generator) -> None:
    """Paint everything but the liver, from the skin inwards."""
    z, y, x, width = body.z, body.y, body.x, body.width_mm
    muscle_hu = rng.uniform(52, 70)
    below = z - body.diaphragm
    table = np.abs(y - 128 - 0.0006 * x**2) - 5
    paint(image, table.astype(np.float32), -350.0, width)
    paint(image, body.skin, _FAT_HU + 8 * smooth_field(body.axes, 40.0, rng), width)
    fat = body.cavity - body.skin
    wall = np.maximum(body.skin + 0.55 * fat, -(body.cavity + 1)) + _bumps(body, 30.0, 2.0, rng)
    paint(image, wall, muscle_hu, width)
    for side in (-1, 1):
        back = np.hypot((x - 36 * side) / 1.35, y - 84) - 20
        paint(image, np.maximum(back, body.skin + 8).astype(np.float32), muscle_hu - 3, width)
        psoas = np.hypot(x - 36 * side, y - 58) - 13 - 0.06 * np.clip(-z - 60, 0, 60)
        paint(image, np.maximum(psoas, z + 40).astype(np.float32), muscle_hu, width)
    paint(image, np.maximum(body.cavity + 4, below), _FAT_HU + 6 * smooth_field(body.axes, 25.0, rng), width)
    _paint_bowel(image, body, muscle_hu, rng)

    def similar(low: float, high: float) -> float:
        return liver_hu + float(rng.uniform(low, high))

    for side in (-1, 1):
        kidney = _kidney_distance(body, side) + _bumps(body, 30.0, 2.0, rng)
        paint(image, kidney, similar(-6, 35), width)
        sinus = ellipsoid(body.coords, (-48 - 9 * (side < 0), 40, 50 * side), (24, 9, 9))
        paint(image, sinus, -60.0, width)
    stomach = ellipsoid(body.coords, (22, -28, 66), (58, 38, 42), rotation_3d(rng, 25))
    stomach = np.maximum(stomach + _bumps(body, 35.0, 5.0, rng), np.maximum(below + 5, body.cavity + 6))
    paint(image, stomach, similar(-35, 0), width)
    contents = similar(-85, 25)
    paint(image, stomach + 6, contents, width)
    gas = np.maximum(stomach + 6, y + rng.uniform(30, 60))
    paint(image, gas.astype(np.float32), -900.0, width)
    spleen = ellipsoid(body.coords, (18, 34, 104), (52, 50, 33), rotation_3d(rng, 20))
    spleen = np.maximum(spleen + _bumps(body, 35.0, 4.0, rng), np.maximum(below + 3, body.cavity + 3))
    spleen = smooth_cut(smooth_cut(spleen, stomach - 3, 5.0), _kidney_distance(body, 1) - 4, 5.0)
    paint(image, spleen, similar(-8, 18), width)
    _paint_chest(image, body, below, similar(5, 45), rng)
    blood = similar(15, 50)
    paint(image, (np.hypot(x + 20, y - 34) - 11).astype(np.float32), blood - 8, width)
    paint(image, (np.hypot(x - 14, y - 32) - 11).astype(np.float32), blood, width)
    _paint_bones(image, body, rng)


def _paint_bowel(image: Array, body: _Body, muscle_hu: float, rng: np.random.Generator) -> None:
    """Paint loops of bowel in the front and lower abdomen, some with gas, and the pancreas across the middle."""
    loops = 14 * (0.32 - np.abs(smooth_field(body.axes, 26.0, rng)))
    where = np.maximum(body.cavity + 8, np.maximum(body.z + 12 - 0.35 * body.x, body.y - 35))
    loops = np.maximum(loops, where).astype(np.float32)
    content = muscle_hu + 22 * smooth_field(body.axes, 30.0, rng)
    paint(image, loops, content, body.width_mm)
    gas = np.maximum(loops + 5, 12 * (1.5 - smooth_field(body.axes, 30.0, rng)))
    paint(image, gas.astype(np.float32), -850.0, body.width_mm)
    pancreas = ellipsoid(body.coords, (-8, 12, 25), (12, 11, 62), rotation_3d(rng, 15))
    paint(image, pancreas + _bumps(body, 15.0, 3.0, rng), muscle_hu + 25, body.width_mm)


def _paint_chest(image: Array, body: _Body, below: Array, heart_hu: float, rng: np.random.Generator) -> None:
    """Paint the bases of the lungs above the diaphragm, and the heart between them."""
    middle = np.hypot(body.x / 34, (body.y - 20) / 60) * 34 - 34
    lung = np.maximum(body.cavity + 3, np.maximum(-below, -middle))
    texture = 40 * smooth_field(body.axes, 14.0, rng)
    paint(image, lung.astype(np.float32), -840 + texture, body.width_mm)
    paint(image, _heart_distance(body) + _bumps(body, 40.0, 3.0, rng), heart_hu, body.width_mm)


def _paint_bones(image: Array, body: _Body, rng: np.random.Generator) -> None:
    """Paint the vertebrae with discs and canal, and ribs that slope down to the front along the wall."""
    x, y, z, width = body.x, body.y, body.z, body.width_mm
    spine = _spine_distance(body)
    pitch, phase = rng.uniform(29, 34), rng.uniform(0, 30)
    disc = np.abs((z + phase) % pitch - pitch / 2) - pitch / 2 + 5.0
    paint(image, spine, 85.0, width)
    paint(image, np.maximum(spine, -disc - 3).astype(np.float32), rng.uniform(170, 260), width)
    arch = np.hypot(x, 0.75 * (y - 92)) - 17
    arch = np.maximum(arch, -(disc * 0.6 + 3))
    paint(image, arch.astype(np.float32), 330.0, width)
    paint(image, (np.hypot(x, y - 86) - 8).astype(np.float32), 25.0, width)
    angle = np.arctan2(np.abs(x), y)  # 0 at the back, pi at the front
    level = z + rng.uniform(70, 95) * (angle / np.pi) ** 1.3 + rng.uniform(0, 28)
    gap = rng.uniform(26, 31)
    along = np.abs(level % gap - gap / 2)
    rib = np.hypot(along / 1.25, (body.cavity - 2.5) / 0.8) - 4.6
    # Ribs end further back the lower they are: the arch of the costal margin.
    end = 55 * (angle - np.clip(1.15 + 0.012 * (np.floor(level / gap) * gap + 110), 0.9, 2.45))
    paint(image, np.maximum(rib, end).astype(np.float32), rng.uniform(380, 560), width)
