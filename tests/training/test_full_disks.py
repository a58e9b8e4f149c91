"""Full disks, folders that cannot be written or are in use: one error, nothing torn, a rerun completes."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lightm.cli import app
from lightm.errors import InputError, LightMError
from lightm.files import LOCK, locked_folder
from lightm.inference import predict_folder
from lightm.training import resume_training, train_model
from lightm.training.checkpoint_io import load_checkpoint
from tests.helpers import make_balls
from tests.messages import on_message
from tests.training.faults import OPTIONS, Server, compare_cases, leftovers, posix
from tests.training.test_guard import same
from tests.training.test_train import SMALL

pytestmark = pytest.mark.slow


@pytest.mark.slow
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

    def fill_up(text: str) -> None:
        if text.startswith("Epoch 0" if victim == "history.csv" else "Epoch 1"):
            full[0] = True

    with on_message(fill_up), pytest.raises(LightMError, match=rf"{victim}.*No space left on device.*free space"):
        train_model(balls, run, epochs=3, **SMALL)
    last = load_checkpoint(run / "checkpoints" / "last.ckpt")
    assert last["epoch"] == {"run.json": 2}.get(victim, 0)
    assert not leftovers(run)
    if victim == "last.ckpt":
        monkeypatch.undo()
        monkeypatch.setenv("LIGHTM_CACHE", str(tmp_path / "cache"))
        resume_training(run)
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


@pytest.mark.slow
def test_a_full_disk_ends_with_one_error_and_the_run_goes_on_with_space(
    balls: Path, whole: tuple[Path, float], small_disk: Path
) -> None:
    for leave in (0, 1 << 17):
        run, filler = small_disk / f"run{leave}", small_disk / "filler"

        def fill_up(text: str, leave: int = leave, filler: Path = filler) -> None:
            if text.startswith("Epoch 0"):
                return
            fill(filler, leave)

        with on_message(fill_up), pytest.raises(LightMError, match=r"cannot be written|could not be written"):
            train_model(balls, run, epochs=3, **SMALL)
        assert load_checkpoint(run / "checkpoints" / "last.ckpt")["epoch"] <= 1
        filler.unlink()
        resume_training(run)
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


@posix
@pytest.mark.parametrize("limit", [0, 60_000])
def test_a_training_whose_files_cannot_grow_is_one_error_and_goes_on_without_the_limit(
    limit: int, server: Server, balls: Path, whole: tuple[Path, float], tmp_path: Path
) -> None:
    """Needs no right to mount: refused is the lock, and then what is larger than the small files."""
    run = tmp_path / "run"
    order = {"do": "train", "data": str(balls), "run": str(run), "epochs": 3, **OPTIONS}
    assert server.status(limit=limit, **order) == LightMError.exit_code
    for path in (run / "checkpoints").glob("*.ckpt"):
        load_checkpoint(path)
    assert not (run / "model").exists()
    assert not leftovers(tmp_path)
    server.finish(**order)
    assert same(run, whole[0])


@posix
def test_a_prediction_on_a_full_disk_is_one_error_and_a_rerun_completes_it(
    server: Server, balls: Path, whole: tuple[Path, float], tmp_path: Path
) -> None:
    order = {"do": "predict", "model": str(whole[0] / "model"), "images": str(balls / "imagesTr")}
    server.finish(out=str(tmp_path / "whole"), **order)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.nii.gz")}
    sizes = sorted(map(len, expected.values()))
    out = tmp_path / "out"
    for limit in (0, sizes[0] // 2, sizes[0] + 1):  # the last: the smallest label maps fit
        assert server.status(out=str(out), limit=limit, **order) == LightMError.exit_code
        for path in out.glob("*.nii.gz"):
            assert path.read_bytes() == expected[path.name], "whole or not there"
        assert not leftovers(out)
    server.finish(out=str(out), **order)
    assert {name: (out / name).read_bytes() for name in expected} == expected


@posix
def test_a_preprocessing_on_a_full_disk_is_one_error_and_a_rerun_completes_it(server: Server, tmp_path: Path) -> None:
    data = make_balls(tmp_path / "Dataset003_Balls", size=24, cases=4)
    order = {"do": "preprocess", "data": str(data)}
    server.finish(cache=str(tmp_path / "whole"), **order)
    expected = {path.name: path for path in (tmp_path / "whole" / data.name).iterdir() if path.is_dir()}
    largest = max(path.stat().st_size for path in (tmp_path / "whole").rglob("image.npy"))
    for limit in (0, 1_000, largest - 1):
        assert server.status(cache=str(tmp_path / "cache"), limit=limit, **order) == LightMError.exit_code
        compare_cases(tmp_path / "cache" / data.name, expected)
    server.finish(cache=str(tmp_path / "cache"), **order)
    assert compare_cases(tmp_path / "cache" / data.name, expected) == 4


def test_a_prediction_into_a_place_that_cannot_be_written_is_one_error(
    balls: Path, whole: tuple[Path, float], tmp_path: Path, small_disk: Path
) -> None:
    model, images = whole[0] / "model", balls / "imagesTr"
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file: a file; give a folder"):
        predict_folder(model, images, tmp_path / "file")
    with pytest.raises(LightMError, match=r"file.*cannot be written"):
        predict_folder(model, images, tmp_path / "file" / "out")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(LightMError, match=r"cannot be written.*Read-only file system"):
        predict_folder(model, images, small_disk / "out")
    assert not any(small_disk.iterdir())


# ---- two at once --------------------------------------------------------------------------------------------


@posix
def test_two_predictions_into_one_folder_the_second_is_refused(
    server: Server, balls: Path, whole: tuple[Path, float], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["predict", "-m", str(whole[0]), "-i", str(balls / "imagesTr"), "-o", str(out), "--overwrite"]
    with locked_folder(out, "prediction"):
        refused = CliRunner().invoke(app, command)
        assert isinstance(refused.exception, InputError)
        assert f"in use: prediction by process {os.getpid()} " in " ".join(str(refused.exception).split())
        assert [path.name for path in out.iterdir()] == [LOCK], "nothing is written or removed"
    order = {"do": "predict", "model": str(whole[0] / "model"), "images": str(balls / "imagesTr"), "out": str(out)}
    assert server.kill(0.05, **order), "a killed prediction leaves its lock, which the next one takes over"
    server.finish(**order)
    assert len(list(out.glob("*.nii.gz"))) == 6
    assert not leftovers(out)


@posix
def test_two_trainings_of_different_processes_in_one_folder_the_second_is_refused(
    server: Server, balls: Path, whole: tuple[Path, float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    order = {"do": "train", "data": str(balls), "run": str(run), "epochs": 3, **OPTIONS}
    first = server.ask(**order)
    deadline = time.monotonic() + 60
    while not (run / LOCK).exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(first, signal.SIGSTOP)  # so that it certainly lives while the second one asks
    try:
        with pytest.raises(InputError, match=rf"in use: training by process {first} |already holds a run"):
            train_model(balls, run, epochs=3, **SMALL)
    finally:
        os.kill(first, signal.SIGCONT)
    assert server.ask(wait=first) == 0
    assert same(run, whole[0]), "the first one is not disturbed"
