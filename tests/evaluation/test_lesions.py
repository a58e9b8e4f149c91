"""Lesions one by one against counting by hand, and the folder's options that lead to them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from lightm.evaluation.evaluation import format_lesions, load_evaluation
from lightm.evaluation.folder import evaluate_folder
from lightm.evaluation.lesions import case_lesions, summarize_lesions
from lightm.images.io import write_volume
from lightm.images.volume import Volume


def maps() -> tuple[np.ndarray, np.ndarray]:
    """Three true lesions: one found well, one found in two pieces, one missed; and one false one."""
    truth, pred = np.zeros((12, 12, 12), np.uint8), np.zeros((12, 12, 12), np.uint8)
    truth[0:3, 0:3, 0:3] = 1  # 27
    pred[0:3, 0:3, 0:2] = 1  # 18 of them
    truth[6:8, 6:8, 0:10] = 1  # 40
    pred[6:8, 6:8, 0:6] = pred[6:8, 6:8, 7:9] = 1  # 24 and 8
    truth[11, 11, 11] = 1
    pred[0, 11, 0] = 1
    return pred, truth


def test_lesions_counted_by_hand() -> None:
    pred, truth = maps()
    rows = case_lesions("a", pred, truth, (2.0, 1.0, 1.0), {"lesion": 1})
    assert [(row.status, row.voxels_label, row.voxels_pred) for row in rows] == [
        ("found", 27, 18),
        ("found", 40, 24),
        ("missed", 1, 0),
        ("false", 0, 1),
        ("false", 0, 8),
    ]
    assert rows[0].dsc == pytest.approx(36 / 45)
    assert rows[1].iou == pytest.approx(24 / 40)
    assert rows[1].volume_label_ml == pytest.approx(0.08)
    (summary,) = summarize_lesions(rows, ["lesion"], 2, 0.1)
    assert (summary.lesions, summary.found, summary.false) == (3, 2, 2)
    assert summary.sensitivity == pytest.approx(2 / 3)
    assert summary.precision == pytest.approx(1 / 2)
    assert summary.f1 == pytest.approx(4 / 7)
    assert summary.false_per_case == 1
    assert [round(group.dsc, 3) for group in summary.sizes] == [0, 0.8, 0.75]
    assert [group.low for group in summary.sizes] == pytest.approx([0.002, 0.054, 0.08])


def test_the_overlap_that_counts_as_found() -> None:
    pred, truth = maps()
    rows = case_lesions("a", pred, truth, (1, 1, 1), {"lesion": 1}, min_iou=0.65)
    assert [row.status for row in rows] == ["found", "missed", "missed", "false", "false", "false"]


def test_matching_is_one_to_one_and_the_best_pair_comes_first() -> None:
    truth, pred = np.zeros((1, 20), np.uint8), np.zeros((1, 20), np.uint8)
    truth[0, 0:10], pred[0, 1:8], pred[0, 9] = 1, 1, 1
    rows = case_lesions("a", pred, truth, (1, 1), {"lesion": 1}, min_iou=0.01)
    assert [(row.status, row.voxels_pred) for row in rows] == [("found", 7), ("false", 1)]
    assert rows[0].volume_label_ml is None


def test_corners_join_and_ignored_voxels_do_not_count() -> None:
    truth = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 9]], np.uint8)
    pred = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], np.uint8)
    rows = case_lesions("a", pred, truth, (1, 1), {"lesion": 1}, ignore_label=9)
    assert [(row.status, row.voxels_label, row.dsc) for row in rows] == [("found", 2, 1.0)]


def test_nothing_true_and_nothing_predicted_is_undefined() -> None:
    empty = np.zeros((3, 3), np.uint8)
    (summary,) = summarize_lesions(case_lesions("a", empty, empty, (1, 1), {"lesion": 1}), ["lesion"], 1, 0.1)
    assert (summary.lesions, summary.sensitivity, summary.precision, summary.f1) == (0, None, None, None)


def test_a_folder_without_names_scores_every_value_and_its_lesions(tmp_path: Path) -> None:
    pred, truth = maps()
    for name, data in (("pred", pred), ("true", truth * 3)):
        for case in ("a", "b"):
            (tmp_path / name).mkdir(exist_ok=True)
            shown = data * 3 if name == "pred" else data
            write_volume(tmp_path / name / f"{case}.nii.gz", Volume(shown, (1.0, 1.0, 1.0), np.eye(4)), kind="label")
    result = evaluate_folder(tmp_path / "pred", tmp_path / "true", lesions=True, out=tmp_path / "out")
    assert result.labels == {"3": 3}
    assert result.lesions is not None
    assert (result.lesions[0].lesions, result.lesions[0].false_per_case) == (6, 2)
    assert load_evaluation(tmp_path / "out" / "metrics.json") == result
    with open(tmp_path / "out" / "lesions.csv", encoding="utf-8", newline="") as file:
        assert [row["status"] for row in csv.DictReader(file)].count("missed") == 2
    assert format_lesions(result).row_count == 1
