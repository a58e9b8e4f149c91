"""Fine detail: parts by size and vessels by radius, on shapes whose numbers are known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from lightm import Volume, write_volume
from lightm.errors import InputError
from lightm.lab.compare.figures import detail_figure
from lightm.lab.compare.lesions import (
    Entry,
    bin_of,
    is_tubular,
    measure_detail,
    part_scores,
    quantile_edges,
    radius_counts,
    summarize_bins,
)
from lightm.lab.compare.results import TestImages, read_comparison
from lightm.lab.compare.statistics import summarize_comparison
from tests.lab.compare.made import make_comparison


def ball(shape: tuple[int, ...], centre: tuple[float, ...], radius: float, spacing: tuple[float, ...]) -> np.ndarray:
    """A ball of `radius` mm around a voxel."""
    places = np.indices(shape)
    squares = [((p - c) * s) ** 2 for p, c, s in zip(places, centre, spacing, strict=True)]
    return np.sum(squares, axis=0) <= radius**2


def tube(radius: float, *, length: int = 60, side: int = 21) -> np.ndarray:
    """A tube along the first axis that the image cuts at both ends."""
    disc = ball((side, side), (side // 2, side // 2), radius, (1.0, 1.0))
    return np.repeat(disc[None], length, axis=0)


def test_sizes_are_volumes_and_a_missed_ball_is_not_found() -> None:
    spacing, shape = (2.0, 1.0, 0.5), (20, 40, 80)
    large = ball(shape, (8, 15, 20), 8.0, spacing)
    small = ball(shape, (12, 30, 60), 3.0, spacing)
    (parts,) = part_scores(large | small, [large], spacing)
    by_size = sorted(parts, key=lambda part: part.size)
    assert [part.found for part in by_size] == [False, True]
    assert [part.dsc for part in by_size] == [0.0, 1.0]
    assert [part.voxels for part in by_size] == [small.sum(), large.sum()]
    for part, radius in zip(by_size, (3.0, 8.0), strict=True):
        assert part.size == pytest.approx(4 / 3 * math.pi * radius**3 / 1000, rel=0.15)


def test_spurious_voxels_count_against_the_nearest_part_in_millimetres() -> None:
    label = np.zeros((9, 3, 21), dtype=bool)
    label[4, 1, 2], label[4, 1, 18] = True, True
    pred = label.copy()
    pred[4, 1, 8] = True  # nearer to the first
    first, second = part_scores(label, [pred], (1.0, 1.0, 1.0))[0]
    assert (first.dsc, second.dsc) == (pytest.approx(2 / 3), 1.0)
    label = np.zeros((9, 9), dtype=bool)
    label[0, 4], label[4, 8] = True, True
    pred = label.copy()
    pred[4, 4] = True  # four voxels from both: by millimetres nearer to the second
    first, second = part_scores(label, [pred], (3.0, 1.0))[0]
    assert (first.dsc, second.dsc) == (1.0, pytest.approx(2 / 3))


def test_parts_that_touch_by_a_corner_are_one_and_pixels_are_counted() -> None:
    label = np.zeros((6, 6), dtype=bool)
    label[1, 1] = label[2, 2] = True
    (parts,) = part_scores(label, [label], (0.5, 0.5), pixels=True)
    assert [(part.size, part.dsc) for part in parts] == [(2.0, 1.0)]
    assert part_scores(label, [label], (0.5, 0.5))[0][0].size == pytest.approx(0.5)  # mm2


def test_no_label_has_no_parts_and_shapes_must_agree() -> None:
    empty, full = np.zeros((4, 4), dtype=bool), np.ones((4, 4), dtype=bool)
    assert part_scores(empty, [full, full], (1.0, 1.0)) == [[], []]
    assert radius_counts(empty, [full], (1.0, 1.0)).radius.size == 0
    for measure in (part_scores, radius_counts):
        with pytest.raises(InputError, match="shapes"):
            measure(full, [np.ones((3, 4), dtype=bool)], (1.0, 1.0))


@pytest.mark.parametrize("radius", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_the_radius_of_a_tube(radius: float, scale: float) -> None:
    label = tube(radius)
    counts = radius_counts(label, [label], (scale, scale, scale))
    mean = float(np.average(counts.radius, weights=counts.label))
    assert radius * scale <= mean <= (radius + 0.6) * scale
    assert counts.label.sum() == label.sum()
    assert 40 <= counts.skeleton.sum() <= 75


def test_a_missed_thin_tube_has_dice_zero_in_its_bin_only() -> None:
    thick, thin = tube(4.0), tube(1.0)
    label = np.concatenate([thick, thin], axis=2)
    pred = np.concatenate([thick, np.zeros_like(thin)], axis=2)
    counts = radius_counts(label, [pred, label], (1.0, 1.0, 1.0))
    is_thin = counts.radius < 2.5
    assert counts.label[is_thin].sum() == thin.sum()
    assert counts.pred[0][is_thin].sum() == counts.common[0][is_thin].sum() == 0
    assert counts.common[0][~is_thin].sum() == thick.sum()
    assert counts.common[1].sum() == label.sum()


def test_a_block_that_fills_the_image_has_a_radius_and_a_skeleton() -> None:
    full = np.ones((4, 4, 4), dtype=bool)
    counts = radius_counts(full, [full], (1.0, 1.0, 1.0))
    assert counts.skeleton.sum() >= 1
    assert counts.label.sum() == 64
    assert 0 < counts.radius.max() <= 2.5


def test_tubes_are_tubular_and_balls_and_plates_are_not() -> None:
    spacing = (1.0, 1.0, 1.0)
    assert is_tubular(tube(2.0), spacing)
    assert not is_tubular(ball((30, 30, 30), (15, 15, 15), 11.0, spacing), spacing)
    assert not is_tubular(tube(2.0, length=8), spacing)
    plate = np.zeros((40, 40, 7), dtype=bool)
    plate[2:38, 2:38, 2:5] = True
    assert not is_tubular(plate, spacing)
    assert not is_tubular(np.zeros((5, 5, 5), dtype=bool), spacing)


def test_bins_hold_equal_numbers_and_never_part_equal_values() -> None:
    edges = quantile_edges(np.arange(40.0))
    assert len(edges) == 5
    assert np.bincount([bin_of(value, edges) for value in range(40)]).tolist() == [10, 10, 10, 10]
    assert quantile_edges(np.full(40, 3.0)) == [3.0, 3.0]
    assert len(quantile_edges(np.arange(9.0))) == 2  # too few for two bins
    assert quantile_edges(np.zeros(0)) == []
    # weights: half of the length is at one radius
    assert quantile_edges(np.array([1.0, 2.0, 3.0]), np.array([100.0, 50.0, 50.0])) == [1.0, 2.0, 3.0, 3.0]


def test_means_and_paired_differences_of_bins() -> None:
    entries = [
        Entry(
            f"case{i}", float(place), {"a": 0.8, "b": 0.8 + (0.1 if place else -0.1) + 0.01 * i}, {"a": 1.0, "b": 0.0}
        )
        for i in range(6)
        for place in (0, 10)
    ]
    rows = summarize_bins("size", "tumour", "ml", entries, [0.0, 5.0, 10.0], ["a", "b"], "a")
    low, high = (row for row in rows if row.method == "b")
    assert (low.n, low.cases, low.found) == (6, 6, 0.0)
    assert low.difference == pytest.approx(-0.075)
    assert high.difference == pytest.approx(0.125)
    assert low.difference_low is not None
    assert low.difference_high is not None
    assert low.difference_low < -0.075 < low.difference_high < 0
    assert all(row.difference is None for row in rows if row.method == "a")
    one = summarize_bins("size", "tumour", "ml", entries[:2], [0.0, 10.0], ["a", "b", "c"], "a")
    assert one[0].dsc == pytest.approx(0.8)
    assert one[0].dsc_low is None  # one case has no interval
    assert (one[2].dsc, one[2].n, one[2].found) == (None, 0, None)


def test_a_comparison_of_vessels_is_measured_by_radius(tmp_path: Path) -> None:
    folder = make_comparison(
        tmp_path, images=True, cases=4, seeds=(0,), methods={"lightm-small": 0.9, "unet_plain": 0.6}
    )
    comparison = read_comparison(folder)
    thick = np.concatenate([tube(2.0, side=9), np.zeros((60, 9, 9), dtype=bool)], axis=2).astype(np.uint8)
    both = np.concatenate([tube(2.0, side=9), tube(1.0, side=9)], axis=2).astype(np.uint8)
    for case in comparison.split.test:
        path = next((folder / "data" / "labelsTr").glob(f"{case}.*"))
        write_volume(path, Volume.from_spacing(both, (1.0, 1.0, 1.0)), kind="label")
        for trial, drawn in zip(comparison.finished, (both, thick), strict=True):
            target = trial.path / "predictions" / path.name
            write_volume(target, Volume.from_spacing(drawn, (1.0, 1.0, 1.0)), kind="label")
    summary = summarize_comparison(comparison, bootstrap=50)
    detail = measure_detail(comparison, summary, TestImages(comparison))
    assert (detail.tubular, detail.problems) == (["liver"], [])
    thinnest = min(row.low_edge for row in detail.radius)
    assert len(detail.radius) == 4  # two bins, two methods
    for row in detail.radius:
        missed = row.method == "unet_plain" and row.low_edge == thinnest
        assert row.dsc == (0.0 if missed else pytest.approx(1.0))
        assert row.difference == (None if row.method == "lightm-small" else pytest.approx(-1.0 if missed else 0.0))
    assert {row.found for row in detail.size if row.method == "unet_plain"} == {0.5}  # the thick one of the two
    figure = detail_figure(detail.radius, summary)
    assert figure is not None
    assert len(figure.axes) == 2

    (comparison.finished[0].path / "predictions" / path.name).unlink()  # not predicted: the others are still measured
    write_volume(target, Volume.from_spacing(both[:-1], (1.0, 1.0, 1.0)), kind="label")
    again = measure_detail(comparison, summary, TestImages(comparison))
    assert len(again.problems) == 1
    assert "shape" in again.problems[0]
    assert max(row.cases for row in again.radius) == 3
