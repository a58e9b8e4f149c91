"""Figures, looked at through their axes, lines and pixels."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb, to_rgba
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from lightm.errors import InputError
from lightm.evaluation.evaluation import CaseRow, summarize
from lightm.evaluation.figures import CLASS_COLOURS, case_strip, curves, read_history, to_png
from lightm.evaluation.pictures import MISSED, SPURIOUS, WRONG_CLASS, best_slice, mesh_mm, overlay, surfaces_figure

CLASSES = {"organ": 1, "lesion": 2}
HISTORY = {
    "epoch": [0.0, 1.0, 2.0],
    "train_loss": [3.0, 2.0, 1.0],
    "val_loss": [3.5, np.nan, 1.5],
    "pseudo_dice": [0.1, 0.5, 0.6],
    "pseudo_dice_smoothed": [0.1, 0.14, 0.186],
    "lr": [1e-3, 6e-4, 2e-4],
    "epoch_seconds": [5.0, 4.0, 4.5],
    "whole_case_dice": [np.nan, 0.4, np.nan],
    "pseudo_dice/organ": [0.2, 0.6, 0.7],
    "pseudo_dice/lesion": [0.0, 0.4, 0.5],
}


def test_curves_show_every_column() -> None:
    loss, dice, rate, seconds = curves(HISTORY).axes
    lines = {line.get_label(): line for line in (*loss.lines, *dice.lines)}
    assert set(lines) == {"training", "validation", "organ", "lesion", "mean", "smoothed mean", "whole cases"}
    np.testing.assert_array_equal(lines["training"].get_xydata(), [[0, 3], [1, 2], [2, 1]])
    np.testing.assert_array_equal(lines["validation"].get_xydata(), [[0, 3.5], [2, 1.5]])  # joined over the gap
    np.testing.assert_array_equal(lines["smoothed mean"].get_ydata(), HISTORY["pseudo_dice_smoothed"])
    np.testing.assert_array_equal(lines["whole cases"].get_xydata(), [[1, 0.4]])
    assert lines["smoothed mean"].get_linewidth() > lines["mean"].get_linewidth()
    np.testing.assert_array_equal(rate.lines[0].get_ydata(), HISTORY["lr"])
    np.testing.assert_array_equal(seconds.lines[0].get_ydata(), HISTORY["epoch_seconds"])
    assert dice.get_ylim() == (0, 1)


def test_curves_of_one_epoch_and_of_missing_columns() -> None:
    figure = curves({"epoch": [0.0], "train_loss": [1.0], "val_loss": [np.nan]})
    loss, dice, *_ = figure.axes
    assert [line.get_marker() for line in loss.lines] == ["o"]
    assert [text.get_text() for text in dice.texts] == ["not recorded"]
    assert to_png(figure, dpi=40).startswith(b"\x89PNG")


def test_history_is_read_with_its_gaps(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    path.write_text("epoch,train_loss,val_loss\n0,1.5,\n1,1.0,2e-1\n", encoding="utf-8")
    history = read_history(path)
    assert history["train_loss"] == [1.5, 1.0]
    assert np.isnan(history["val_loss"][0])
    assert history["val_loss"][1] == 0.2
    path.write_text("epoch,train_loss\n", encoding="utf-8")
    assert read_history(path) == {}


@pytest.mark.parametrize(
    ("content", "message"), [("a,b\n1,2\n", "no column epoch, train_loss"), ("epoch,train_loss\n0,x\n", "line 2: 'x'")]
)
def test_broken_history_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "history.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=rf"history\.csv.*{message}"):
        read_history(path)


def test_strip_marks_missed_cases_and_leaves_absent_ones_out() -> None:
    def row(case: str, name: str, status: str, dsc: float | None) -> CaseRow:
        sizes = {"volume_label_ml": None, "volume_pred_ml": None, "voxels_label": 1, "voxels_pred": 1}
        return CaseRow(case=case, class_name=name, status=status, dsc=dsc, iou=dsc, hd95_mm=None, nsd=dsc, **sizes)

    rows = [
        row("1", "a $x$", "present", 0.8),
        row("1", "b", "absent", None),
        row("2", "a $x$", "missed", 0.0),
        row("2", "b", "absent", None),
        row("3", "a $x$", "present", 0.9),
        row("3", "b", "absent", None),
    ]
    result = summarize(
        rows, {"a $x$": 1, "b": 2}, spatial_dims=2, distance_unit="px", nsd_tolerance_mm={"a $x$": 1, "b": 1}
    )
    (axes,) = case_strip(result).axes
    found, failed = (c.get_offsets() for c in axes.collections[:2])
    assert sorted(found[:, 0]) == [0.8, 0.9]
    assert list(failed[:, 0]) == [0.0]
    assert [text.get_text() for text in axes.texts] == ["absent in every case"]
    assert to_png(case_strip(result), dpi=40) == to_png(case_strip(result), dpi=40)


def test_slice_with_the_largest_area_counts_every_class_alike() -> None:
    label = np.zeros((10, 20, 20), np.uint8)
    label[1:9, 2:18, 2:18] = 1
    label[2, 2:4, 2:18] = 0  # the organ is a little smaller where the lesion is largest
    label[2, 8:12, 8:12] = 2
    label[6, 8, 8] = 2
    assert best_slice(label, label, [1, 2], 0) == 2
    assert best_slice(label, label, [1], 0) != 2
    assert best_slice(np.zeros_like(label), np.zeros_like(label), [1, 2], 0) == 5


def lesioned() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, label and prediction whose four corners in a plane can be told apart."""
    image = np.zeros((12, 24, 24), np.float32)
    image[:, :12, :12], image[:, :12, 12:], image[:, 12:, :12] = 10, 20, 30
    label = np.zeros(image.shape, np.uint8)
    label[3:9, 2:22, 2:22] = 1
    label[4:8, 8:16, 8:16] = 2
    return image, label, np.roll(label, 1, axis=2)


