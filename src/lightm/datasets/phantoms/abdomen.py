"""The patient around the liver of the abdominal phantom: the body's shape, and every organ but the liver.

Coordinates are millimetres in the LPS frame (x to the patient's left, y to the back, z to the head). One smooth
displacement deforms the whole anatomy; every organ then gets bumps of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightm.datasets.phantoms.shapes import (
    Array,
    centred_axis,
    ellipsoid,
    mesh,
    paint,
    rotation_3d,
    smooth_cut,
    smooth_field,
)

_FAT_HU = -100.0
_HALF_X_MM, _HALF_Y_MM = 165.0, 115.0


@dataclass
class Body:
    """The grid of one patient, the deformed coordinates on it and the distances shared by all organs.

    axes: voxel centres in mm along (z, y, x). z, y, x: the coordinates of every voxel in the reference body, in
    mm. skin, cavity: signed distances of the body and of the space inside of the muscles. diaphragm: its height
    z over every voxel. width_mm: the mean voxel size, over which surfaces are blurred by partial volume.
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
        """The deformed coordinates, (z, y, x)."""
        return self.z, self.y, self.x


def make_body(size: int, rng: np.random.Generator) -> Body:
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
    axes = [
        centred_axis(nz, step_z, (low + high) / 2),
        centred_axis(nx, in_plane, float(shift[0])),
        centred_axis(nx, in_plane, float(shift[1])),
    ]
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
    domes = [
        (rng.uniform(68, 84), -72.0, 0.0),
        (rng.uniform(52, 70), 78.0, 5.0),
        (rng.uniform(45, 54), 5.0, -20.0),
    ]
    diaphragm = np.max([h - ((x - cx) ** 2 + 0.7 * (y - cy) ** 2) / 110.0 for h, cx, cy in domes], axis=0)
    width = float((in_plane + step_z) / 2)
    return Body(axes, (step_z, in_plane, in_plane), z, y, x, skin, cavity, diaphragm.astype(np.float32), width)


def bumps(body: Body, length_mm: float, height_mm: float, rng: np.random.Generator) -> Array:
    """Return a smooth random height in mm to add to a signed distance."""
    return np.float32(height_mm) * smooth_field(body.axes, length_mm, rng)


def heart_distance(body: Body) -> Array:
    """Return the signed distance of the heart."""
    return ellipsoid(body.coords, (98, -38, 28), (46, 48, 62))


def kidney_distance(body: Body, side: int) -> Array:
    """Return the signed distance of the kidney on a side, -1 right and 1 left."""
    return ellipsoid(body.coords, (-48 - 9 * (side < 0), 42, 60 * side), (50, 25, 27))


def spine_distance(body: Body) -> Array:
    """Return the signed distance of the column of vertebrae and discs."""
    return np.asarray(np.hypot(body.x, 0.9 * (body.y - 62)) - 22, dtype=np.float32)


def paint_surroundings(image: Array, body: Body, liver_hu: float, rng: np.random.Generator) -> None:
    """Paint everything but the liver, from the skin inwards."""
    z, y, x, width = body.z, body.y, body.x, body.width_mm
    muscle_hu = rng.uniform(52, 70)
    below = z - body.diaphragm
    table = np.abs(y - 128 - 0.0006 * x**2) - 5
    paint(image, table.astype(np.float32), -350.0, width)
    paint(image, body.skin, _FAT_HU + 8 * smooth_field(body.axes, 40.0, rng), width)
    fat = body.cavity - body.skin
    wall = np.maximum(body.skin + 0.55 * fat, -(body.cavity + 1)) + bumps(body, 30.0, 2.0, rng)
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
        kidney = kidney_distance(body, side) + bumps(body, 30.0, 2.0, rng)
        paint(image, kidney, similar(-6, 35), width)
        sinus = ellipsoid(body.coords, (-48 - 9 * (side < 0), 40, 50 * side), (24, 9, 9))
        paint(image, sinus, -60.0, width)
    stomach = ellipsoid(body.coords, (22, -28, 66), (58, 38, 42), rotation_3d(rng, 25))
    stomach = np.maximum(stomach + bumps(body, 35.0, 5.0, rng), np.maximum(below + 5, body.cavity + 6))
    paint(image, stomach, similar(-35, 0), width)
    contents = similar(-85, 25)
    paint(image, stomach + 6, contents, width)
    gas = np.maximum(stomach + 6, y + rng.uniform(30, 60))
    paint(image, gas.astype(np.float32), -900.0, width)
    spleen = ellipsoid(body.coords, (18, 34, 104), (52, 50, 33), rotation_3d(rng, 20))
    spleen = np.maximum(spleen + bumps(body, 35.0, 4.0, rng), np.maximum(below + 3, body.cavity + 3))
    spleen = smooth_cut(smooth_cut(spleen, stomach - 3, 5.0), kidney_distance(body, 1) - 4, 5.0)
    paint(image, spleen, similar(-8, 18), width)
    _paint_chest(image, body, below, similar(5, 45), rng)
    blood = similar(15, 50)
    paint(image, (np.hypot(x + 20, y - 34) - 11).astype(np.float32), blood - 8, width)
    paint(image, (np.hypot(x - 14, y - 32) - 11).astype(np.float32), blood, width)
    _paint_bones(image, body, rng)


def _paint_bowel(image: Array, body: Body, muscle_hu: float, rng: np.random.Generator) -> None:
    """Paint loops of bowel in the front and lower abdomen, some with gas, and the pancreas across the middle."""
    loops = 14 * (0.32 - np.abs(smooth_field(body.axes, 26.0, rng)))
    where = np.maximum(body.cavity + 8, np.maximum(body.z + 12 - 0.35 * body.x, body.y - 35))
    loops = np.maximum(loops, where).astype(np.float32)
    content = muscle_hu + 22 * smooth_field(body.axes, 30.0, rng)
    paint(image, loops, content, body.width_mm)
    gas = np.maximum(loops + 5, 12 * (1.5 - smooth_field(body.axes, 30.0, rng)))
    paint(image, gas.astype(np.float32), -850.0, body.width_mm)
    pancreas = ellipsoid(body.coords, (-8, 12, 25), (12, 11, 62), rotation_3d(rng, 15))
    paint(image, pancreas + bumps(body, 15.0, 3.0, rng), muscle_hu + 25, body.width_mm)


def _paint_chest(image: Array, body: Body, below: Array, heart_hu: float, rng: np.random.Generator) -> None:
    """Paint the bases of the lungs above the diaphragm, and the heart between them."""
    middle = np.hypot(body.x / 34, (body.y - 20) / 60) * 34 - 34
    lung = np.maximum(body.cavity + 3, np.maximum(-below, -middle))
    texture = 40 * smooth_field(body.axes, 14.0, rng)
    paint(image, lung.astype(np.float32), -840 + texture, body.width_mm)
    paint(image, heart_distance(body) + bumps(body, 40.0, 3.0, rng), heart_hu, body.width_mm)


def _paint_bones(image: Array, body: Body, rng: np.random.Generator) -> None:
    """Paint the vertebrae with discs and canal, and ribs that slope down to the front along the wall."""
    x, y, z, width = body.x, body.y, body.z, body.width_mm
    spine = spine_distance(body)
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
