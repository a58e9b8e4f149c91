"""Processes killed at random moments, full disks and folders that cannot be written: nothing torn, a rerun completes.

Quick here; $LIGHTM_SOAK=N kills each kind of work N times (docs/reliability.md has the numbers of such a run).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from lightm.data.cache import find
from lightm.errors import InputError, LightMError
from lightm.files import LOCK, locked_folder
from lightm.nets import load_model
from lightm.train import resume_training, train_model
from lightm.train.checkpoint_io import SafeCheckpointIO
from tests.helpers import make_balls
from tests.train.test_guard import same
from tests.train.test_train import SMALL

SOAK = int(os.environ.get("LIGHTM_SOAK", "0"))
posix = pytest.mark.skipif(sys.platform == "win32", reason="no fork and no SIGKILL there")
OPTIONS = {key: value for key, value in SMALL.items() if key != "say"}


class Server:
    """Starts work in processes and kills them."""

    def __init__(self, cache: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.train.fault_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "LIGHTM_CACHE": str(cache)},
        )

    def ask(self, **order: Any) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def finish(self, **order: Any) -> float:
        """Let work run to its end; returns its seconds."""
        started = time.monotonic()
        pid = self.ask(**order)
        assert self.ask(wait=pid) == 0
        return time.monotonic() - started

    def kill(self, after_s: float, **order: Any) -> bool:
        """Kill work after a while; False when it ended before."""
        pid = self.ask(**order)
        time.sleep(after_s)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        status = self.ask(wait=pid)
        assert status in (0, -signal.SIGKILL), "work that is killed has met no error before"
        return status != 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("cache"))
    yield server
    server.process.communicate(timeout=30)


@pytest.fixture(scope="module")
def balls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_balls(tmp_path_factory.mktemp("data") / "Dataset001_Balls", size=24)


@pytest.fixture(scope="module")
def whole(server: Server, balls: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that nothing disturbed, and its seconds once kernels and cache are warm."""
    place = tmp_path_factory.mktemp("whole")
    order = {"do": "train", "data": str(balls), "epochs": 3, **OPTIONS}
    server.finish(run=str(place / "first"), **order)
    return place / "run", server.finish(run=str(place / "run"), **order)


def leftovers(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.name.startswith(".")]


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
                SafeCheckpointIO().load_checkpoint(path)
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


def compare_cases(folder: Path, expected: dict[str, Path]) -> int:
    found = [path for path in folder.glob("*") if path.is_dir() and not path.name.startswith(".tmp-")]
    for path in found:
        case = find(path, path.name)
        assert case is not None
        for name in ("image.npy", "label.npy"):
            assert np.array_equal(np.load(path / name), np.load(expected[path.name] / name))
        assert case.foreground().keys() == {1, 2}
    return len(found)


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


# ---- disks that refuse --------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["last.ckpt", "history.csv", "run.json"])
def test_a_disk_that_fills_up_leaves_the_last_checkpoint(
    victim: str, balls: Path, whole: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full from the end of an epoch on, for one kind of file."""
    run, sync, full = tmp_path / "run", os.fsync, [False]

    def fsync(descriptor: int) -> None:
        if full[0] and victim in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc to tell files by")
    monkeypatch.setattr(os, "fsync", fsync)

    def say(text: str) -> None:
        if text.startswith("Epoch 0" if victim == "history.csv" else "Epoch 1"):
            full[0] = True

    with pytest.raises(LightMError, match=rf"{victim}.*No space left on device.*free space"):
        train_model(balls, run, epochs=3, **{**SMALL, "say": say})
    last = SafeCheckpointIO().load_checkpoint(run / "checkpoints" / "last.ckpt")
    assert last["epoch"] == {"run.json": 2}.get(victim, 0)
    assert not leftovers(run)
    if victim == "last.ckpt":
        monkeypatch.undo()
        monkeypatch.setenv("LIGHTM_CACHE", str(tmp_path / "cache"))
        resume_training(run, say=lambda text: None)
        assert same(run, whole[0])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)]
    if mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(path: Path, leave: int) -> None:
    """Take all space of a disk but `leave` bytes."""
    space = shutil.disk_usage(path.parent).free - leave
    with contextlib.suppress(OSError), path.open("wb") as file:
        while space > 0:
            file.write(b"\1" * min(space, 1 << 16))
            file.flush()
            space -= 1 << 16


def test_a_full_disk_ends_with_one_error_and_the_run_goes_on_with_space(
    balls: Path, whole: tuple[Path, float], small_disk: Path
) -> None:
    for leave in (0, 1 << 17):
        run, filler = small_disk / f"run{leave}", small_disk / "filler"

        def say(text: str, leave: int = leave, filler: Path = filler) -> None:
            if text.startswith("Epoch 0"):
                return
            fill(filler, leave)

        with pytest.raises(LightMError, match=r"cannot be written|could not be written"):
            train_model(balls, run, epochs=3, **{**SMALL, "say": say})
        assert SafeCheckpointIO().load_checkpoint(run / "checkpoints" / "last.ckpt")["epoch"] <= 1
        filler.unlink()
        resume_training(run, say=lambda text: None)
        assert same(run, whole[0])
        shutil.rmtree(run)


def test_an_output_that_cannot_be_written_is_one_error(balls: Path, tmp_path: Path, small_disk: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LightMError, match=r"file.*cannot be written"):
        train_model(balls, tmp_path / "file" / "run", epochs=1, **SMALL)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(LightMError, match=r"cannot be written.*Read-only file system"):
        train_model(balls, small_disk / "run", epochs=1, **SMALL)
    assert not any(small_disk.iterdir())