def test_overlay_in_three_planes_keeps_to_the_radiological_convention() -> None:
    image, label, pred = lesioned()
    figure = overlay(image, label, pred, (3.0, 1.0, 1.0), CLASSES, window=(0.0, 30.0))
    assert len(figure.axes) == 6
    axial, coronal, sagittal = figure.axes[:3]
    letters = [[text.get_text() for text in axes.texts] for axes in (axial, coronal, sagittal)]
    assert letters == [["R", "L", "A", "P"], ["R", "L", "S", "I"], ["A", "P", "S", "I"]]
    assert axial.get_title().startswith("axial, slice ")
    left, top = axial.texts[0].get_position(), axial.texts[2].get_position()
    assert left[0] < 0.1
    assert top[1] > 0.9
    shown = axial.images[0].get_array()
    # x runs to the right and y to the front, so small x and small y are the lower right of the picture.
    assert shown[-1, -1] == pytest.approx(10 / 30)
    assert shown[-1, 0] == pytest.approx(20 / 30)
    assert shown[0, -1] == 1.0
    assert shown[0, 0] == 0.0


def test_overlay_is_true_to_the_spacing() -> None:
    image, label, pred = lesioned()
    _, coronal, *_ = overlay(image, label, pred, (3.0, 1.0, 0.5), CLASSES).axes
    rows, columns = coronal.images[0].get_array().shape
    left, right, bottom, top = coronal.images[0].get_extent()
    assert (right - left, bottom - top) == (columns * 0.5, rows * 3.0)
    assert coronal.get_aspect() == 1.0


def test_overlay_draws_a_contour_for_each_class_and_source() -> None:
    image, label, pred = lesioned()
    pred[pred == 2] = 0
    axial = overlay(image, label, pred, (1.0, 1.0, 1.0), CLASSES).axes[0]
    drawn = {c.get_label(): c for c in axial.collections if isinstance(c, LineCollection)}
    assert set(drawn) == {"label 1", "label 2", "prediction 1"}
    assert tuple(drawn["label 1"].get_colors()[0]) == to_rgba(CLASS_COLOURS[0])
    assert drawn["label 1"].get_linestyles() != drawn["prediction 1"].get_linestyles()
    # The outline of the label of 20 x 20 mm runs along the outer edges of its outermost voxels.
    outline = np.concatenate([path.vertices for path in drawn["label 1"].get_paths()])
    assert np.ptp(outline, axis=0) == pytest.approx([20.0, 20.0])


def test_overlay_colours_each_kind_of_error() -> None:
    label, pred = np.zeros((20, 20), np.uint8), np.zeros((20, 20), np.uint8)
    label[2:18, 2:10] = 1
    pred[2:18, 4:14] = 1
    pred[10:12, 6:8] = 2
    image, contours, errors = overlay(label, label, pred, (1.0, 1.0), CLASSES).axes
    assert [axes.get_title() for axes in (image, contours, errors)] == ["image", "contours", "differences"]
    assert not [text for axes in (image, contours, errors) for text in axes.texts]  # a PNG knows no left and right
    picture = errors.images[1].get_array()
    assert picture.shape[:2] == (20, 20)
    count = {colour: int((picture == to_rgba(colour)).all(axis=-1).sum()) for colour in (MISSED, SPURIOUS, WRONG_CLASS)}
    assert count == {MISSED: 16 * 2, SPURIOUS: 16 * 4, WRONG_CLASS: 4}


