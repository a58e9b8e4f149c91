"""Metrics of single cases against numbers worked out by hand."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import ndimage

from lightm.errors import InputError
from lightm.evaluation.metrics import ClassMetrics, case_metrics, surface, surface_distances

ONE = {"organ": 1}


def cube(shape: tuple[int, ...], corner: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
    array = np.zeros(shape, dtype=np.uint8)
    array[tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))] = 1
    return array


def ball(radius_mm: float, spacing: tuple[float, ...], shape: tuple[int, ...]) -> np.ndarray:
    grid = np.indices(shape).astype(float)
    centre = [(n - 1) / 2 for n in shape]
    squares = sum(((g - c) * s) ** 2 for g, c, s in zip(grid, centre, spacing, strict=True))
    return (squares <= radius_mm**2).astype(np.uint8)


def measure(pred: np.ndarray, label: np.ndarray, spacing: tuple[float, ...], tolerance: float = 1.0) -> ClassMetrics:
    return case_metrics(pred, label, spacing, ONE, nsd_tolerance_mm=tolerance)["organ"]


def test_equal_masks_are_perfect() -> None:
    label = ball(5.0, (2.0, 1.0, 1.0), (9, 15, 15))
    result = measure(label, label, (2.0, 1.0, 1.0), tolerance=0.0)
    assert (result.status, result.dsc, result.iou, result.hd95_mm, result.nsd) == ("present", 1.0, 1.0, 0.0, 1.0)
    assert result.volume_label_ml == result.volume_pred_ml == pytest.approx(int(label.sum()) * 2.0 / 1000)


@pytest.mark.parametrize(
    ("axis", "shift_mm"), [(0, 9.0), (1, 3.0), (2, 1.5)], ids=["z, 3 mm thick", "y, 1 mm", "x, 0.5 mm"]
)
def test_cube_shifted_by_three_voxels(axis: int, shift_mm: float) -> None:
    """Overlap 7/10 along one axis: DSC 0.7, IoU 7/13; the leading faces lie the whole shift away."""
    spacing = (3.0, 1.0, 0.5)
    corner = [4, 4, 4]
    label = cube((20, 20, 20), tuple(corner), (10, 10, 10))
    corner[axis] += 3
    result = measure(cube((20, 20, 20), tuple(corner), (10, 10, 10)), label, spacing, tolerance=shift_mm)
    assert result.dsc == pytest.approx(0.7)
    assert result.iou == pytest.approx(7 / 13)
    assert result.hd95_mm == pytest.approx(shift_mm)  # one face is 100 of 488 surface voxels: more than 5%
    assert result.nsd == 1.0


def test_plates_have_one_distance_everywhere() -> None:
    """Two parallel plates, one voxel thick, 4 slices of 2.5 mm apart: each distance is 10 mm."""
    label, pred = cube((12, 8, 8), (2, 0, 0), (1, 8, 8)), cube((12, 8, 8), (6, 0, 0), (1, 8, 8))
    result = measure(pred, label, (2.5, 1.0, 1.0), tolerance=9.9)
    assert (result.status, result.dsc, result.hd95_mm, result.nsd) == ("present", 0.0, pytest.approx(10.0), 0.0)
    assert measure(pred, label, (2.5, 1.0, 1.0), tolerance=10.0).nsd == 1.0


def test_hd95_is_the_larger_direction_and_not_the_pooled_one() -> None:
    """A line of 20 against its first 10 pixels: one way all 0, the other 0 x 10 and 1..10."""
    label, pred = cube((3, 30), (1, 2), (1, 20)), cube((3, 30), (1, 2), (1, 10))
    distances = [0.0] * 10 + [float(d) for d in range(1, 11)]
    result = measure(pred, label, (1.0, 1.0), tolerance=4.0)
    assert result.hd95_mm == pytest.approx(np.percentile(distances, 95))
    assert result.hd95_mm != pytest.approx(np.percentile([*distances, *[0.0] * 10], 95))
    assert result.nsd == pytest.approx((10 + 14) / 30)
    swapped = measure(label, pred, (1.0, 1.0), tolerance=4.0)
    assert (swapped.hd95_mm, swapped.nsd, swapped.dsc) == (result.hd95_mm, result.nsd, result.dsc)


def test_concentric_balls_are_their_radii_apart() -> None:
    spacing = (2.0, 1.0, 1.0)
    result = measure(ball(10.0, spacing, (15, 29, 29)), ball(13.0, spacing, (15, 29, 29)), spacing)
    assert result.hd95_mm == pytest.approx(3.0, abs=1.0)
    assert result.dsc == pytest.approx(2 * 10**3 / (10**3 + 13**3), abs=0.03)


@pytest.mark.parametrize("ndim", [2, 3])
def test_distances_agree_with_the_distance_transform(ndim: int) -> None:
    rng = np.random.default_rng(ndim)
    spacing = (2.5, 0.8, 0.7)[-ndim:]
    shape = (9, 21, 24)[-ndim:]
    a, b = (ndimage.gaussian_filter(rng.normal(size=shape), 1.5) > 0.05 for _ in range(2))
    to_b, to_a = surface_distances(a, b, spacing)
    edge_a, edge_b = surface(a), surface(b)
    np.testing.assert_allclose(to_b, ndimage.distance_transform_edt(~edge_b, spacing)[edge_a], atol=1e-9)
    np.testing.assert_allclose(to_a, ndimage.distance_transform_edt(~edge_a, spacing)[edge_b], atol=1e-9)


def test_surface_is_face_connected_and_the_image_edge_is_outside() -> None:
    solid = cube((5, 5), (0, 0), (5, 5)).astype(bool)
    assert surface(solid).sum() == 16
    notched = solid.copy()
    notched[0, 0] = False  # a missing corner touches [1, 1] by a corner only
    assert not surface(notched)[1, 1]
    assert surface(cube((7, 7, 7), (1, 1, 1), (5, 5, 5)).astype(bool)).sum() == 125 - 27


def test_a_structure_one_slice_thick_has_two_faces_but_an_image_has_none() -> None:
    """The inner pixel of a 3x3 plate is surface in a volume, and is not in a single slice."""
    ring = np.ones((3, 3), dtype=np.uint8)
    ring[1, 1] = 0
    plate, hollow = np.zeros((3, 9, 9), np.uint8), np.zeros((3, 9, 9), np.uint8)
    plate[1, 3:6, 3:6], hollow[1, 3:6, 3:6] = 1, ring
    assert measure(hollow, plate, (5.0, 1.0, 1.0), tolerance=0.0).nsd == pytest.approx((8 + 8) / (8 + 9))
    single = measure(hollow[1:2], plate[1:2], (5.0, 1.0, 1.0), tolerance=0.0)
    assert single.nsd == measure(hollow[1], plate[1], (1.0, 1.0), tolerance=0.0).nsd == 1.0
    assert single.volume_label_ml == pytest.approx(9 * 5.0 / 1000)


def test_position_and_size_of_the_image_do_not_matter() -> None:
    rng = np.random.default_rng(5)
    label, pred = (rng.integers(0, 3, (6, 7, 8)).astype(np.uint8) for _ in range(2))
    labels = {"one": 1, "two": 2}
    plain = case_metrics(pred, label, (1.5, 1.0, 2.0), labels)
    widened = case_metrics(np.pad(pred, 5), np.pad(label, 5), (1.5, 1.0, 2.0), labels)
    assert plain == widened


@pytest.mark.parametrize(("in_label", "in_pred"), list(product([False, True], repeat=2)))
def test_status(in_label: bool, in_pred: bool) -> None:
    there, nothing = cube((6, 6, 6), (1, 1, 1), (2, 2, 2)), np.zeros((6, 6, 6), np.uint8)
    result = measure(there if in_pred else nothing, there if in_label else nothing, (1.0, 1.0, 1.0))
    expected = {
        (True, True): ("present", 1.0, 1.0, 0.0, 1.0),
        (True, False): ("missed", 0.0, 0.0, None, 0.0),
        (False, True): ("spurious", 0.0, 0.0, None, 0.0),
        (False, False): ("absent", None, None, None, None),
    }
    assert (result.status, result.dsc, result.iou, result.hd95_mm, result.nsd) == expected[in_label, in_pred]
    assert (result.voxels_label, result.voxels_pred) == (8 * in_label, 8 * in_pred)
    assert result.volume_pred_ml == pytest.approx(0.008 * in_pred)


def test_2d_has_no_volume() -> None:
    result = measure(cube((6, 6), (1, 1), (2, 2)), cube((6, 6), (1, 1), (4, 4)), (1.0, 1.0))
    assert result.volume_label_ml is None
    assert result.volume_pred_ml is None
    assert result.dsc == pytest.approx(2 * 4 / 20)


def test_ignored_voxels_count_in_neither() -> None:
    label, pred = cube((4, 10), (0, 0), (4, 4)), cube((4, 10), (0, 0), (4, 8))
    label[:, 4:] = 9
    result = case_metrics(pred, label, (1.0, 1.0), ONE, ignore_label=9)["organ"]
    assert (result.dsc, result.voxels_pred, result.hd95_mm) == (1.0, 16, 0.0)


def test_tolerance_for_each_class() -> None:
    label = cube((9, 20), (2, 2), (5, 5)) + 2 * cube((9, 20), (2, 12), (5, 5))
    pred = np.roll(label, 2, axis=0)
    result = case_metrics(pred, label, (1.0, 1.0), {"a": 1, "b": 2}, nsd_tolerance_mm={"a": 2.0, "b": 0.5})
    assert result["a"].nsd == 1.0
    assert result["b"].nsd is not None
    assert result["b"].nsd < 0.7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pred": np.zeros((4, 4, 5), int)}, "shape"),
        ({"pred": np.zeros(4, int), "label": np.zeros(4, int)}, "shape"),
        ({"spacing_mm": (1.0, 1.0)}, "3 positive numbers"),
        ({"spacing_mm": (1.0, 0.0, 1.0)}, "3 positive numbers"),
        ({"nsd_tolerance_mm": -1.0}, ">= 0"),
        ({"nsd_tolerance_mm": {"orgn": 1.0}}, "did you mean 'organ'"),
        ({"nsd_tolerance_mm": {}}, "no NSD tolerance for organ"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict, message: str) -> None:
    good = {"pred": np.zeros((4, 4, 4), int), "label": np.zeros((4, 4, 4), int), "spacing_mm": (1.0, 1.0, 1.0)}
    with pytest.raises(InputError, match=message):
        case_metrics(**{**good, "labels": ONE, **arguments})


def test_distance_to_nothing_is_refused() -> None:
    full = np.ones((3, 3), bool)
    with pytest.raises(InputError, match="empty"):
        surface_distances(full, ~full, (1.0, 1.0))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # MONAI calls itself with an option it has deprecated
@pytest.mark.parametrize("ndim", [2, 3])
def test_distances_agree_with_monai(ndim: int) -> None:
    torch = pytest.importorskip("torch")
    monai = pytest.importorskip("monai.metrics")
    rng = np.random.default_rng(11)
    spacing, shape = (2.5, 0.8, 0.7)[-ndim:], (12, 26, 28)[-ndim:]
    label, pred = (np.pad(ndimage.gaussian_filter(rng.normal(size=shape), 2) > 0.05, 1) for _ in range(2))
    batch = [torch.from_numpy(np.stack([~m, m])[None].astype(np.float32)) for m in (pred, label)]
    hd95 = monai.compute_hausdorff_distance(*batch, percentile=95, spacing=spacing).item()
    nsd = monai.compute_surface_dice(*batch, class_thresholds=[1.0], spacing=spacing).item()
    result = measure(pred.astype(np.uint8), label.astype(np.uint8), spacing)
    assert result.hd95_mm == pytest.approx(hd95, abs=1e-4)
    assert result.nsd == pytest.approx(nsd, abs=1e-6)
