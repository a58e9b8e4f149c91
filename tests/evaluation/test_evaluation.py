"""Summaries with intervals, files of results and folders of cases."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from lightm.errors import InputError
from lightm.evaluation.evaluation import CaseRow, Evaluation, format_table, load_evaluation, summarize
from lightm.evaluation.folder import evaluate_folder
from lightm.images.io import read_volume, write_volume
from lightm.images.volume import Volume

ABSENT = ("absent", None, None, None, None)
MISSED = ("missed", 0.0, 0.0, None, 0.0)


def row(case: str, name: str, status: str, dsc: float | None, iou: float | None, hd: float | None, nsd: float | None):
    sizes = {"volume_label_ml": 1.0, "volume_pred_ml": 1.0, "voxels_label": 1, "voxels_pred": 1}
    return CaseRow(case=case, class_name=name, status=status, dsc=dsc, iou=iou, hd95_mm=hd, nsd=nsd, **sizes)


def summary(rows: list[CaseRow], **options: object) -> Evaluation:
    labels = {name: i + 1 for i, name in enumerate(dict.fromkeys(r.class_name for r in rows))}
    settings = {"spatial_dims": 3, "distance_unit": "mm", "nsd_tolerance_mm": dict.fromkeys(labels, 1.0), **options}
    return summarize(rows, labels, **settings)


def varied(cases: int = 12) -> list[CaseRow]:
    rng = np.random.default_rng(1)
    return [row(f"c{i:02d}", n, "present", *rng.random(4)) for i in range(cases) for n in ("a", "b")]


def test_absent_missed_and_spurious_are_counted_apart() -> None:
    present = ("present", 0.8, 0.7, 2.0, 0.9)
    result = summary([row("1", "a", *present), row("2", "a", *MISSED), row("3", "a", *ABSENT)]).classes[0]
    assert result.counts == {"present": 1, "missed": 1, "spurious": 0, "absent": 1}
    assert (result.dsc.n, result.dsc.mean) == (2, pytest.approx(0.4))
    assert (result.hd95_mm.n, result.hd95_mm.mean) == (1, 2.0)
    assert result.hd95_mm.low is None  # one case says nothing about the spread
    assert result.hd95_mm.sd is None


def test_a_class_absent_everywhere_has_no_number_and_leaves_the_mean_alone() -> None:
    rows = [r for c in "123" for r in (row(c, "a", "present", 0.5, 0.4, 1.0, 0.6), row(c, "b", *ABSENT))]
    result = summary(rows)
    assert result.classes[1].dsc.mean is None
    assert result.classes[1].dsc.n == 0
    assert (result.overall.dsc.n, result.overall.dsc.mean) == (1, 0.5)


def test_mean_over_classes_is_the_mean_of_the_class_means() -> None:
    """Class a has 2 cases, class b one: (0.6 + 0.2) / 2, not the mean of the three numbers."""
    rows = [
        row("1", "a", "present", 0.5, 0.3, 1.0, 0.5),
        row("1", "b", "present", 0.2, 0.1, 3.0, 0.1),
        row("2", "a", "present", 0.7, 0.5, 1.0, 0.7),
        row("2", "b", *ABSENT),
    ]
    result = summary(rows)
    assert result.overall.dsc.mean == pytest.approx(0.4)
    assert result.overall.iou.mean == pytest.approx((0.4 + 0.1) / 2)
    assert result.case_dsc() == {"1": pytest.approx(0.35), "2": pytest.approx(0.7)}


def test_interval_of_a_constant_is_that_constant() -> None:
    rows = [row(str(i), "a", "present", 0.25, 0.5, 3.0, 1.0) for i in range(5)]
    dsc = summary(rows).classes[0].dsc
    assert (dsc.low, dsc.high, dsc.sd) == (pytest.approx(0.25), pytest.approx(0.25), 0.0)


def test_intervals_are_decided_by_the_seed() -> None:
    rows = varied()
    first, again, other = (summary(rows, seed=seed, bootstrap=300) for seed in (1, 1, 2))
    assert first == again
    assert first.classes[0].dsc.low != other.classes[0].dsc.low
    assert first.classes[0].dsc.mean == other.classes[0].dsc.mean


def test_interval_follows_the_normal_one_for_many_cases() -> None:
    values = np.random.default_rng(3).normal(0.7, 0.1, 400)
    dsc = (
        summary([row(f"{i}", "a", "present", v, v, v, v) for i, v in enumerate(values)], bootstrap=4000).classes[0].dsc
    )
    half = 1.96 * values.std(ddof=1) / np.sqrt(values.size)
    assert dsc.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert dsc.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_no_resamples_no_intervals() -> None:
    result = summary(varied(), bootstrap=0)
    assert result.overall.dsc.low is None
    assert result.overall.dsc.mean is not None


def test_json_and_csv_hold_the_same_numbers(tmp_path: Path) -> None:
    rows = [*varied(3), row("c99", "a", *ABSENT), row("c99", "b", *MISSED)]
    result = summary(rows)
    result.to_json(tmp_path / "new" / "metrics.json")
    result.to_csv(tmp_path / "new" / "metrics.csv")
    assert load_evaluation(tmp_path / "new" / "metrics.json") == result
    with (tmp_path / "new" / "metrics.csv").open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(rows)
    for line, expected in zip(read, rows, strict=True):
        assert (line["case"], line["class"], line["status"]) == (expected.case, expected.class_name, expected.status)
        for metric in ("dsc", "iou", "hd95_mm", "nsd", "volume_label_ml"):
            value = getattr(expected, metric)
            assert line[metric] == "" if value is None else float(line[metric]) == value
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["metrics.csv", "metrics.json"]


@pytest.mark.parametrize("content", ["{", "[]", '{"schema_version": 2}', None])
def test_something_else_is_no_evaluation(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "metrics.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"metrics\.json.*lightm evaluate"):
        load_evaluation(path)


def test_table_shows_means_intervals_and_counts() -> None:
    rows = [row(str(i), n, "present", 0.25, 0.5, 3.0, 1.0) for i in range(5) for n in ("[b]liver", "x")]
    text = io.StringIO()
    Console(file=text, width=200).print(format_table(summary(rows)))
    assert "0.250 [0.250, 0.250]" in text.getvalue()
    assert "3.00 [3.00, 3.00]" in text.getvalue()
    assert "[b]liver" in text.getvalue()
    assert "mean over classes" in text.getvalue()


def folders(run: Path) -> tuple[Path, Path]:
    return run / "predictions", run.parent / "Dataset001_Test" / "labelsTr"


def test_folder_of_cases(make_run: Callable[..., Path]) -> None:
    run = make_run()
    seen: list[tuple[str, int, int]] = []
    predictions, labels = folders(run)
    result = evaluate_folder(predictions, labels, progress=lambda *step: seen.append(step), bootstrap=200)
    assert result == load_evaluation(run / "evaluation" / "metrics.json")
    assert result.cases == ["a", "b", "c", "d"]
    assert result.labels == {"organ": 1, "lesion": 2}
    assert (result.spatial_dims, result.distance_unit) == (3, "mm")
    rows = {(r.case, r.class_name): r for r in result.rows}
    assert rows["a", "organ"].dsc == rows["a", "lesion"].dsc == 1.0
    assert rows["b", "lesion"].dsc == pytest.approx(2 / 3)  # 3 slices, shifted by one
    assert rows["b", "lesion"].hd95_mm == pytest.approx(2.0)  # one slice is 2 mm
    assert rows["d", "lesion"].status == "missed"
    assert rows["a", "lesion"].volume_label_ml == pytest.approx(27 * 2.0 / 1000)
    assert seen[0] == ("evaluating", 0, 4)
    assert seen[-1] == ("evaluating", 4, 4)


def test_png_is_measured_in_pixels(make_run: Callable[..., Path]) -> None:
    result = load_evaluation(make_run(dims=2) / "evaluation" / "metrics.json")
    assert (result.spatial_dims, result.distance_unit) == (2, "px")
    assert {r.volume_label_ml for r in result.rows} == {None}
    assert next(r for r in result.rows if r.case == "c" and r.class_name == "lesion").hd95_mm == pytest.approx(2.0)


def test_classes_and_cases_can_be_given(make_run: Callable[..., Path]) -> None:
    predictions, labels = folders(make_run(evaluate=False))
    (labels.parent / "dataset.json").unlink()
    names = {"background": 0, "first": 1, "second": 2}
    result = evaluate_folder(predictions, labels, labels_map=names, cases=["b", "a"])
    assert (result.cases, list(result.labels)) == (["a", "b"], ["first", "second"])
    (predictions / "d.nii.gz").unlink()
    assert evaluate_folder(predictions, labels, labels_map=names, cases="predicted").cases == ["a", "b", "c"]
    with pytest.raises(InputError, match=r"no prediction for d; .*--cases predicted"):
        evaluate_folder(predictions, labels)
    assert list(evaluate_folder(predictions, labels, cases="predicted").labels) == ["1", "2"]


def test_ignored_value_of_the_data_set(make_run: Callable[..., Path]) -> None:
    predictions, labels = folders(make_run(evaluate=False))
    description = json.loads((labels.parent / "dataset.json").read_text(encoding="utf-8"))
    description["labels"] = {"background": 0, "organ": 1, "ignore": 2}
    (labels.parent / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    result = evaluate_folder(predictions, labels, cases=["d"])  # d holds no 2, its label does
    assert result.labels == {"organ": 1}
    with pytest.raises(InputError, match=r"case a: prediction .*a\.nii\.gz holds 2"):
        evaluate_folder(predictions, labels, cases=["a"])


def other_geometry(path: Path) -> None:
    write_volume(path, Volume.from_spacing(np.zeros((14, 16, 18), np.uint8), (2.5, 1.0, 1.0)), kind="label")


def other_shape(path: Path) -> None:
    write_volume(path, Volume.from_spacing(np.zeros((14, 16, 17), np.uint8), (2.0, 1.0, 1.0)), kind="label")


def unknown_value(path: Path) -> None:
    write_volume(path, Volume.from_spacing(np.full((14, 16, 18), 7, np.uint8), (2.0, 1.0, 1.0)), kind="label")


@pytest.mark.parametrize(
    ("break_it", "where", "message"),
    [
        (Path.unlink, "predictions", r"no prediction for b;.*predicted"),
        (Path.unlink, "labels", r"no label for b .*b\.nii\.gz"),
        (other_geometry, "predictions", r"case b: prediction .*b\.nii\.gz and label .*spacing"),
        (other_shape, "predictions", r"case b: prediction .*b\.nii\.gz and label .*shape"),
        (unknown_value, "predictions", r"case b: prediction .*b\.nii\.gz holds 7.*lesion=2"),
        (unknown_value, "labels", r"case b: label .*b\.nii\.gz holds 7"),
        (lambda path: path.write_bytes(b"no image"), "labels", r"b\.nii\.gz"),
    ],
)
def test_bad_folders_are_refused_and_nothing_is_written(
    make_run: Callable[..., Path], break_it: Callable[[Path], None], where: str, message: str
) -> None:
    run = make_run(evaluate=False)
    predictions, labels = folders(run)
    break_it((predictions if where == "predictions" else labels) / "b.nii.gz")
    with pytest.raises(InputError, match=message):
        evaluate_folder(predictions, labels, out=run / "evaluation")
    assert not (run / "evaluation").exists()


def test_calls_that_make_no_sense(make_run: Callable[..., Path]) -> None:
    predictions, labels = folders(make_run(evaluate=False))
    with pytest.raises(InputError, match=r"did you mean .*labelsTr"):
        evaluate_folder(predictions, labels.parent)
    with pytest.raises(InputError, match="is no folder"):
        evaluate_folder(predictions / "none", labels)
    with pytest.raises(InputError, match="list of cases is empty"):
        evaluate_folder(predictions, labels, cases=[])
    with pytest.raises(InputError, match="no prediction for e"):
        evaluate_folder(predictions, labels, cases="a, e")  # as the command line gives it
    with pytest.raises(InputError, match="no prediction for e"):
        evaluate_folder(predictions, labels, cases=["a", "e"])
    with pytest.raises(InputError, match="bootstrap is -1"):
        evaluate_folder(predictions, labels, bootstrap=-1)
    with pytest.raises(InputError, match="two classes have the same value"):
        evaluate_folder(predictions, labels, labels_map={"a": 1, "b": 1})
    with pytest.raises(InputError, match="expected a whole number"):
        evaluate_folder(predictions, labels, labels_map={"a": "1"})  # type: ignore[dict-item]
    with pytest.raises(InputError, match="names no class"):
        evaluate_folder(predictions, labels, labels_map={"background": 0})
    (labels / "a.nii").write_bytes(b"")
    with pytest.raises(InputError, match="case a twice"):
        evaluate_folder(predictions, labels)


def test_regions_are_scored_each_by_itself(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(evaluate=False)
    data = tmp_path / "Dataset001_Test"
    regions = {"whole": [1, 2], "core": [2]}
    asked = evaluate_folder(run / "predictions", data / "labelsTr", labels_map=regions, bootstrap=50)
    description = json.loads((data / "dataset.json").read_text())
    description.update(labels={"background": 0, **regions}, regions_class_order=[1, 2])
    (data / "dataset.json").write_text(json.dumps(description))
    read = evaluate_folder(run / "predictions", data / "labelsTr", out=tmp_path / "scores", bootstrap=50)
    assert read == asked
    assert load_evaluation(tmp_path / "scores" / "metrics.json") == read
    assert read.labels == regions
    for row in read.rows:
        pred, label = (read_volume(p / f"{row.case}.nii.gz").data for p in (run / "predictions", data / "labelsTr"))
        p, g = np.isin(pred, read.labels[row.class_name]), np.isin(label, read.labels[row.class_name])
        assert (row.voxels_pred, row.voxels_label) == (p.sum(), g.sum())
        assert row.dsc == pytest.approx(2 * (p & g).sum() / (p.sum() + g.sum()))
    for wrong, message in (
        ({"whole": [0, 1]}, "a region holds the background"),
        ({"whole": [1, 2], "same": [2, 1]}, "the same value"),
        ({"whole": [1]}, "holds 2, which is no class"),
        ({"whole": [1, "x"]}, "expected a whole number"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate_folder(run / "predictions", data / "labelsTr", labels_map=wrong)
