"""Prediction of folders: which cases are taken, what is written, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightm.errors import InputError, LightMError
from lightm.images.io import read_volume, write_volume
from lightm.images.volume import Volume
from lightm.inference import predict_folder
from tests.messages import on_message

from .factories import MODEL, PlanMaker, add


@pytest.mark.parametrize("limit", [None, "2GB"])
def test_what_post_processing_changed_is_told_and_recorded(
    model: dict[str, Any], tmp_path: Path, limit: str | None
) -> None:
    data = np.full((8, 8, 8), -1, np.float32)
    data[2:5, 2:6, 2:6] = 1
    write_volume(tmp_path / "in" / "a_0000.nii.gz", Volume.from_spacing(data, (2.0, 1.0, 1.0)))
    data[7, 0, :2], data[0, 0, 7] = 1, 1
    write_volume(tmp_path / "in" / "b_0000.nii.gz", Volume.from_spacing(data, (2.0, 1.0, 1.0)))
    model["postprocess"] = {"steps": [{"rule": "keep_largest", "values": [1]}]}
    (MODEL / "model.json").write_text(json.dumps(model), encoding="utf-8")
    lines: list[str] = []
    with on_message(lines.append, "inference"):
        predict_folder(MODEL, tmp_path / "in", tmp_path / "out", max_memory=limit)
    assert lines[0].endswith("; post-processing: nothing changed")
    assert lines[1].endswith("; post-processing: bright: 2 components (3 voxels) removed")
    record = json.loads((tmp_path / "out" / "prediction.json").read_text(encoding="utf-8"))
    counts = {"removed_voxels": 3, "removed_components": 2, "filled_voxels": 0, "filled_holes": 0}
    assert [case["postprocess"] for case in record["cases"]] == [{}, {"bright": counts}]
    lines.clear()
    with on_message(lines.append, "inference"):
        predict_folder(MODEL, tmp_path / "in", tmp_path / "raw", postprocess=False)
    assert not any("post-processing" in line for line in lines)
    raw = json.loads((tmp_path / "raw" / "prediction.json").read_text(encoding="utf-8"))
    assert [case["postprocess"] for case in raw["cases"]] == [None, None]


def test_folder_of_images(model: dict[str, Any], tmp_path: Path) -> None:
    images = {name: add(tmp_path / "in" / f"{name}_0000.nii.gz", seed=i) for i, name in enumerate(("b", "a"))}
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    steps: list[tuple[str, int, int]] = []
    out = tmp_path / "deep" / "out"
    written = predict_folder(
        MODEL, tmp_path / "in", out, progress=lambda what, done, total: steps.append((what, done, total))
    )
    assert written == [out / "a.nii.gz", out / "b.nii.gz"]
    assert sorted(path.name for path in out.iterdir()) == ["a.nii.gz", "b.nii.gz", "prediction.json"]
    for name, image in images.items():
        result = read_volume(out / f"{name}.nii.gz", kind="label")
        assert np.array_equal(result.data, image.data > 0)
        assert np.array_equal(result.affine, image.affine)
        assert result.data.dtype == np.uint8
    cases = [step for step in steps if step[0] == "predict"]
    assert cases == [("predict", 0, 2), ("predict", 1, 2), ("predict", 2, 2)]
    assert {step[0] for step in steps} == {"predict", "windows"}
    record = json.loads((out / "prediction.json").read_text())
    assert record["model"]["path"] == "model"
    assert [entry["case"] for entry in record["cases"]] == ["a", "b"]
    assert all(entry["seconds"] >= 0 and entry["shape"] == [5, 12, 9] for entry in record["cases"])
    assert set(record["versions"]) == {"lightm", "numpy", "python", "torch"}
    assert record["failed"] == []


def test_single_file_and_png(model: dict[str, Any], make_plan: PlanMaker, tmp_path: Path) -> None:
    image = add(tmp_path / "scan.nii")
    assert predict_folder(MODEL, tmp_path / "scan.nii", tmp_path / "out") == [tmp_path / "out" / "scan.nii"]
    assert np.array_equal(read_volume(tmp_path / "out" / "scan.nii", kind="label").data, image.data > 0)
    model["plan"] = make_plan((1.0, 1.0), (8, 8)).model_dump(mode="json")
    grey = np.arange(0, 200, dtype=np.uint8).reshape(10, 20)
    write_volume(tmp_path / "x_0000.png", Volume.from_spacing(grey, (1.0, 1.0)))
    assert predict_folder(MODEL, tmp_path / "x_0000.png", tmp_path / "png") == [tmp_path / "png" / "x.png"]
    assert np.array_equal(read_volume(tmp_path / "png" / "x.png", kind="label").data, grey > 0)


def test_a_faulty_case_is_named_and_the_others_go_on(model: dict[str, Any], tmp_path: Path) -> None:
    add(tmp_path / "in" / "good_0000.nii")
    (tmp_path / "in" / "torn_0000.nii").write_bytes(b"\0" * 100)
    add(tmp_path / "in" / "flat_0000.nii", shape=(6, 6))
    with pytest.raises(LightMError, match=r"2 of 3 cases could not") as caught:
        predict_folder(MODEL, tmp_path / "in", tmp_path / "out")
    assert caught.value.exit_code == 1
    assert "flat_0000.nii: a 2D image" in str(caught.value)
    assert "torn_0000.nii: " in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["good.nii", "prediction.json"]
    record = json.loads((tmp_path / "out" / "prediction.json").read_text())
    assert [fault["case"] for fault in record["failed"]] == ["flat", "torn"]


def test_nothing_is_written_when_nothing_can_be_read(model: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "torn.nii.gz").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"torn\.nii\.gz"):
        predict_folder(MODEL, tmp_path / "torn.nii.gz", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_of_another_run(model: dict[str, Any], tmp_path: Path) -> None:
    add(tmp_path / "in" / "a.nii")
    add(tmp_path / "in" / "b.nii")
    out = tmp_path / "out"
    predict_folder(MODEL, tmp_path / "in", out)
    (out / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="already holds files"):
        predict_folder(MODEL, tmp_path / "in", out)
    assert predict_folder(MODEL, tmp_path / "in", out, cases=["b"], overwrite=True) == [out / "b.nii"]
    assert sorted(path.name for path in out.iterdir()) == ["b.nii", "mine.txt", "prediction.json"]
    with pytest.raises(InputError, match="a file; give a folder"):
        predict_folder(MODEL, tmp_path / "in", out / "mine.txt")
    with pytest.raises(InputError, match="replace its own image"):
        predict_folder(MODEL, tmp_path / "in", tmp_path / "in", overwrite=True)
    assert (tmp_path / "in" / "a.nii").exists()


def test_a_plan_that_is_not_valid(model: dict[str, Any], tmp_path: Path) -> None:
    model["plan"] = {"spatial_dims": 4}
    with pytest.raises(InputError, match=r"model\.json: its plan is not valid"):
        predict_folder(MODEL, tmp_path, tmp_path / "out")
