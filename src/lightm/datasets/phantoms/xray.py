"""Chest radiograph phantom: the projection of a thorax, with the lungs (1) as they are usually drawn.

Attenuation adds up along the rays: soft tissue, air in the lungs, two layers of ribs, spine, clavicles,
shoulder blades, heart and diaphragm. The label is the lung field as in the Montgomery and Shenzhen sets: the
silhouette of the lungs without the mediastinum, the heart and what the diaphragm hides. Coordinates are
(y down, x to the right of the picture) in units of half the picture's width; the patient's right is on the left.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from lightm.datasets.phantoms.shapes import (
    Array,
    add_tube,
    centred_axis,
    ellipsoid,
    empty_distance,
    largest_part,
    mesh,
    rotation_2d,
    smooth_cut,
    smooth_field,
    smooth_union,
    spline_curve,
)
from lightm.images.volume import Volume

LABELS = {"background": 0, "lung": 1}
CHANNELS = {"0": "xray"}


def xray_case(size: int, rng: np.random.Generator) -> tuple[Volume, Volume]:
    """Return one (image, label) pair of the chest radiograph phantom.

    Both are uint8 of shape (size, size); the label is 0 background, 1 lung. Cost grows with size^2: about
    0.1 s at size 256.
    """
    pixel = 2.0 / size
    plain = [centred_axis(size, pixel), centred_axis(size, pixel)]
    # Patients stand a little turned, off the middle and at differing distance.
    turn = rotation_2d(rng.normal(0, 3.0)) * rng.uniform(0.92, 1.12)
    shift = rng.normal(0, 0.035, 2)
    py, px = mesh(plain)
    y = np.float32(turn[0, 0]) * py + np.float32(turn[0, 1]) * px + np.float32(shift[0])
    x = np.float32(turn[1, 0]) * py + np.float32(turn[1, 1]) * px + np.float32(shift[1])
    y = y + np.float32(0.018) * smooth_field(plain, 0.7, rng)
    x = x + np.float32(0.018) * smooth_field(plain, 0.7, rng)

    scale = rng.uniform(0.9, 1.1, 3)  # width, apex height, base height
    lungs, mediastinum = _lungs(y, x, scale, rng)
    attenuation = _soft_tissue(y, x, lungs, mediastinum, plain, rng)
    attenuation += _bones(y, x, plain, turn, shift, scale, pixel, rng)
    attenuation += _findings(y, x, lungs, plain, rng)
    label = (np.minimum(*lungs) < 0).astype(np.uint8)
    image = _expose(attenuation, plain, size, rng)
    affine = np.eye(4)
    return Volume(image, (1.0, 1.0), affine), Volume(label, (1.0, 1.0), affine)


def _lungs(y: Array, x: Array, scale: Array, rng: np.random.Generator) -> tuple[tuple[Array, Array], Array]:
    """Return the signed distances of the picture's left and right lung field, and of the mediastinum."""
    wide, high, low = (float(s) for s in scale)
    heart_x, heart_size = rng.uniform(0.08, 0.15), rng.uniform(0.9, 1.2)
    heart = ellipsoid((y, x), (0.30 * low, heart_x), (0.23 * heart_size, 0.29 * heart_size), rotation_2d(-30))
    atrium = ellipsoid((y, x), (0.27 * low, -0.09), (0.19, 0.11 * heart_size))
    heart = smooth_union(heart, atrium, 0.08)
    waist = rng.uniform(0.10, 0.15)
    middle = np.abs(x) - waist - 0.05 * np.clip(y, -0.2, 0.5) + 0.05 * np.clip(-y - 0.5, 0, 1)
    knob = ellipsoid((y, x), (-0.25, 0.12), (0.09, rng.uniform(0.06, 0.10)))
    hila = np.minimum(ellipsoid((y, x), (0.0, -0.13), (0.14, 0.07)), ellipsoid((y, x), (-0.04, 0.14), (0.12, 0.07)))
    mediastinum = smooth_union(np.minimum(heart, knob), np.minimum(middle, hila + 0.03), 0.05)
    fields = []
    for side in (-1, 1):
        # An egg with a narrow top: the wall leans in toward the apex.
        half = 0.62 * wide * (1 - 0.42 * np.clip(-(y + 0.05) / (0.72 * high), 0, 1) ** 2.2)
        wall = side * x - half
        apex = ellipsoid((y, x), (-0.20, 0.30 * side * wide), (0.52 * high, 0.32 * wide))
        upper = np.where(y < -0.2, np.maximum(apex, wall), wall).astype(np.float32)
        base = 0.47 * low + (0.05 if side > 0 else 0.0) + rng.uniform(-0.03, 0.03)
        # The dome is highest inside of its middle and falls to the sharp angle at the wall.
        dome = y - base - rng.uniform(0.9, 1.5) * (side * x - 0.27 * wide) ** 2
        lung = smooth_cut(np.maximum(upper, dome), mediastinum, 0.03)
        fields.append(largest_part(np.maximum(lung, -side * x + 0.02).astype(np.float32), 0.05))
    return (fields[0], fields[1]), mediastinum


