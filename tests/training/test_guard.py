"""What watches over a training: random states, checkpoints, NaN, signals, workers and the lock of the folder."""

from __future__ import annotations

import functools
import json
import os
import platform
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightm.errors import InputError, LightMError
from lightm.files import LOCK, _start, locked_folder
from lightm.preparation.patches import PatchDataset
from lightm.training import resume_training, train_model
from lightm.training.checkpoint_io import (
    load_checkpoint,
    newest_checkpoint,
    random_states,
    save_checkpoint,
    save_rotating,
    set_random_states,
)
from lightm.training.guard import Interrupted, NanGuard, gradients_are_finite
from lightm.training.loop import Training
from tests.helpers import make_balls
from tests.messages import on_message
from tests.training.test_train import SMALL, history, weights

STEPS = 9  # three epochs of three steps
forks = pytest.mark.skipif(
    sys.platform in ("win32", "darwin"), reason="workers are spawned there: patches do not reach"
)


@pytest.fixture(scope="module")
def balls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_balls(tmp_path_factory.mktemp("data") / "Dataset001_Balls")


original = Training.loss_of


def noisy(self: Training, batch: dict[str, Any]) -> torch.Tensor:
    """A step that draws from every global generator, as dropout does from PyTorch's."""
    loss = original(self, batch)
    return loss * (0.5 + torch.rand(()) + float(np.random.rand()) + random.random())  # noqa: NPY002


