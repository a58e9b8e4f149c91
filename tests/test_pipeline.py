"""The demo and the whole way from data to report, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightm.errors import InputError
from lightm.pipeline import demo, finish_run, score_run, train
from lightm.training import train_model
from tests.helpers import make_balls

pytestmark = pytest.mark.slow


@pytest.mark.slow
def test_the_demo_goes_from_phantoms_to_a_report_and_replaces_only_itself(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = demo(out, max_time="2s", cases=6, size=32)
    assert result.report == out / "report.html"
    assert result.evaluation is not None
    assert set(result.evaluation.cases) == set(result.training.split.test)
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["status"] == "finished"
    described = json.loads((out / "model" / "model.json").read_text(encoding="utf-8"))
    assert described["postprocess"]["steps"] == []
    assert described["postprocess"]["why"].endswith("fewer than 10")
    assert "Post-processing" in result.report.read_text(encoding="utf-8")
    with pytest.raises(InputError, match="--overwrite"):
        demo(out, max_time="2s", cases=6, size=32)
    again = demo(out, max_time="2s", cases=6, size=32, overwrite=True)
    assert again.report.is_file()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="already holds"):
        demo(tmp_path / "mine", max_time="2s", cases=6, size=32, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").is_file()


def test_two_plain_folders_are_trained_on_scored_and_reported(tmp_path: Path) -> None:
    data = make_balls(tmp_path / "data", cases=5, dims=2, size=16, classes=1)
    (data / "dataset.json").unlink()
    for path in (data / "imagesTr").iterdir():
        path.rename(path.with_name(path.name.replace("_0000", "")))
    result = train(
        data / "imagesTr",
        tmp_path / "run",
        labels=data / "labelsTr",
        network_options={"base_channels": 8, "bottleneck_layers": 0},
        settings={"steps_per_epoch": 2},
        epochs=1,
        val_patches=1,
    )
    assert result.evaluation is not None
    assert [summary.class_name for summary in result.evaluation.classes] == ["label_1"]
    assert result.report.stat().st_size > 10_000


def test_scoring_needs_a_trained_run_with_test_cases(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no trained run"):
        score_run(tmp_path)
    data = make_balls(tmp_path / "data", cases=4, dims=2, size=16)
    split = {"kind": "mine", "seed": 0, "train": ["ball_00", "ball_01"], "val": ["ball_02"], "test": []}
    (tmp_path / "split.json").write_text(json.dumps(split), encoding="utf-8")
    trained = train_model(
        data,
        tmp_path / "run",
        split=tmp_path / "split.json",
        network_options={"base_channels": 8, "bottleneck_layers": 0},
        settings={"steps_per_epoch": 1},
        epochs=1,
        val_patches=1,
    )
    with pytest.raises(InputError, match="no test cases"):
        score_run(tmp_path / "run")
    result = finish_run(trained)
    assert result.evaluation is None
    assert result.report.is_file()
