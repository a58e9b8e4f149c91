"""The data that a plan and a run were made from: changed, moved, renamed; and splits that are given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import lightm
from lightm.errors import InputError
from lightm.training import resume_training, train_model
from lightm.training.config import TrainConfig, load_config
from lightm.training.run import new_run
from tests.helpers import TINY, make_balls

SMALL: dict[str, Any] = {**TINY, "steps_per_epoch": 1, "val_patches": 1, "epochs": 1}


def test_a_plan_of_the_data_set_is_refused_when_files_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = make_balls(tmp_path / "data", cases=4)
    lightm.plan(data)
    assert new_run(data, tmp_path / "run").plan.fingerprint.cases == 4
    make_balls(data, cases=5)
    with pytest.raises(InputError, match=r"plan\.yaml: .*changed.*4 cases then, 5 now.*lightm plan .*--plan"):
        new_run(data, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run = new_run(data, tmp_path / "run", plan=data / "plan.yaml")
    assert "made from other data (4 cases, 5 here)" in caplog.text
    assert run.data_hash != run.plan.fingerprint.data_hash
    label = next((data / "labelsTr").iterdir())
    lightm.plan(data)
    shutil.copy(data / "labelsTr" / "ball_03.nii.gz", label)  # the same names, other content
    with pytest.raises(InputError, match="changed"):
        new_run(data, tmp_path / "run")


def test_a_run_is_resumed_where_its_data_are_now(tmp_path: Path) -> None:
    data = make_balls(tmp_path / "data", cases=4)
    run = train_model(data, tmp_path / "run", **SMALL)
    record = json.loads((run.run_dir / "run.json").read_text(encoding="utf-8"))
    assert record["data_hash"] == run.plan.fingerprint.data_hash == run.data_hash
    moved = data.rename(tmp_path / "renamed")
    with pytest.raises(InputError, match=r"no longer at .*data; .*--dataset"):
        resume_training(run.run_dir, epochs=2)
    assert resume_training(run.run_dir, epochs=2, dataset=moved).epochs == 2
    assert load_config(run.run_dir / "config.yaml").dataset == str(moved)
    shutil.copy(moved / "imagesTr" / "ball_00_0000.nii.gz", moved / "imagesTr" / "ball_01_0000.nii.gz")
    with pytest.raises(InputError, match=r"have changed since the run .* was begun"):
        resume_training(run.run_dir, epochs=3)


def test_a_case_that_is_added_does_not_stop_a_run(tmp_path: Path) -> None:
    data = make_balls(tmp_path / "data", cases=4)
    run = train_model(data, tmp_path / "run", **SMALL)
    make_balls(data, cases=5)
    assert resume_training(run.run_dir, epochs=2).epochs == 2


def test_every_case_trains_with_fold_all(tmp_path: Path) -> None:
    data = make_balls(tmp_path / "data", cases=3)
    run = lightm.train(data, tmp_path / "run", fold="all", **SMALL)
    assert run.training.split.train == run.training.split.val == ["ball_00", "ball_01", "ball_02"]
    assert run.evaluation is None
    assert lightm.resume(run.run_dir, epochs=2).training.epochs == 2
    model = json.loads((run.model / "model.json").read_text(encoding="utf-8"))
    assert not (model.get("postprocess") or {}).get("steps")  # there is no case to choose it on


def test_a_fold_means_five_folds() -> None:
    assert TrainConfig(fold=3).folds == 5
    assert TrainConfig(folds=3).fold == 0
    assert TrainConfig(fold=1, folds=3).folds == 3
    assert TrainConfig(fold="all").folds is None
    assert TrainConfig(fold=1, split="splits_final.json").folds is None
    earlier = TrainConfig.model_validate({"folds": None, "fold": 0})  # a configuration of an earlier version
    assert (earlier.folds, earlier.fold) == (None, None)


@pytest.mark.parametrize("more", [{"folds": 3}, {"fold": "all"}, {"split_seed": 1}, {"group_by": "b"}])
def test_options_of_a_draw_beside_a_split_are_refused(tmp_path: Path, more: dict[str, Any]) -> None:
    data = make_balls(tmp_path / "data", cases=4)
    split = lightm.Split(kind="by hand", seed=0, train=["ball_00"], val=["ball_01"], test=[])
    split.save(tmp_path / "split.json")
    for given in (split, tmp_path / "split.json"):
        with pytest.raises(InputError, match="of a split that is drawn, but one is given"):
            new_run(data, tmp_path / "run", split=given, **more)
    assert new_run(data, tmp_path / "run", split=tmp_path / "split.json").split == split


def test_a_run_of_an_earlier_version_with_a_split_of_some_cases_is_resumed(tmp_path: Path) -> None:
    data = make_balls(tmp_path / "data", cases=4)
    split = lightm.Split(kind="by hand", seed=0, train=["ball_00"], val=["ball_01"], test=[])
    run = train_model(data, tmp_path / "run", split=split, **SMALL)
    record = run.run_dir / "run.json"
    content = json.loads(record.read_text(encoding="utf-8"))
    assert content["data_hash"] != run.plan.fingerprint.data_hash
    record.write_text(json.dumps({**content, "data_hash": run.plan.fingerprint.data_hash}), encoding="utf-8")
    assert resume_training(run.run_dir, epochs=2).epochs == 2