def _soft_tissue(
    y: Array, x: Array, lungs: tuple[Array, Array], mediastinum: Array, axes: list[Array], rng: np.random.Generator
) -> Array:
    """Return the attenuation of the soft tissues less the air, in units of a typical chest's thickness."""
    shoulders = 0.86 + 0.5 * np.clip(-y - 0.45, -0.02, 0.5)
    neck = np.where(y < -0.72, 1.0 - 2.2 * (-0.72 - y), 1.0)
    body = np.clip(1 - (np.abs(x) / (shoulders * np.clip(neck, 0.3, 1))) ** 2.6, 0, 1)
    total = (0.95 + 0.25 * np.clip(y, -0.5, 1)) * np.sqrt(body)
    for lung in lungs:
        inside = np.clip(-lung / 0.30, 0, 1)
        total -= rng.uniform(0.60, 0.70) * np.sqrt(1 - (1 - inside) ** 2)
    within = np.clip(-mediastinum / 0.16, 0, 1)
    total += 0.26 * np.sqrt(1 - (1 - within) ** 2)
    total -= 0.16 * np.clip(1 - np.abs(x) / 0.045, 0, 1) * np.clip(-(y + 0.05) / 0.1, 0, 1)  # trachea
    total += 0.18 * np.clip(0.5 - (0.55 - y) / 0.2, 0, 1) * np.sqrt(body)
    if rng.random() < 0.6:  # gas in the stomach under the left dome
        gas = ellipsoid((y, x), (0.66, 0.33), (0.06, 0.10))
        total -= rng.uniform(0.1, 0.25) * np.clip(-gas / 0.05, 0, 1)
    # Vessels fan out from the hila and fade to the wall.
    fan = smooth_field(axes, 0.07, rng) + 0.7 * smooth_field(axes, 0.035, rng)
    near = np.exp(-np.minimum(np.hypot(y, x + 0.16), np.hypot(y + 0.03, x - 0.17)) / 0.22)
    total += np.where(np.minimum(*lungs) < 0, 0.10 * near * np.clip(fan + 0.3, 0, 3) + 0.012 * fan, 0)
    return np.asarray(total, dtype=np.float32)


def _bones(
    y: Array, x: Array, axes: list[Array], turn: Array, shift: Array, scale: Array, pixel: float,
    rng: np.random.Generator,
) -> Array:  # fmt: skip
    """Return the attenuation of ribs, clavicles, shoulder blades and spine."""
    wide, high, low = (float(s) for s in scale)
    bone = np.zeros_like(y)

    def add(points: Array, radius: float, density: float) -> None:
        tube = empty_distance(axes)
        # From anatomical (y, x) to places in the picture: the inverse of the coordinates' turn.
        curve = np.asarray((spline_curve(points, 5) - shift) @ np.linalg.inv(turn).T)
        add_tube(tube, axes, curve, np.full(len(curve), radius), 2 * pixel)
        inside = np.clip(-tube / radius, 0, 1)
        # A hollow tube: the cortex shows at the edges more than the marrow in the middle.
        chord = np.sqrt(1 - (1 - inside) ** 2) - 0.55 * np.sqrt(np.clip(1 - ((1 - inside) / 0.72) ** 2, 0, 1))
        np.add(bone, density * chord, out=bone)

    gap, slope = rng.uniform(0.125, 0.14), rng.uniform(0.12, 0.22)
    strength = rng.uniform(0.10, 0.17)
    for k in range(10):
        top = -0.78 * high + gap * k * (high + low) / 2
        half = wide * (0.66 - 0.36 * np.clip((5.2 - k) / 5.2, 0, 1) ** 2.2)
        for side in (-1, 1):
            t = np.linspace(0, 1, 9)
            # Back half: from the spine up a little, then out and down to the wall.
            out = 0.07 + (half - 0.07) * np.sin(t * np.pi / 2)
            drop = top + slope * t**1.6 - 0.05 * np.sin(np.pi * t)
            add(np.stack([drop, side * out], 1), 0.024, strength)
            if 0 < k < 8:  # front half: from the wall in and further down, and it ends where cartilage begins
                t = np.linspace(0, rng.uniform(0.6, 0.75), 8)
                inward = half - (half - 0.08) * (1 - np.cos(t * np.pi / 2)) * 1.25
                fall = top + slope + (0.20 + 0.012 * k) * np.sin(t * np.pi / 2) ** 1.1
                add(np.stack([fall, side * inward], 1), 0.027, 0.7 * strength)
    lift = rng.uniform(-0.06, 0.05)
    for side in (-1, 1):
        collar = np.array([[-0.52, 0.07], [-0.58, 0.22], [-0.64 + lift, 0.42], [-0.66 + lift, 0.66]])
        add(collar * [1, side], 0.030, 1.5 * strength)
        blade = np.array([[-0.50, 0.72 * wide], [-0.25, 0.66 * wide], [0.0, 0.60 * wide]]) + rng.normal(0, 0.02, 2)
        add(blade * [1, side], 0.022, 0.8 * strength)
        arm = np.array([[-0.62, 0.80], [-0.3, 0.92], [0.1, 0.97]])
        add(arm * [1, side], 0.07, 1.8 * strength)
    height = rng.uniform(0.095, 0.11)
    discs = 0.8 + 0.2 * np.tanh(6 * np.cos(2 * np.pi * y / height))
    column = np.clip(0.5 - (np.abs(x) - 0.068) / 0.02, 0, 1)
    bone += 0.20 * column * discs * (0.8 + 0.4 * np.clip(y, -1, 1))
    return bone


