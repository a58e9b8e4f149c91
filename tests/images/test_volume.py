from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest

from lightm.errors import InputError
from lightm.images.volume import Volume, canonical_axes, geometry_difference

ORIENTATIONS = [(order, signs) for order in permutations(range(3)) for signs in product((1, -1), repeat=3)]


def oriented(order: tuple[int, ...], signs: tuple[int, ...]) -> Volume:
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, (row, sign, step) in enumerate(zip(order, signs, (1.0, 2.0, 3.0), strict=True)):
        affine[row, column] = sign * step
    affine[:3, 3] = (5, -6, 7)
    return Volume(np.arange(120.0).reshape(4, 5, 6), (3.0, 2.0, 1.0), affine)


def place_of(volume: Volume, value: float) -> np.ndarray:
    z, y, x = (int(i[0]) for i in np.nonzero(volume.data == value))
    return volume.affine @ [x, y, z, 1]


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
def test_canonical_keeps_every_voxel_in_place_and_is_undone_exactly(order, signs):
    native = oriented(order, signs)
    canonical = native.to_canonical()
    matrix = canonical.affine[:3, :3]
    assert (np.diag(matrix) > 0).all()
    assert np.count_nonzero(matrix) == 3
    for value in (0.0, 17.0, 119.0):
        np.testing.assert_allclose(place_of(canonical, value), place_of(native, value))
    # The axes that are told undo it.
    axes = canonical_axes(native)
    turned = canonical.data[tuple(slice(None, None, -1 if flipped else 1) for _, flipped in axes)]
    np.testing.assert_array_equal(turned.transpose(np.argsort([axis for axis, _ in axes])), native.data)


def test_canonical_of_an_oblique_scan_takes_the_nearest_axes():
    angle = np.deg2rad(20)
    affine = np.eye(4)
    affine[:2, :2] = [[-np.cos(angle), np.sin(angle)], [-np.sin(angle), -np.cos(angle)]]
    native = Volume(np.arange(24.0).reshape(2, 3, 4), (1, 1, 1), affine)
    canonical = native.to_canonical()
    np.testing.assert_array_equal(canonical.data, native.data[:, ::-1, ::-1])
    np.testing.assert_allclose(place_of(canonical, 5.0), place_of(native, 5.0))


def test_2d_is_its_own_canonical():
    volume = Volume.from_spacing(np.zeros((3, 4)), (0.5, 0.25))
    assert volume.to_canonical() is volume
    assert canonical_axes(volume) == ((0, False), (1, False))
    np.testing.assert_allclose(np.diag(volume.affine), [0.25, 0.5, 1, 1])


@pytest.mark.parametrize(
    ("data", "spacing", "affine", "message"),
    [
        (np.zeros((2, 2, 2, 2)), (1, 1, 1), np.eye(4), "2 or 3 axes"),
        (np.zeros((2, 0, 2)), (1, 1, 1), np.eye(4), "at least one voxel"),
        (np.zeros((2, 2, 2), complex), (1, 1, 1), np.eye(4), "real numbers"),
        (np.zeros((2, 2, 2)), (1, 1), np.eye(4), "one positive number per axis"),
        (np.zeros((2, 2, 2)), (1, -1, 1), np.eye(4), "one positive number per axis"),
        (np.zeros((2, 2, 2)), (1, 1, 1), np.full((4, 4), np.nan), "4x4 matrix of finite"),
        (np.zeros((2, 2, 2)), (2, 1, 1), np.eye(4), "disagrees with the affine"),
        (np.zeros((2, 2, 2)), (1, 1, 1), np.eye(4)[:, [0, 0, 2, 3]], "point the same way"),
    ],
)
def test_what_does_not_fit_together_is_refused(data, spacing, affine, message):
    with pytest.raises(InputError, match=message):
        Volume(data, spacing, affine)


def test_shapes_must_fit():
    volume = Volume.from_spacing(np.zeros((2, 3, 4)), (1, 1, 1))
    with pytest.raises(InputError, match="does not fit the geometry"):
        volume.with_data(np.zeros((2, 3, 5)))


def test_geometry_differences_are_told_apart():
    first = Volume.from_spacing(np.zeros((4, 5, 6)), (3, 2, 1))
    assert geometry_difference(first, first) is None
    moved = first.affine + np.pad(np.full((3, 1), 0.01), ((0, 1), (3, 0)))
    assert geometry_difference(first, Volume(first.data, first.spacing_mm, moved)) is None
    moved = first.affine + np.pad(np.full((3, 1), 0.3), ((0, 1), (3, 0)))
    assert "apart" in str(geometry_difference(first, Volume(first.data, first.spacing_mm, moved)))
    assert "shape" in str(geometry_difference(first, Volume.from_spacing(np.zeros((4, 5, 7)), (3, 2, 1))))
    assert "spacing" in str(geometry_difference(first, Volume.from_spacing(first.data, (3, 2, 1.5))))