def test_overlay_of_nothing_still_draws() -> None:
    empty = np.zeros((8, 9, 10), np.uint8)
    figure = overlay(empty.astype(np.float32), empty, empty, (1.0, 1.0, 1.0), CLASSES)
    assert not any(isinstance(c, LineCollection) for axes in figure.axes for c in axes.collections)
    assert to_png(figure, dpi=40).startswith(b"\x89PNG")


def balls(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> np.ndarray:
    grid = [g * s for g, s in zip(np.indices(shape), spacing, strict=True)]
    centre = [n * s / 2 for n, s in zip(shape, spacing, strict=True)]
    distance = np.sqrt(sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)))
    return ((distance < 30).astype(np.uint8) + (distance < 10)).astype(np.uint8)


def test_surfaces_have_the_size_of_the_structures_in_millimetres() -> None:
    spacing = (3.0, 0.7, 0.7)
    label = balls((24, 100, 100), spacing)
    figure = surfaces_figure({"label": label, "prediction": np.where(label == 2, 0, label)}, spacing, CLASSES)
    first, second = figure.axes
    assert (first.get_title(), second.get_title()) == ("label", "prediction")
    assert first.get_xlim() == second.get_xlim()
    assert np.diff(first.get_zlim())[0] == pytest.approx(60, abs=3.1)
    to_png(figure, dpi=30)
    (mesh,) = (c for c in first.collections if isinstance(c, Poly3DCollection))
    opacity = set(np.round(mesh.get_facecolor()[:, 3], 3))
    assert opacity == {0.3, 1.0}  # one can look through the organ at its lesion


@pytest.mark.parametrize("factors", [(1, 1, 1), (1, 3, 3)])
def test_mesh_lies_where_the_structure_is(factors: tuple[int, int, int]) -> None:
    spacing = (3.0, 0.7, 0.7)
    label = balls((24, 100, 110), spacing)
    label[:, :, :30] = 0  # the ball reaches from 8.5 to 68.5 mm and is cut at 21 mm: left and right differ
    mesh = mesh_mm(label > 0, spacing, factors)
    assert mesh is not None
    points = mesh.reshape(-1, 3)
    assert np.ptp(points, axis=0) == pytest.approx([47.5, 60, 60], abs=3.1)
    assert points[:, 0].max() == pytest.approx(-21, abs=1.5)
    assert points[:, 1:].mean(axis=0) == pytest.approx([-35 - 0.35, 36 + 1.5], abs=0.3)  # half a voxel on
    # The divergence theorem: the volume enclosed is that of the voxels.
    volume = np.abs(np.einsum("ti,ti->t", mesh[:, 0], np.cross(mesh[:, 1], mesh[:, 2])).sum()) / 6
    assert volume == pytest.approx((label > 0).sum() * np.prod(spacing), rel=0.06)
    assert mesh_mm(label > 5, spacing, factors) is None


def test_surfaces_survive_thin_structures_and_empty_predictions() -> None:
    label = np.zeros((96, 96, 96), np.uint8)
    label[:, 40, 40] = label[50, :, 50] = label[10, 20, :] = 1  # one voxel wide, half a block of the coarse grid
    figure = surfaces_figure({"label": label, "prediction": np.zeros_like(label)}, (1.0, 1.0, 1.0), {"vessel": 1})
    first, second = figure.axes
    assert len(first.collections) == 1
    mesh = mesh_mm(label > 0, (1.0, 1.0, 1.0), (2, 2, 2))
    assert mesh is not None
    assert np.ptp(mesh.reshape(-1, 3), axis=0) == pytest.approx([96, 96, 96], abs=4)
    assert not second.collections
    assert [text.get_text() for text in second.texts] == ["empty"]


@pytest.mark.slow
def test_surfaces_of_a_large_scan_are_coarse_enough_for_a_report() -> None:
    label = balls((80, 160, 160), (1.0, 0.5, 0.5))
    assert len(to_png(surfaces_figure({"label": label, "prediction": label}, (1.0, 0.5, 0.5), CLASSES))) < 600_000


def test_figures_leave_pyplot_and_its_settings_alone() -> None:
    before = dict(matplotlib.rcParams)
    curves(HISTORY)
    assert dict(matplotlib.rcParams) == before


def test_class_colours_differ_from_each_other() -> None:
    values = [np.array(to_rgb(colour)) for colour in CLASS_COLOURS]
    gaps = [np.abs(a - b).sum() for i, a in enumerate(values) for b in values[i + 1 :]]
    assert min(gaps) > 0.25