def _findings(y: Array, x: Array, lungs: tuple[Array, Array], axes: list[Array], rng: np.random.Generator) -> Array:
    """Return the attenuation of opacities in the lungs: patches, nodules, haze at a base; often none."""
    out = np.zeros_like(y)
    inside = np.minimum(*lungs)
    if rng.random() < 0.4:
        return out
    index = np.flatnonzero(inside < -0.03)
    for _ in range(int(rng.integers(1, 6))):
        spot = int(index[rng.integers(len(index))])
        cy, cx = float(y.flat[spot]), float(x.flat[spot])
        size = float(rng.choice([0.025, 0.06, 0.12], p=[0.4, 0.35, 0.25])) * rng.uniform(0.7, 1.4)
        blob = np.exp(-0.5 * (((y - cy) / size) ** 2 + ((x - cx) / size) ** 2))
        out += rng.uniform(0.08, 0.30) * blob * np.clip(1 + 0.5 * smooth_field(axes, 0.06, rng), 0, 2)
    if rng.random() < 0.3:
        side = int(rng.integers(2))
        level = rng.uniform(0.30, 0.45)
        out += rng.uniform(0.1, 0.35) * np.clip((y - level) / 0.15, 0, 1) * (lungs[side] < 0)
    return np.asarray(out * np.clip(0.5 - inside / 0.02, 0, 1), dtype=np.float32)


def _expose(attenuation: Array, axes: list[Array], size: int, rng: np.random.Generator) -> Array:
    """Return the 8-bit picture: photon noise, blur, the film's response, collimation and a side marker."""
    scatter = ndimage.gaussian_filter(attenuation, size / 14)
    picture = attenuation - 0.25 * scatter
    dose = rng.uniform(0.015, 0.04)
    noise = rng.standard_normal(picture.shape, dtype=np.float32) * np.exp(0.5 * attenuation)
    picture = ndimage.gaussian_filter(picture + np.float32(dose) * noise, max(0.35, size / 700))
    picture = picture + 0.04 * smooth_field(axes, 1.0, rng)
    low, high = np.percentile(picture, [rng.uniform(0.5, 4), rng.uniform(97, 99.8)])
    picture = np.clip((picture - low) / max(float(high - low), 1e-6), 0, 1) ** rng.uniform(0.75, 1.35)
    picture = rng.uniform(0, 0.08) + picture * rng.uniform(0.78, 0.92)
    if rng.random() < 0.25:
        edge = max(1, round(size * rng.uniform(0.01, 0.05)))
        frame = np.zeros_like(picture, dtype=bool)
        frame[:, :edge] = frame[:, -edge:] = True
        picture[frame] = 0.01
    if rng.random() < 0.5:
        h, w = max(2, size // 24), max(2, size // 40)
        top, left = round(size * rng.uniform(0.04, 0.12)), round(size * rng.uniform(0.84, 0.92))
        picture[top : top + h, left : left + max(1, w // 3)] = 1.0
        picture[top + h - max(1, w // 3) : top + h, left : left + w] = 1.0
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