@pytest.fixture(scope="module")
def whole(balls: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with noisy steps."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LIGHTM_CACHE", str(run.parent / "cache"))
        patched.setattr(Training, "loss_of", noisy)
        train_model(balls, run, epochs=3, **SMALL)
    return run


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return history(one) == history(other) and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def act_before(step: int, act: Callable[[], object]) -> Callable[..., torch.Tensor]:
    def loss_of(self: Training, batch: dict[str, Any]) -> torch.Tensor:
        if self.state.step == step:
            act()
        return noisy(self, batch)

    return loss_of


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_stopped_at_random_steps_equals_an_uninterrupted_one_bit_for_bit(
    seed: int, balls: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, run = random.Random(seed), tmp_path / "run"
    stops = sorted(rng.sample(range(STEPS), 3))
    for count, stop in enumerate(stops):
        signum = rng.choice([signal.SIGTERM, signal.SIGINT])
        monkeypatch.setattr(Training, "loss_of", act_before(stop, functools.partial(os.kill, os.getpid(), signum)))
        begin = functools.partial(train_model, balls, run, epochs=3, **SMALL)
        go_on = functools.partial(resume_training, run)
        with pytest.raises(Interrupted, match=r"after step \d+; resume it with `lightm train --resume") as caught:
            go_on() if count else begin()
        assert caught.value.exit_code == 128 + signum
        last = load_checkpoint(run / "checkpoints" / "last.ckpt")
        assert last["global_step"] == stop + 1, "the step at work when the signal came is kept"
        assert not (run / LOCK).exists()
    monkeypatch.setattr(Training, "loss_of", noisy)
    resume_training(run)
    assert same(run, whole)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
@forks
def test_workers_do_not_change_a_run_and_it_can_be_stopped_with_them(
    balls: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = act_before(4, functools.partial(os.kill, os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(Training, "loss_of", stop)
    with pytest.raises(Interrupted):
        train_model(balls, tmp_path / "run", epochs=3, workers=2, **SMALL)
    monkeypatch.setattr(Training, "loss_of", noisy)
    resume_training(tmp_path / "run")
    assert same(tmp_path / "run", whole)


class _Killed(BaseException):
    pass


def _die() -> None:
    raise _Killed


@pytest.mark.slow
def test_long_epochs_are_kept_within_them(
    balls: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Training, "checkpoint_every_s", 0.0)
    monkeypatch.setattr(Training, "loss_of", act_before(5, _die))
    with pytest.raises(_Killed):
        train_model(balls, tmp_path / "run", epochs=3, **SMALL)
    last = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert last["global_step"] == 5
    monkeypatch.setattr(Training, "loss_of", noisy)
    resume_training(tmp_path / "run")
    assert same(tmp_path / "run", whole)


def test_random_states_come_back() -> None:
    torch.randn(3), np.random.rand(3), random.gauss(0, 1)  # noqa: NPY002
    states = random_states()
    first = [torch.rand(2).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1), random.random()]  # noqa: NPY002
    set_random_states(states)
    again = [torch.rand(2).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1), random.random()]  # noqa: NPY002
    assert first == again


# ---- damaged checkpoints ------------------------------------------------------------------------------------


def spoil(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    elif how == "flipped":
        content[-5] ^= 0x10
    path.unlink()
    if how != "gone":
        path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
def test_a_damaged_checkpoint_is_left_for_the_one_before_it(
    how: str, balls: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Training, "loss_of", act_before(7, _die))
    with pytest.raises(_Killed):
        train_model(balls, tmp_path / "run", epochs=3, **SMALL)
    spoil(tmp_path / "run" / "checkpoints" / "last.ckpt", how)
    monkeypatch.setattr(Training, "loss_of", noisy)
    said: list[str] = []
    with on_message(said.append):
        resume_training(tmp_path / "run")
    assert "previous.ckpt" in said[0]
    assert "last.ckpt" in said[0]
    assert said[1].startswith("Epoch 1:")
    assert same(tmp_path / "run", whole)


def test_the_last_two_checkpoints_are_kept_and_without_a_whole_one_the_end_is_clear(tmp_path: Path) -> None:
    for epoch in range(4):
        save_rotating(tmp_path, lambda path, epoch=epoch: save_checkpoint({"epoch": epoch}, path))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["last.ckpt", "previous.ckpt"]
    assert [load_checkpoint(tmp_path / name)["epoch"] for name in names] == [3, 2]
    for name in names:
        spoil(tmp_path / name, "cut")
    with pytest.raises(InputError, match=r"last\.ckpt.*previous\.ckpt.*start a new run"):
        newest_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path / "nothing") is None


# ---- NaN and infinite values --------------------------------------------------------------------------------


def poisoned(steps: set[int], what: str) -> Callable[..., torch.Tensor | None]:
    def loss_of(self: Training, batch: dict[str, Any]) -> torch.Tensor:
        if self.state.step in steps and what == "loss":
            batch = {**batch, "image": batch["image"] * float("nan")}
        loss = original(self, batch)
        if self.state.step in steps and what == "gradient":
            zero = next(self.network.parameters()).sum() * 0
            loss = loss + zero.sqrt()  # 0, with an infinite slope
        return loss

    return loss_of


@pytest.mark.slow
@pytest.mark.parametrize(("what", "words"), [("loss", "the loss is nan"), ("gradient", "a gradient is NaN or inf")])
def test_values_that_are_not_finite_stop_or_are_skipped_and_counted(
    what: str, words: str, balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Training, "loss_of", poisoned({4, 5}, what))
    with pytest.raises(LightMError, match=rf"{words}.* at step 4, on the cases ball_\d\d"):
        train_model(balls, tmp_path / "stopped", epochs=2, **SMALL)
    with pytest.raises(LightMError, match=r"at step 5.*after 1 steps were skipped, which is the limit"):
        train_model(balls, tmp_path / "limit", epochs=2, on_nan="skip", nan_limit=1, **SMALL)
    said: list[str] = []
    run = tmp_path / "skipped"
    with on_message(said.append):
        result = train_model(balls, run, epochs=2, on_nan="skip", **SMALL)
    assert result.skipped_steps == 2
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["skipped_steps"] == 2
    assert [text.endswith(f"skipped ({n} of at most 10)") for n, text in enumerate(said[1:3], 1)] == [True, True]
    assert all(bool(torch.isfinite(w).all()) for w in weights(run).values())
    # skipped steps change nothing: the weights are those after step 3
    monkeypatch.setattr(Training, "loss_of", act_before(4, _die))
    monkeypatch.setattr(Training, "checkpoint_every_s", 0.0)
    monkeypatch.setattr("tests.training.test_guard.noisy", original)
    with pytest.raises(_Killed):
        train_model(balls, tmp_path / "short", epochs=2, **SMALL)
    kept, short = weights(run), weights(tmp_path / "short")
    assert all(torch.equal(kept[name], short[name]) for name in kept)


def test_the_command_line_says_what_to_do_at_nan(balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from lightm.cli import app

    (tmp_path / "small.yaml").write_text(
        "network: lightm-unet-small\nnetwork_options: {base_channels: 8, bottleneck_layers: 1}\nval_patches: 2\n"
        "settings: {steps_per_epoch: 3}\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(Training, "loss_of", poisoned({1, 2}, "loss"))

    def train(run: str, *more: str) -> BaseException | None:
        command = ["train", str(balls), "-o", str(tmp_path / run), "--config", str(tmp_path / "small.yaml")]
        return CliRunner().invoke(app, [*command, "--epochs", "1", "--no-test", *more]).exception

    assert train("skipped", "--on-nan", "skip", "--nan-limit", "3") is None
    assert json.loads((tmp_path / "skipped" / "run.json").read_text(encoding="utf-8"))["skipped_steps"] == 2
    stopped = train("limit", "--on-nan", "skip", "--nan-limit", "1")
    assert isinstance(stopped, LightMError)
    assert "after 1 steps were skipped, which is the limit" in str(stopped)
    assert "at step 1" in str(train("stopped"))
    wrong = train("wrong", "--on-nan", "pray")
    assert isinstance(wrong, InputError)
    assert "on_nan" in str(wrong)
    assert not (tmp_path / "wrong").exists()


def test_spoilt_running_statistics_cannot_be_skipped() -> None:
    network = torch.nn.BatchNorm2d(1)
    guard = NanGuard("skip", 3)
    guard.handle("the loss is nan", 0, ["a"], network)
    network(torch.full((1, 1, 4, 4), float("inf")))
    with pytest.raises(LightMError, match="'running_mean' too"):
        guard.handle("the loss is nan", 1, ["a"], network)


def test_gradients_that_are_not_finite_are_found() -> None:
    network = torch.nn.Linear(3, 2)
    assert gradients_are_finite(network)
    for bad in (float("nan"), float("inf"), -float("inf")):
        network.weight.grad, network.bias.grad = torch.ones(2, 3), torch.ones(2)
        assert gradients_are_finite(network)
        network.weight.grad[1, 2] = bad
        assert not gradients_are_finite(network)


# ---- workers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=forks)])
def test_a_fault_in_a_patch_names_its_case(
    workers: int, balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = PatchDataset.__getitem__

    def faulty(self: PatchDataset, index: int) -> dict[str, Any]:
        if index == 5:
            raise OSError("the disk is gone")
        return item(self, index)

    monkeypatch.setattr(PatchDataset, "__getitem__", faulty)
    with pytest.raises(LightMError, match=r"^case ball_\d\d: its patch 5 .*OSError: the disk is gone") as caught:
        train_model(balls, tmp_path / "run", epochs=2, workers=workers, **SMALL)
    assert "Traceback" not in str(caught.value)


@forks
def test_a_worker_that_is_killed_names_its_case(balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    item, main = PatchDataset.__getitem__, os.getpid()

    def killed(self: PatchDataset, index: int) -> dict[str, Any]:
        if index == 5 and os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)
        return item(self, index)

    monkeypatch.setattr(PatchDataset, "__getitem__", killed)
    with pytest.raises(LightMError, match=r"died while it prepared a patch of case ball_\d\d .*--resume"):
        train_model(balls, tmp_path / "run", epochs=2, workers=1, **SMALL)


# ---- one process a folder -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(balls: Path, tmp_path: Path) -> None:
    run, refused = tmp_path / "run", []

    def try_again(text: str) -> None:
        for second in (lambda: resume_training(run), lambda: train_model(balls, run, **SMALL)):
            with pytest.raises(InputError, match=r"in use: training by process|already holds a run") as caught:
                second()
            refused.append(str(caught.value))

    with on_message(try_again):
        train_model(balls, run, epochs=1, **SMALL)
    assert f"process {os.getpid()} on {platform.node()}" in refused[0]
    assert not (run / LOCK).exists()
    resume_training(run, epochs=2)


def lock(**changes: object) -> str:
    start = _start(os.getpid())
    whole = {"pid": os.getpid(), "host": platform.node(), "start": start, "work": "training", "since": "now"}
    return json.dumps({**whole, **changes})


def test_locks_of_the_dead_are_taken_over_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    gone = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-c", ""])
    os.waitpid(gone, 0)
    stale = {"dead": lock(pid=gone), "torn": "{", "empty": ""}
    if _start(os.getpid()):
        stale["later process of the same id"] = lock(start="another boot 1")
    for text in stale.values():
        path.write_text(text, encoding="utf-8")
        os.utime(path, (time.time() - 60, time.time() - 60))
        with locked_folder(tmp_path, "prediction"):
            assert json.loads(path.read_text(encoding="utf-8"))["work"] == "prediction"
        assert not path.exists()
    for text in (lock(), lock(host="elsewhere", pid=gone), ""):  # the last one is about to be written
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match="in use"), locked_folder(tmp_path, "prediction"):
            pass
        assert path.read_text(encoding="utf-8") == text


def test_of_many_that_want_a_folder_one_at_a_time_gets_it(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    inside: list[int] = []

    def work(number: int) -> bool:
        try:
            with locked_folder(tmp_path, "test"):
                inside.append(number)
                time.sleep(0.002)
                assert inside == [number]
                inside.remove(number)
                return True
        except InputError:
            return False

    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(work, range(64)))
    assert any(got)
    assert not any(tmp_path.iterdir())


def test_a_run_killed_in_its_first_moments_can_be_started_again(balls: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "plan.yaml").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="not empty"):
        train_model(balls, run, epochs=1, **SMALL)
    (run / LOCK).write_text(lock(start="another boot", pid=2**22 + 1), encoding="utf-8")
    (run / f".split.json.{'0' * 12}.tmp").write_text("{", encoding="utf-8")
    train_model(balls, run, epochs=1, **SMALL)
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
