"""Chest CT phantom: lungs with arteries (1), veins (2) and airways (3) as branching trees.

Coordinates are millimetres in the LPS frame (x to the patient's left, y to the back, z to the head); arrays
are (z, y, x). Arteries and veins have nearly the same density: what tells them apart is that arteries run
beside airways and come from the heart's front, while veins run between and end in the left atrium.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from lightm.datasets.phantoms.shapes import (
    Array,
    add_tube,
    centred_axis,
    ct_noise,
    ellipsoid,
    empty_distance,
    flip_volume,
    lps_affine,
    mesh,
    paint,
    smooth_cut,
    smooth_field,
    smooth_union,
    spline_curve,
)
from lightm.images.volume import Volume

LABELS = {"background": 0, "artery": 1, "vein": 2, "airway": 3}
CHANNELS = {"0": "CT"}

_CARINA = np.array([25.0, 8.0, 0.0])
_ATRIUM = np.array([-22.0, 12.0, 2.0])
_TRUNK = np.array([2.0, -22.0, 12.0])
_TAPER = 0.80  # of the radius from one generation to the next


def vessels_case(size: int, rng: np.random.Generator) -> tuple[Volume, Volume]:
    """Return one (image, label) pair of the chest CT phantom.

    `size` is the typical number of voxels across the chest; shape and spacing vary around it. The thinnest
    branches are about one voxel in radius. The image is int16 HU, the label uint8 with 0 background, 1 artery,
    2 vein, 3 airway (its lumen). Cost grows with size^3: about 0.3 s at size 96.
    """
    half_x, half_y = rng.uniform(128, 148), rng.uniform(88, 100)
    nx = max(16, round(size * rng.uniform(0.9, 1.1)))
    in_plane = 2 * half_x * rng.uniform(1.0, 1.12) / nx
    step_z = in_plane * rng.uniform(0.9, 1.35)
    nz = max(12, round(rng.uniform(200, 235) / step_z))
    ny = max(16, round(nx * rng.uniform(0.74, 0.84)))
    axes = [centred_axis(nz, step_z), centred_axis(ny, in_plane), centred_axis(nx, in_plane)]
    spacing = (step_z, in_plane, in_plane)
    width = (step_z + 2 * in_plane) / 3
    straight = mesh(axes)
    z, y, x = (c + rng.uniform(3, 6) * smooth_field(axes, 80.0, rng) for c in straight)
    lungs = _lung_distances(z, y, x, half_x, half_y)
    arteries, veins, airways = _grow(axes, lungs, width, rng)
    tubes = {name: _distance(t, axes, width) for name, t in (("a", arteries), ("v", veins), ("w", airways))}

    image = np.full(z.shape, -1000.0, dtype=np.float32)
    blood = float(rng.uniform(150, 320) if rng.random() < 0.6 else rng.uniform(35, 60))
    _paint_chest(image, axes, (z, y, x), (half_x, half_y), lungs, blood, width, rng)
    wall = max(1.3, 0.4 * width)
    paint(image, tubes["a"], blood, width)
    paint(image, tubes["v"], blood + rng.uniform(-14, 14), width)
    outer = np.maximum(tubes["w"] - wall, -np.minimum(tubes["a"], tubes["v"]))
    paint(image, outer, 20.0, width)
    paint(image, tubes["w"], -990.0, width)

    label = np.zeros(z.shape, dtype=np.uint8)
    # Where two trees touch, a voxel belongs to the one it lies deeper in.
    stack = np.stack([tubes["a"], tubes["v"], tubes["w"]])
    label[stack.min(axis=0) < 0] = (np.argmin(stack, axis=0) + 1).astype(np.uint8)[stack.min(axis=0) < 0]

    blur = rng.uniform(0.3, 0.5)
    image = ndimage.gaussian_filter(image, blur) + ct_noise(image.shape, rng.uniform(18, 32), rng.uniform(8, 14), rng)
    pixels = np.rint(np.clip(image, -1024, 1500)).astype(np.int16)
    origin = (-float(axes[2][0]), -float(axes[1][0]), float(axes[0][0]) + rng.uniform(-400, 100))
    flip = bool(rng.random() < 0.3)
    (pixels, label), affine = flip_volume([pixels, label], lps_affine(spacing, origin), flip, flip)
    return Volume(pixels, spacing, affine), Volume(label, spacing, affine)


def _lung_distances(z: Array, y: Array, x: Array, half_x: float, half_y: float) -> tuple[Array, Array]:
    """Return the signed distances of the right and the left lung."""
    taper = 1 - 0.25 * np.clip((z - 10) / 100, 0, 1) ** 2
    chest = ellipsoid((z * 0, y, x / taper), (0, 0, 0), (1e6, half_y - 22, half_x - 24))
    middle = np.hypot(x / 30, (y - 8) / 75) * 30 - 30
    heart = ellipsoid((z, y, x), (-48, -22, 20), (46, 44, 52))
    both = np.maximum(chest, z - 100 + 0.006 * (x**2 + y**2) * 0.6)
    both = smooth_cut(smooth_cut(both, middle, 8.0), heart - 2, 8.0)
    out = []
    for side, height in ((-1, -48.0), (1, -58.0)):
        dome = height - ((x - 62 * side) ** 2 + 0.7 * (y + 5) ** 2) / 130.0
        out.append(np.maximum(np.maximum(both, dome - z), -side * x).astype(np.float32))
    return out[0], out[1]


def _cloud(axes: list[Array], inside: Array, count: int, rng: np.random.Generator) -> Array:
    """Return `count` random (z, y, x) positions in mm where `inside` holds."""
    index = np.flatnonzero(inside)
    picked = np.unravel_index(index[rng.integers(len(index), size=count)], inside.shape)
    return np.stack(
        [a[i] + rng.uniform(-0.5, 0.5, count) * (a[1] - a[0]) for a, i in zip(axes, picked, strict=True)], 1
    )


def _grow(
    axes: list[Array], lungs: tuple[Array, Array], width: float, rng: np.random.Generator
) -> tuple[list[Branch], list[Branch], list[Branch]]:
    """Return the trees of arteries, veins and airways of both lungs."""
    thin = 0.95 * width
    arteries: list[Branch] = []
    airways: list[Branch] = []
    veins: list[Branch] = []
    carina = _CARINA + rng.normal(0, 3, 3)
    top = np.array([float(axes[0][-1]) + 20, -4.0, rng.uniform(-5, 5)])
    trachea = spline_curve(np.stack([top, (top + carina) / 2 + rng.normal(0, 3, 3), carina]), 8)
    bore = float(rng.uniform(7.5, 9.5))
    clouds = []
    for lung, side in zip(lungs, (-1.0, 1.0), strict=True):
        # Branches stay a few millimetres under the pleura; coarse grids have no voxel that deep.
        cloud = _cloud(axes, lung < max(-(thin + 3.0), 0.5 * float(lung.min())), 700, rng)
        tree = _grow_tree(
            carina, np.array([-0.7, 0.1, side]), cloud,
            radius_mm=0.78 * bore, smallest_mm=thin, generations=7, rng=rng,
        )  # fmt: skip
        beside = _accompany(tree, gap_mm=max(1.0, 0.45 * width), ratio=float(rng.uniform(0.92, 1.1)), rng=rng)
        hilum = beside[0].points[0]
        stem = spline_curve(np.stack([_TRUNK, (_TRUNK + hilum) / 2 + [6.0, 0.0, 4.0 * side], hilum]), 6)
        arteries.append(Branch(stem, np.linspace(10.0, beside[0].radii_mm[0], len(stem)), 0, -1))
        arteries += beside
        # Airways fade from CT a generation or two before the arteries beside them do.
        airways += [b for b in tree if b.generation < 5]
        clouds.append((cloud, tree + beside, side))
    airways.insert(0, Branch(trachea, np.full(len(trachea), bore), 0, -1))
    for cloud, others, side in clouds:
        # Veins drain what lies between the artery-airway pairs: keep the half of the cloud far from those.
        centres = np.concatenate([b.points for b in others])
        far = np.array([np.min(np.sum((centres - p) ** 2, axis=1)) for p in cloud])
        between = cloud[far > np.median(far)]
        for end in (0, 1):  # an upper and a lower vein a side
            order = between[:, 0] < np.quantile(between[:, 0], 0.5)
            part = between[order if end else ~order]
            start = _ATRIUM + np.array([(-6.0, 6.0)[end == 0], 0.0, 8.0 * side])
            tree = _grow_tree(
                start, np.array([0.0, 0.0, side]), part,
                radius_mm=float(rng.uniform(6.5, 8.0)), smallest_mm=thin, generations=6, rng=rng,
            )  # fmt: skip
            veins += _keep_apart(tree, others, gap_mm=0.8 * width)
    return arteries, veins, airways


def _distance(tree: list[Branch], axes: list[Array], width: float) -> Array:
    """Return the signed distance of all branches of a tree."""
    distance = empty_distance(axes)
    for branch in tree:
        add_tube(distance, axes, branch.points, branch.radii_mm, 2.5 * width)
    return distance


def _paint_chest(
    image: Array,
    axes: list[Array],
    coords: tuple[Array, Array, Array],
    half: tuple[float, float],
    lungs: tuple[Array, Array],
    blood: float,
    width: float,
    rng: np.random.Generator,
) -> None:
    """Paint the body, bones, heart, aorta and the texture of the lungs."""
    z, y, x = coords
    half_x, half_y = half
    skin = ellipsoid((z * 0, y, x), (0, 0, 0), (1e6, half_y, half_x))
    paint(image, skin, -100.0, width)
    wall = skin + rng.uniform(6, 12)
    paint(image, wall, rng.uniform(45, 60), width)
    fat = np.hypot(x / 26, (y - 5) / 60) * 26 - 26
    paint(image, np.maximum(fat, -z - 60).astype(np.float32), -70 + 15 * smooth_field(axes, 20.0, rng), width)
    paint(image, ellipsoid(coords, (-52, -22, 20), (44, 42, 50)), blood - 20, width)
    paint(image, ellipsoid(coords, tuple(_ATRIUM), (20, 15, 26)), blood - 5, width)
    paint(image, np.maximum(np.hypot(x - 20, y - 42) - 11, z - 45).astype(np.float32), blood - 8, width)
    arch = empty_distance(axes)
    points = spline_curve(np.array([[-5.0, -15, -8], [35, -18, -10], [50, 5, 2], [45, 35, 17], [20, 42, 20]]), 6)
    add_tube(arch, axes, points, np.full(len(points), 12.0), 2 * width)
    paint(image, arch, blood - 8, width)
    both = np.minimum(*lungs)
    # Lungs are denser at the back, where the weight of the blood rests, and hazy in places.
    haze = 22 * smooth_field(axes, 24.0, rng) + 18 * smooth_field(axes, 6.0, rng)
    paint(image, both, rng.uniform(-880, -820) + 0.5 * y + haze, width)
    spine = np.hypot(x, y - 64) - 18
    disc = np.abs((z + rng.uniform(0, 20)) % 24 - 12) - 9
    paint(image, smooth_union(spine, np.hypot(x, y - 84) - 10, 6.0), rng.uniform(150, 230), width)
    paint(image, np.maximum(spine, -disc).astype(np.float32), 80.0, width)
    angle = np.arctan2(np.abs(x), y)
    level = z + rng.uniform(70, 90) * (angle / np.pi) ** 1.3 + rng.uniform(0, 24)
    gap = rng.uniform(22, 26)
    rib = np.hypot((np.abs(level % gap - gap / 2)) / 1.25, skin + 16) - 4.2
    paint(image, np.maximum(rib, 55 * (angle - 2.5)).astype(np.float32), rng.uniform(350, 500), width)
    sternum = ellipsoid((z * 0.2, y, x), (0, -half_y + 17, 0), (60, 6, 17))
    paint(image, sternum, 220.0, width)


@dataclass
class Branch:
    """One branch of a tree: a curve of (K, 3) points in mm, one radius per point, and its generation."""

    points: Array
    radii_mm: Array
    generation: int
    parent: int


def _grow_tree(
    start: Array,
    heading: Array,
    cloud: Array,
    *,
    radius_mm: float,
    smallest_mm: float,
    generations: int,
    rng: np.random.Generator,
) -> list[Branch]:
    """Return the branches of a tree that fills a cloud of (P, 3) points, parents before children.

    The rule is that of Tawhai et al. (J Appl Physiol 2000): a branch splits the cloud it supplies in two by a plane
    that holds its own direction, and each child grows part of the way to the middle of its half.

    start, heading: where the first branch begins, and its direction. The radius shrinks per generation, down to
    `smallest_mm`; growth ends after `generations` or where under 4 points are left.
    """
    tree: list[Branch] = []
    todo = [(np.asarray(start, float), np.asarray(heading, float), np.asarray(cloud, float), radius_mm, 0, -1)]
    while todo:
        begin, direction, points, radius, generation, parent = todo.pop(0)
        middle = points.mean(axis=0)
        way = middle - begin
        end = begin + way * (0.48 + rng.uniform(-0.05, 0.05))
        length = float(np.linalg.norm(end - begin))
        if parent >= 0 and length < 1.5 * smallest_mm:
            continue
        # Leaving along the parent's direction and bending to the goal keeps forks smooth.
        bend = begin + 0.5 * (end - begin) + 0.10 * length * _unit(direction) + rng.normal(0, 0.03 * length, 3)
        t = np.linspace(0, 1, max(3, int(np.ceil(length / 4)) + 1))[:, None]
        curve = (1 - t) ** 2 * begin + 2 * t * (1 - t) * bend + t**2 * end
        thinner = max(radius * _TAPER, smallest_mm)
        radii = np.linspace(radius, 0.5 * (radius + thinner), len(curve))
        tree.append(Branch(curve, radii, generation, parent))
        if generation + 1 >= generations:
            continue
        forward = curve[-1] - curve[-2]
        rest = points - end
        rest = rest[rest @ forward > -0.5 * length * float(np.linalg.norm(forward))]
        normal = _splitting_normal(rest, forward, rng)
        side = rest @ normal > 0
        share = float(np.clip(side.mean() if len(rest) else 0.5, 0.25, 0.75))
        for chosen, part in ((side, share), (~side, 1 - share)):
            if np.count_nonzero(chosen) >= 4:
                child = max(radius * _TAPER * (0.85 + 0.3 * part), smallest_mm)
                todo.append((end, forward, rest[chosen] + end, child, generation + 1, len(tree) - 1))
    return tree


def _splitting_normal(cloud: Array, forward: Array, rng: np.random.Generator) -> Array:
    """Return the normal of the plane that holds `forward` and splits the cloud across its longest extent."""
    unit = _unit(forward)
    flat = cloud - np.outer(cloud @ unit, unit) if len(cloud) else rng.standard_normal((4, 3))
    spread = flat.T @ flat / len(flat) + 1e-3 * np.eye(3)
    normal = np.asarray(np.linalg.eigh(spread)[1][:, -1] + 0.15 * rng.standard_normal(3))
    return _perpendicular(normal, unit)


def _accompany(tree: list[Branch], *, gap_mm: float, ratio: float, rng: np.random.Generator) -> list[Branch]:
    """Return a second tree that runs beside the first one, `gap_mm` between their walls, on a turning side.

    `ratio` scales the radii. The offset is fixed at the ends of the branches and interpolated between, so that the
    companion stays connected across forks.
    """
    offsets: dict[int, Array] = {}
    out: list[Branch] = []
    for index, branch in enumerate(tree):
        unit = _unit(branch.points[-1] - branch.points[0])
        before = offsets.get(branch.parent)
        if before is None:
            before = _perpendicular(rng.standard_normal(3), unit)
        after = _perpendicular(before + rng.normal(0, 0.45, 3), unit)
        offsets[index] = after
        t = np.linspace(0, 1, len(branch.points))[:, None]
        side = (1 - t) * before + t * after
        side /= np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-9)
        radii = branch.radii_mm * ratio
        distance = branch.radii_mm + radii + gap_mm
        if branch.parent >= 0:  # start where the parent's companion ended
            distance = distance.copy()
            distance[0] = float(np.linalg.norm(out[branch.parent].points[-1] - branch.points[0]))
        out.append(Branch(branch.points + side * distance[:, None], radii, branch.generation, branch.parent))
    return out


def _unit(vector: Array) -> Array:
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-9))


def _perpendicular(vector: Array, unit: Array) -> Array:
    return _unit(vector - unit * (vector @ unit))


def _keep_apart(tree: list[Branch], others: list[Branch], gap_mm: float) -> list[Branch]:
    """Return the tree with its points pushed off the other branches until `gap_mm` lies between the walls.

    The last point of a branch is where its children start, so forks stay closed.
    """
    centres = np.concatenate([b.points for b in others])
    walls = np.concatenate([b.radii_mm for b in others])
    search = cKDTree(centres)
    out: list[Branch] = []
    for branch in tree:
        points = branch.points.copy()
        for _ in range(3):
            distance, index = search.query(points)
            away = points - centres[index]
            away /= np.maximum(np.linalg.norm(away, axis=1, keepdims=True), 1e-6)
            short = np.clip(walls[index] + branch.radii_mm.min() + gap_mm - distance, 0, None)
            points += away * short[:, None]
        if branch.parent >= 0:
            points[0] = out[branch.parent].points[-1]
        out.append(Branch(points, branch.radii_mm, branch.generation, branch.parent))
    return out
