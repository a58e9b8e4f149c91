"""Running a comparison: each trial once, resumed after any end, failures kept apart."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightm.datasets.phantoms import make_phantoms
from lightm.errors import InputError
from lightm.lab.compare import compare_experiment, load_experiment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_phantoms("liver", tmp_path_factory.mktemp("data") / "liver", cases=6, size=24, seed=0)


def _experiment(folder: Path, data: Path, **changes: Any) -> Path:
    content = {
        "name": "trial",
        "dataset": str(data),
        "networks": {"small": {"network": "lightm-unet", "options": {"base_channels": 8}}},
        "losses": ["ce+dice", "ce+arsl"],
        "recipes": {"tiny": {"recipe": "default", "settings": {"steps_per_epoch": 2, "warmup_steps": 0}}},
        "epochs": 1,
        "patch_size": [16, 16, 16],
        "batch_size": 1,
        "val_patches": 1,
        **changes,
    }
    path = folder / "trial.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


@pytest.mark.slow
def test_every_trial_runs_once_and_a_failing_one_does_not_stop_the_others(tmp_path: Path, data: Path) -> None:
    recipes = {
        "tiny": {"recipe": "default", "settings": {"steps_per_epoch": 2, "warmup_steps": 0}},
        "wild": {"recipe": "default", "settings": {"steps_per_epoch": 4, "warmup_steps": 0, "lr": 1e30}},
    }
    path = _experiment(tmp_path, data, losses=["ce+dice"], recipes=recipes, jobs=2)
    out = tmp_path / "out"
    first = compare_experiment(path, out)
    assert [found.trial.recipe for found in first.comparison.finished] == ["tiny"]
    assert [record.recipe for record in first.comparison.failed] == ["wild"]
    assert "loss is nan" in str(first.comparison.failed[0].error)
    assert not first.left
    assert first.page is not None
    assert first.page.is_file()
    assert first.comparison.networks["small"].parameters > 0
    trial = first.comparison.finished[0]
    assert [row.case for row in trial.evaluation().rows if row.class_name == "liver"] == first.comparison.split.test
    assert trial.history()["epoch"] == [0.0]

    stamp = (trial.path / "trial.json").stat().st_mtime_ns
    again = compare_experiment(path, out)
    assert again.ran == []
    assert (trial.path / "trial.json").stat().st_mtime_ns == stamp

    with pytest.raises(InputError, match="was trained with"):
        compare_experiment(_experiment(tmp_path, data, losses=["ce+dice"], epochs=2), out)
    with pytest.raises(InputError, match="patch_size"):
        compare_experiment(_experiment(tmp_path, data, patch_size=[24, 24, 24]), out)
    with pytest.raises(InputError, match="holds no comparison"):
        compare_experiment(path, data)
    assert (trial.path / "trial.json").stat().st_mtime_ns == stamp

    added = _experiment(tmp_path, data, recipes={"tiny": recipes["tiny"]}, total_time=0.001, max_time="5m")
    content = yaml.safe_load(added.read_text(encoding="utf-8"))
    del content["max_time"]
    added.write_text(yaml.safe_dump(content), encoding="utf-8")
    late = compare_experiment(added, out)
    assert late.ran == []
    assert late.left == ["small__ce+arsl__tiny__seed0"]

    (out / "trials").rename(out / "cells")
    with pytest.raises(InputError, match="Rename its folder cells to trials"):
        compare_experiment(added, out)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_killed_comparison_goes_on_and_ends_as_an_uninterrupted_one(tmp_path: Path, data: Path) -> None:
    path = _experiment(tmp_path, data, epochs=10, seeds=[1])
    out = tmp_path / "out"
    command = [sys.executable, "-m", "lightm", "compare", str(path), "-o", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first, second = (trial.id for trial in load_experiment(path).trials())
    history = out / "trials" / second / "history.csv"
    deadline = time.monotonic() + 240
    while not (history.is_file() and len(history.read_text(encoding="utf-8").splitlines()) > 2):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    lock = out / "trials" / second / ".lightm.lock"
    while lock.exists() and _alive(json.loads(lock.read_text(encoding="utf-8"))["pid"]):
        assert time.monotonic() < deadline, "the trial's process outlived its parent"
        time.sleep(0.05)
    done = (out / "trials" / first / "trial.json").read_bytes()
    assert not (out / "trials" / second / "trial.json").exists()
    rows = history.read_text(encoding="utf-8").splitlines()
    assert len(rows) < 11

    result = compare_experiment(path, out)
    assert result.ran == [second]
    assert (out / "trials" / first / "trial.json").read_bytes() == done
    assert history.read_text(encoding="utf-8").splitlines()[: len(rows)] == rows  # gone on with, not begun anew
    assert len(history.read_text(encoding="utf-8").splitlines()) == 11

    whole = compare_experiment(
        _experiment(tmp_path, data, epochs=10, seeds=[1], losses=["ce+arsl"]), tmp_path / "whole"
    )
    weights = [
        Path(f.path, "model", "model.safetensors").read_bytes()
        for f in (result.comparison.finished[1], whole.comparison.finished[0])
    ]
    assert weights[0] == weights[1]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def test_nothing_is_written_for_an_experiment_that_cannot_run(tmp_path: Path, data: Path) -> None:
    wrong = {
        "networks": {"small": {"network": "lightm-unet", "options": {"base_channels": 7}}},
        "recipes": {"tiny": {"recipe": "default", "settings": {"learning_rate": 1.0}}},
        "patch_size": [16, 16],
        "spacing_mm": [1.0, 2.0],
        "dataset": str(tmp_path / "nowhere"),
    }
    for key, value in wrong.items():
        with pytest.raises(InputError):
            compare_experiment(_experiment(tmp_path, data, **{key: value}), tmp_path / "out")
        assert not (tmp_path / "out" / "experiment.yaml").exists()
        assert not (tmp_path / "out" / "trials").exists()
