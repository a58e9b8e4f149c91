"""Shared geometry of the phantoms: smooth random fields, signed distances, soft painting, curves and tubes.

Everything works in millimetres. A *signed distance* is negative inside of a shape; painting turns it into
the fraction of each voxel that the shape covers, which is how a scanner's partial volume comes about.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

Array = np.ndarray
Point = Sequence[float]

_SPLINE_VARIANCE = 151.0 / 315.0
"""Mean over positions of the sum of squares of the cubic B-spline weights: the variance of splined white noise."""


def centred_axis(count: int, step_mm: float, centre_mm: float = 0.0) -> Array:
    """Return the positions in mm of `count` voxel centres, `step_mm` apart, around `centre_mm` (float32)."""
    return ((np.arange(count) - (count - 1) / 2) * step_mm + centre_mm).astype(np.float32)


def mesh(axes: Sequence[Array]) -> tuple[Array, ...]:
    """Return one full float32 coordinate array per axis, in the order of the axes."""
    return tuple(np.ascontiguousarray(g, dtype=np.float32) for g in np.meshgrid(*axes, indexing="ij"))


def _spline_weights(axis: Array, length_mm: float, shift: float) -> Array:
    """Return the (len(axis), knots) matrix of cubic B-spline weights for knots `length_mm` apart."""
    position = (np.asarray(axis, dtype=np.float64) - float(np.min(axis))) / length_mm + shift
    knots = int(np.ceil(position.max())) + 4
    t = np.abs(position[:, None] - (np.arange(knots)[None, :] - 1))
    near = 2.0 / 3.0 - t**2 + t**3 / 2
    far = np.clip(2.0 - t, 0.0, None) ** 3 / 6
    return np.where(t < 1, near, far).astype(np.float32)


def smooth_field(axes: Sequence[Array], length_mm: float, rng: np.random.Generator) -> Array:
    """Return a smooth random field of mean 0 and standard deviation 1 on the grid of the axes.

    White noise on knots `length_mm` apart, interpolated by cubic B-splines; separable, so the cost is a few
    multiply-adds per voxel. float32.
    """
    weights = [_spline_weights(axis, length_mm, rng.uniform()) for axis in axes]
    field: Array = rng.standard_normal([w.shape[1] for w in weights]).astype(np.float32)
    # Contracting the last axis each time and rolling the result to the front ends in the original order.
    for weight in reversed(weights):
        field = np.moveaxis(field @ weight.T, -1, 0)
    scale = _SPLINE_VARIANCE ** (-len(axes) / 2)
    return np.ascontiguousarray(field * np.float32(scale))


def rotation_2d(degrees: float) -> Array:
    """Return the 2x2 rotation matrix of an angle in degrees."""
    angle = np.deg2rad(degrees)
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], dtype=np.float64)


def rotation_3d(rng: np.random.Generator, max_degrees: float) -> Array:
    """Return a 3x3 rotation about a random axis by up to `max_degrees`."""
    axis = rng.standard_normal(3)
    axis /= np.linalg.norm(axis)
    angle = np.deg2rad(rng.uniform(-max_degrees, max_degrees))
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross)


def ellipsoid(coords: Sequence[Array], centre: Point, radii: Point, rotation: Array | None = None) -> Array:
    """Return the approximate signed distance in mm to an ellipsoid (any number of axes), float32.

    First-order distance k0 (k0 - 1) / k1 with k0 = |p / r| and k1 = |p / r^2|: exact at the surface.
    """
    offset = [c - np.float32(m) for c, m in zip(coords, centre, strict=True)]
    if rotation is not None:
        turned = np.asarray(rotation, dtype=np.float32)
        offset = [sum(turned[i, j] * offset[j] for j in range(len(offset))) for i in range(len(offset))]
    k0 = np.sqrt(sum((p * np.float32(1 / r)) ** 2 for p, r in zip(offset, radii, strict=True)))
    k1 = np.sqrt(sum((p * np.float32(1 / r**2)) ** 2 for p, r in zip(offset, radii, strict=True)))
    middle = k1 < 1e-6  # the quotient is 0 / 0 there
    return np.where(middle, -min(radii), k0 * (k0 - 1) / np.where(middle, 1, k1)).astype(np.float32)


def smooth_union(a: Array, b: Array, blend_mm: float) -> Array:
    """Return the signed distance of the union of two shapes with the crease rounded over `blend_mm`."""
    h = np.clip(0.5 + 0.5 * (b - a) / blend_mm, 0.0, 1.0)
    return np.asarray(b + (a - b) * h - blend_mm * h * (1 - h), dtype=np.float32)


def smooth_cut(a: Array, b: Array, blend_mm: float) -> Array:
    """Return the signed distance of shape `a` without shape `b`, the edge rounded over `blend_mm`."""
    return -smooth_union(-a, b, blend_mm)


def largest_part(distance: Array, outside: float) -> Array:
    """Return the signed distance with every part but the largest pushed `outside`: an organ has no islands."""
    parts, count = ndimage.label(distance < 0)
    if count < 2:
        return distance
    keep = int(np.argmax(np.bincount(parts.ravel())[1:])) + 1
    islands = ndimage.binary_dilation((parts > 0) & (parts != keep)) & (parts != keep)
    return np.where(islands, np.maximum(distance, np.float32(outside)), distance).astype(np.float32)


def coverage(distance: Array, width_mm: float) -> Array:
    """Return the fraction of a voxel of size `width_mm` that a shape covers, from its signed distance."""
    return np.clip(np.float32(0.5) - distance * np.float32(1 / width_mm), 0, 1)


def paint(image: Array, distance: Array, value: float | Array, width_mm: float) -> None:
    """Mix `value` into the image in place where the shape is, with partial volume at its surface."""
    image += coverage(distance, width_mm) * (value - image)


def spline_curve(points: Array, per_span: int) -> Array:
    """Return a Catmull-Rom curve through the (K, D) points with `per_span` samples per span and both ends."""
    p = np.asarray(points, dtype=np.float64)
    if len(p) < 2:
        return p
    padded = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    a, b, c, d = padded[:-3], padded[1:-2], padded[2:-1], padded[3:]
    t = (np.arange(per_span) / per_span)[None, :, None]
    a, b, c, d = (q[:, None, :] for q in (a, b, c, d))
    curve = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    return np.concatenate([curve.reshape(-1, p.shape[1]), p[-1:]])


def empty_distance(axes: Sequence[Array]) -> Array:
    """Return a signed-distance array on the grid of the axes with nothing in it yet."""
    return np.full([len(a) for a in axes], 1e3, dtype=np.float32)


def add_tube(distance: Array, axes: Sequence[Array], points: Array, radii_mm: Array, margin_mm: float) -> None:
    """Lower the signed distance in place to that of a tapering tube along the (K, D) polyline of points.

    `radii_mm` holds one radius per point; the distance is right up to `margin_mm` outside of the tube. The axes ascend
    evenly and the points are in their order (z, y, x). Only the box around each segment is visited.
    """
    steps = [float(a[1] - a[0]) for a in axes]
    starts = [float(a[0]) for a in axes]
    for p, q, rp, rq in zip(points[:-1], points[1:], radii_mm[:-1], radii_mm[1:], strict=True):
        reach = max(rp, rq) + margin_mm
        box = []
        for k, axis in enumerate(axes):
            low = int(np.ceil((min(p[k], q[k]) - reach - starts[k]) / steps[k]))
            high = int(np.floor((max(p[k], q[k]) + reach - starts[k]) / steps[k])) + 1
            box.append(slice(max(low, 0), min(high, len(axis))))
        if any(s.start >= s.stop for s in box):
            continue
        offset = [
            (axes[k][s] - np.float32(p[k])).reshape([-1 if j == k else 1 for j in range(len(axes))])
            for k, s in enumerate(box)
        ]
        along = (np.asarray(q, dtype=np.float32) - np.asarray(p, dtype=np.float32)).astype(np.float32)
        length2 = max(float(along @ along), 1e-9)
        t = sum(o * np.float32(v / length2) for o, v in zip(offset, along, strict=True))
        t = np.clip(t, 0, 1)
        square = sum((o - t * v) ** 2 for o, v in zip(offset, along, strict=True))
        part = distance[tuple(box)]
        np.minimum(part, np.sqrt(square) - (np.float32(rp) + t * np.float32(rq - rp)), out=part)


def ct_noise(shape: Sequence[int], white_hu: float, grain_hu: float, rng: np.random.Generator) -> Array:
    """Return CT noise: a white part and a grainy part correlated over about a voxel in-plane (float32, HU)."""
    noise = rng.standard_normal(shape, dtype=np.float32) * np.float32(white_hu)
    grain = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), (0.0, 0.8, 0.8))
    return np.asarray(noise + grain * np.float32(grain_hu / max(float(grain.std()), 1e-6)), dtype=np.float32)


def lps_affine(spacing_mm: Sequence[float], origin_mm: Sequence[float]) -> Array:
    """Return the 4x4 NIfTI matrix of a volume whose voxels run right to left, front to back, feet to head.

    `spacing_mm` is (z, y, x); `origin_mm` is the RAS position (x, y, z) of the first voxel.
    """
    z, y, x = spacing_mm
    affine = np.diag([-x, -y, z, 1.0]).astype(np.float64)
    affine[:3, 3] = origin_mm
    return affine


def flip_volume(arrays: Sequence[Array], affine: Array, flip_x: bool, flip_y: bool) -> tuple[list[Array], Array]:
    """Flip (Z, Y, X) arrays along x and y and change the affine so that every voxel stays where it was."""
    out, matrix = list(arrays), affine.copy()
    for flip, column, axis in ((flip_x, 0, 2), (flip_y, 1, 1)):
        if flip:
            last = out[0].shape[axis] - 1
            matrix[:3, 3] += matrix[:3, column] * last
            matrix[:3, column] *= -1
            out = [np.flip(a, axis) for a in out]
    return [np.ascontiguousarray(a) for a in out], matrix
