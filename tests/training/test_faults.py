"""Processes killed at random moments: nothing torn, a rerun completes.

Quick here; $LIGHTM_SOAK=N kills each kind of work N times (docs/reliability.md has the numbers of such a run).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from lightm.errors import InputError
from lightm.files import LOCK, locked_folder
from lightm.nets import load_model
from lightm.training.checkpoint_io import load_checkpoint
from tests.helpers import make_balls
from tests.training.faults import OPTIONS, Server, compare_cases, leftovers, posix
from tests.training.test_guard import same

pytestmark = pytest.mark.slow

SOAK = int(os.environ.get("LIGHTM_SOAK", "0"))


@posix
def test_a_training_killed_at_random_moments_ends_as_one_never_killed(
    server: Server, balls: Path, whole: tuple[Path, float], tmp_path: Path
) -> None:
    rng, (reference, seconds) = random.Random(1), whole
    kills, wanted, rounds = 0, SOAK or 3, 0
    while kills < wanted:
        run, rounds = tmp_path / f"run{rounds}", rounds + 1
        order = {"do": "train", "data": str(balls), "run": str(run), "epochs": 3, **OPTIONS}
        for _ in range(3):
            if not server.kill(rng.uniform(0, 0.9 * seconds), **order):
                break
            kills += 1
            for path in (run / "checkpoints").glob("*.ckpt"):
                load_checkpoint(path)
            if (run / "model").exists():
                load_model(run / "model")
        server.finish(**order)
        assert same(run, reference)
        ours, theirs = load_model(run / "model")[0].state_dict(), load_model(reference / "model")[0].state_dict()
        assert all(ours[name].equal(theirs[name]) for name in theirs)
        assert not [path for path in leftovers(run) if not Path(path).name.startswith(".model-")]
        shutil.rmtree(run)
    print(f"{kills} kills of {rounds} trainings")


@posix
def test_a_preprocessing_killed_at_random_moments_leaves_whole_cases_or_none(server: Server, tmp_path: Path) -> None:
    rng, data = random.Random(2), make_balls(tmp_path / "Dataset003_Balls", size=40, cases=8)
    order = {"do": "preprocess", "data": str(data)}
    server.finish(cache=str(tmp_path / "first"), **order)
    seconds = server.finish(cache=str(tmp_path / "whole"), **order)
    expected = {path.name: path for path in (tmp_path / "whole" / data.name).iterdir() if path.is_dir()}
    assert len(expected) == 8
    kills, wanted, rounds = 0, SOAK or 6, 0
    while kills < wanted:
        cache, rounds = tmp_path / f"cache{rounds}", rounds + 1
        for _ in range(3):
            if not server.kill(rng.uniform(0, seconds), cache=str(cache), **order):
                break
            kills += 1
            compare_cases(cache / data.name, expected)
        server.finish(cache=str(cache), **order)
        assert compare_cases(cache / data.name, expected) == 8
        shutil.rmtree(cache)
    print(f"{kills} kills of {rounds} preprocessings")


@posix
def test_a_prediction_killed_at_random_moments_leaves_whole_label_maps_or_none(
    server: Server, balls: Path, whole: tuple[Path, float], tmp_path: Path
) -> None:
    rng = random.Random(3)
    order = {"do": "predict", "model": str(whole[0] / "model"), "images": str(balls / "imagesTr")}
    seconds = server.finish(out=str(tmp_path / "whole"), **order)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.nii.gz")}
    assert len(expected) == 6
    kills, wanted, rounds = 0, SOAK or 6, 0
    while kills < wanted:
        out, rounds = tmp_path / f"out{rounds}", rounds + 1
        for _ in range(3):
            if not server.kill(rng.uniform(0, seconds), out=str(out), **order):
                break
            kills += 1
            for path in out.glob("*.nii.gz"):
                if not path.name.startswith("."):
                    assert path.read_bytes() == expected[path.name]
        server.finish(out=str(out), **order)
        assert {name: (out / name).read_bytes() for name in expected} == expected
        for name in expected:
            assert set(np.unique(nib.load(out / name).get_fdata())) <= {0, 1, 2}
        shutil.rmtree(out)
    print(f"{kills} kills of {rounds} predictions")


@posix
def test_sigterm_from_outside_exits_with_143_and_the_run_goes_on(
    server: Server, balls: Path, whole: tuple[Path, float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    order = {"do": "train", "data": str(balls), "run": str(run), "epochs": 3, **OPTIONS}
    pid = server.ask(**order)
    deadline = time.monotonic() + 60
    while not (run / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(InputError, match=rf"in use: training by process {pid} "), locked_folder(run, "test"):
        pass
    os.kill(pid, signal.SIGTERM)
    assert server.ask(wait=pid) == 143
    assert not (run / LOCK).exists()
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["status"] == "interrupted"
    server.finish(**order)
    assert same(run, whole[0])
