"""Random space-filling binary trees: the shape of airways and vessels in a lung.

The rule is that of Tawhai et al. (J Appl Physiol 2000): a cloud of points fills the volume; a branch splits
the cloud it supplies in two by a plane that holds its own direction, and each child grows part of the way to
the middle of its half.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from lightm.datasets.phantoms.shapes import Array


@dataclass
class Branch:
    """One branch of a tree: a curve of (K, 3) points in mm, one radius per point, and its generation."""

    points: Array
    radii_mm: Array
    generation: int
    parent: int


def grow_tree(
    start: Array,
    heading: Array,
    cloud: Array,
    *,
    radius_mm: float,
    smallest_mm: float,
    generations: int,
    rng: np.random.Generator,
    reach: float = 0.48,
    taper: float = 0.80,
) -> list[Branch]:
    """Return the branches of a tree that fills a cloud of (P, 3) points, parents before children.

    start, heading: where the first branch begins, and its direction. The radius shrinks by `taper` a
    generation down to `smallest_mm`; growth ends after `generations` or where under 4 points are left.
    Cost: proportional to P times the generations.
    """
    tree: list[Branch] = []
    todo = [(np.asarray(start, float), np.asarray(heading, float), np.asarray(cloud, float), radius_mm, 0, -1)]
    while todo:
        begin, direction, points, radius, generation, parent = todo.pop(0)
        middle = points.mean(axis=0)
        way = middle - begin
        end = begin + way * (reach + rng.uniform(-0.05, 0.05))
        length = float(np.linalg.norm(end - begin))
        if parent >= 0 and length < 1.5 * smallest_mm:
            continue
        # Leaving along the parent's direction and bending to the goal keeps forks smooth.
        unit = direction / max(float(np.linalg.norm(direction)), 1e-9)
        bend = begin + 0.5 * (end - begin) + 0.10 * length * unit + rng.normal(0, 0.03 * length, 3)
        t = np.linspace(0, 1, max(3, int(np.ceil(length / 4)) + 1))[:, None]
        curve = (1 - t) ** 2 * begin + 2 * t * (1 - t) * bend + t**2 * end
        thinner = max(radius * taper, smallest_mm)
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
                child = max(radius * taper * (0.85 + 0.3 * part), smallest_mm)
                todo.append((end, forward, rest[chosen] + end, child, generation + 1, len(tree) - 1))
    return tree


def _splitting_normal(cloud: Array, forward: Array, rng: np.random.Generator) -> Array:
    """Return the normal of the plane that holds `forward` and splits the cloud across its longest extent."""
    unit = forward / max(float(np.linalg.norm(forward)), 1e-9)
    flat = cloud - np.outer(cloud @ unit, unit) if len(cloud) else rng.standard_normal((4, 3))
    spread = flat.T @ flat / len(flat) + 1e-3 * np.eye(3)
    normal = np.asarray(np.linalg.eigh(spread)[1][:, -1] + 0.15 * rng.standard_normal(3))
    normal -= unit * (normal @ unit)
    return normal / max(float(np.linalg.norm(normal)), 1e-9)


def accompany(tree: list[Branch], *, gap_mm: float, ratio: float, rng: np.random.Generator) -> list[Branch]:
    """Return a second tree that runs beside the first one, `gap_mm` between their walls, on a turning side.

    `ratio` scales the radii. The offset is fixed at the ends of the branches and interpolated between, so
    that the companion stays connected across forks.
    """
    offsets: dict[int, Array] = {}
    out: list[Branch] = []
    for index, branch in enumerate(tree):
        unit = _direction(branch.points)
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


def _direction(points: Array) -> Array:
    way = points[-1] - points[0]
    return np.asarray(way / max(float(np.linalg.norm(way)), 1e-9))


def _perpendicular(vector: Array, unit: Array) -> Array:
    flat = vector - unit * (vector @ unit)
    return np.asarray(flat / max(float(np.linalg.norm(flat)), 1e-9))


def keep_apart(tree: list[Branch], others: list[Branch], gap_mm: float, rounds: int = 3) -> list[Branch]:
    """Return the tree with its points pushed off the other branches until `gap_mm` lies between the walls.

    The last point of a branch is where its children start, so forks stay closed.
    """
    centres = np.concatenate([b.points for b in others])
    walls = np.concatenate([b.radii_mm for b in others])
    search = cKDTree(centres)
    out: list[Branch] = []
    for branch in tree:
        points = branch.points.copy()
        for _ in range(rounds):
            distance, index = search.query(points)
            away = points - centres[index]
            away /= np.maximum(np.linalg.norm(away, axis=1, keepdims=True), 1e-6)
            short = np.clip(walls[index] + branch.radii_mm.min() + gap_mm - distance, 0, None)
            points += away * short[:, None]
        if branch.parent >= 0:
            points[0] = out[branch.parent].points[-1]
        out.append(Branch(points, branch.radii_mm, branch.generation, branch.parent))
    return out
