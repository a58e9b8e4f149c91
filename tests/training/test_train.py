"""Training on a small data set: the run folder, equal seeds, resuming, stopping, and bad input."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from lightm import open_dataset
from lightm.errors import InputError, LightMError
from lightm.inference.sliding import window_starts
from lightm.nets import load_model
from lightm.preparation.cache import PreprocessedCase
from lightm.preparation.plan import load_plan, make_plan
from lightm.preparation.preprocess import preprocess_dataset
from lightm.training import resume_training, train_model
from lightm.training.checkpoint_io import load_checkpoint, save_checkpoint
from lightm.training.config import Recipe, TrainConfig, load_config, parse_duration
from lightm.training.loaders import PatchLoaders
from lightm.training.loop import Training
from lightm.training.record import WholeCases
from lightm.training.run import _whole_cases, new_run
from tests.helpers import TINY, killed_at, make_balls
from tests.messages import on_message

SMALL: dict[str, Any] = {
    **TINY,
    "settings": {"steps_per_epoch": 3},
    "val_patches": 2,
}


@pytest.fixture(scope="module")
def balls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_balls(tmp_path_factory.mktemp("data") / "Dataset001_Balls")


def history(run: Path) -> list[dict[str, str]]:
    with (run / "history.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row.pop("epoch_seconds")
    return rows


def weights(run: Path, name: str = "last.ckpt") -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_checkpoint(run / "checkpoints" / name)["state_dict"]
    return state


def test_a_run_leaves_everything_a_reader_needs(balls: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said: list[str] = []
    with on_message(said.append):
        result = train_model(balls, run, epochs=2, seed=5, **SMALL)
    assert result.epochs == 2
    rows = history(run)
    assert [int(row["epoch"]) for row in rows] == [0, 1]
    assert [int(row["step"]) for row in rows] == [3, 6]
    assert all(np.isfinite(float(row[k])) for row in rows for k in ("train_loss", "val_loss", "pseudo_dice", "lr"))
    assert [row["pseudo_dice_smoothed"] for row in rows] == [row["pseudo_dice"] for row in rows]  # of so few epochs
    classes = [float(rows[0][f"pseudo_dice/{name}"]) for name in ("shell", "core")]
    assert float(rows[0]["pseudo_dice"]) == pytest.approx(np.mean(classes))
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "finished"
    assert record["seed"] == 5
    assert record["parameters"] == sum(p.numel() for p in load_model(run / "model")[0].parameters())
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert config["epochs"] == 2
    assert set(json.loads((run / "split.json").read_text(encoding="utf-8"))["test"]) == set(result.split.test)
    assert list((run / "tensorboard").glob("events.*"))
    assert said[0].startswith("Epoch 0: train_loss")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_curve_and_weights_and_another_seed_does_not(balls: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_model(balls, tmp_path / name, epochs=2, seed=seed, **SMALL)
    assert history(tmp_path / "a") == history(tmp_path / "b")
    assert history(tmp_path / "a") != history(tmp_path / "c")
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_a_killed_run_continues_and_ends_as_an_uninterrupted_one(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_model(balls, tmp_path / "whole", epochs=3, **SMALL)
    with killed_at(7):  # in the third epoch
        train_model(balls, tmp_path / "killed", epochs=3, **SMALL)
    assert len(history(tmp_path / "killed")) == 2
    assert json.loads((tmp_path / "killed" / "run.json").read_text(encoding="utf-8"))["status"] == "interrupted"
    result = resume_training(tmp_path / "killed")
    assert result.epochs == 3
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_ctrl_c_ends_with_one_message_and_the_run_can_go_on(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Training.loss_of

    def interrupted(self: Training, batch: dict[str, Any]) -> torch.Tensor:
        if self.state.step == 4:
            raise KeyboardInterrupt
        return step(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Training, "loss_of", interrupted)
        with pytest.raises(LightMError, match="--resume"):
            train_model(balls, tmp_path / "run", epochs=2, **SMALL)
    assert resume_training(tmp_path / "run").epochs == 2


@pytest.mark.slow
def test_a_finished_run_can_be_made_longer(balls: Path, tmp_path: Path) -> None:
    train_model(balls, tmp_path / "run", epochs=1, **SMALL)
    assert resume_training(tmp_path / "run", epochs=2).epochs == 2
    assert [row["epoch"] for row in history(tmp_path / "run")] == ["0", "1"]


@pytest.mark.slow
def test_a_time_budget_ends_the_training_and_lets_the_learning_rate_fall(balls: Path, tmp_path: Path) -> None:
    result = train_model(balls, tmp_path / "run", max_time="2s", **SMALL)
    assert "time budget" in result.reason
    assert result.train_seconds < 20
    assert float(history(tmp_path / "run")[-1]["lr"]) < 1e-3


@pytest.mark.parametrize(
    ("validation_s", "windows", "left"),
    [(float("nan"), [5], 90), (0.5, [5, 3], 100 - 0.5 * (1 + 4 * 8 / 16)), (2, [900], 90), (0.0, [5], 100)],
)
def test_the_end_of_a_time_budget_is_for_whole_validation_cases(
    validation_s: float, windows: list[int], left: float
) -> None:
    """At most a tenth of it: what the windows take with two sets of weights by the time of 16 patches, and again."""
    whole = WholeCases([str(index) for index in range(len(windows))], windows)
    config = TrainConfig(max_time=100, val_patches=16)
    training: Any = SimpleNamespace(config=config, whole=whole, _validation_s=validation_s)
    assert Training.time_s(training) == pytest.approx(left)
    training.whole = None
    assert Training.time_s(training) == 100
    training.config = TrainConfig()
    assert Training.time_s(training) is None


def test_windows_of_whole_cases_are_those_that_predict_them(balls: Path, tmp_path: Path) -> None:
    run = new_run(balls, tmp_path / "run", patch_size=[16, 24, 8], val_cases=2)
    rng = np.random.default_rng(0)
    for shape in rng.integers(5, 70, (20, 3)).tolist():
        padded = [max(size, part) for size, part in zip(shape, run.plan.patch_size, strict=True)]
        starts = [window_starts(n, part, 0.5) for n, part in zip(padded, run.plan.patch_size, strict=True)]
        case = PreprocessedCase("a", tmp_path, None, {"shape": shape})
        found = _whole_cases(run, [case], None)
        assert found is not None
        assert found.windows == [len(starts[0]) * len(starts[1]) * len(starts[2])]
        assert found.cost == found.windows[0] + 1
    none = dataclasses.replace(run, config=run.config.model_copy(update={"val_cases": 0}))
    assert _whole_cases(none, [case], None) is None


@pytest.mark.slow
def test_patience_ends_the_training(balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightm.training.loop.best_epoch", lambda values, kept: 0)  # none is better than the first
    result = train_model(balls, tmp_path / "run", epochs=9, patience=2, **SMALL)
    assert result.epochs == 3
    assert "2 epochs" in result.reason


def test_a_loss_that_is_not_finite_stops_and_names_the_cases(balls: Path, tmp_path: Path) -> None:
    with pytest.raises(LightMError, match=r"the loss is nan at step \d+, on the cases ball_"):
        train_model(balls, tmp_path / "run", epochs=3, lr=1e30, **SMALL)


def test_a_network_learns_the_balls_in_2d_and_the_best_weights_are_kept(tmp_path: Path) -> None:
    data = make_balls(tmp_path / "Dataset002_Discs", dims=2, size=32, classes=1, cases=8)
    options = {**SMALL, "settings": {"steps_per_epoch": 20, "lr": 1e-2, "warmup_steps": 0}, "val_patches": 4}
    result = train_model(data, tmp_path / "run", epochs=2, batch_size=4, **options)
    rows = history(tmp_path / "run")
    assert float(rows[-1]["pseudo_dice"]) > 0.9
    assert result.best_pseudo_dice == pytest.approx(max(float(row["pseudo_dice_smoothed"]) for row in rows))
    model, best = load_model(tmp_path / "run" / "model")[0].state_dict(), weights(tmp_path / "run", "best.ckpt")
    assert all(torch.equal(model[name], best[f"network.{name}"]) for name in model)


# ---- bad input ----------------------------------------------------------------------------------------------


def refuse(balls: Path, run: Path, match: str, **options: Any) -> None:
    with pytest.raises(InputError, match=match):
        train_model(balls, run, **{**SMALL, "epochs": 1, **options})
    assert not run.exists(), "bad input must leave nothing behind"


def test_wrong_options_are_refused_before_anything_is_written(balls: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    refuse(balls, run, "unknown network 'lightn'", network="lightn", network_options={})
    refuse(balls, run, "unknown recipe 'arls'; did you mean 'arsl'", recipe="arls")
    refuse(balls, run, "unknown loss 'dise'; did you mean 'dice'", loss="ce+dise")
    refuse(balls, run, "unknown key 'settings.epoch'; did you mean 'epochs'", settings={"epoch": 3})
    refuse(balls, run, "patch size", patch_size=[0, 16, 16])
    refuse(balls, run, r"patch size 4096,.* needs at least [0-9.e+]+ GB of memory", patch_size=[4096, 4096, 4096])
    refuse(balls, run, "batch_size", batch_size=0)
    refuse(balls, run, "device 'cuda:99'", device="cuda:99")
    refuse(tmp_path / "nowhere", run, "precision '8-bit'", precision="8-bit")  # before the data are looked at
    refuse(balls, run, "lr", lr=-1.0)
    refuse(balls, run, "duration", max_time="soon")
    refuse(tmp_path / "nowhere", run, "nowhere")


def _rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray], affine: np.ndarray | None = None) -> None:
    """Write a changed copy past `write_volume`, which would refuse some of these."""
    old = nib.load(path)
    nib.save(nib.Nifti1Image(change(old.get_fdata(dtype=np.float32)), old.affine if affine is None else affine), path)


def _nan(array: np.ndarray) -> np.ndarray:
    array[0, 0, 0] = np.nan
    return array


def _infinite(array: np.ndarray) -> np.ndarray:
    array[1, 1, 1] = np.inf
    return array


def _labels(data: Path, **labels: int) -> None:
    description = json.loads((data / "dataset.json").read_text(encoding="utf-8"))
    (data / "dataset.json").write_text(json.dumps({**description, "labels": labels}), encoding="utf-8")


IMAGE, LABEL = "imagesTr/ball_01_0000.nii.gz", "labelsTr/ball_01.nii.gz"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "label without its image": (lambda data: (data / IMAGE).unlink(), "ball_01"),
    "image without its label": (lambda data: (data / LABEL).unlink(), "ball_01"),
    "shapes that disagree": (lambda data: _rewrite(data / LABEL, lambda a: a[:-1]), "ball_01.*shape"),
    "affines that disagree": (lambda data: _rewrite(data / LABEL, lambda a: a, np.diag([3.0, 1, 1, 1])), "ball_01"),
    "value not in dataset.json": (lambda data: _labels(data, background=0, shell=1), r"ball_\d\d.*2"),
    "NaN": (lambda data: _rewrite(data / IMAGE, _nan), "ball_01_0000.*NaN"),
    "infinite": (lambda data: _rewrite(data / IMAGE, _infinite), "ball_01_0000.*inf"),
    "truncated": (lambda data: (data / IMAGE).write_bytes((data / IMAGE).read_bytes()[:300]), "ball_01_0000"),
    "no image at all": (lambda data: (data / IMAGE).write_bytes(b"hello" * 99), "ball_01_0000"),
    "empty folder": (lambda data: [path.unlink() for path in data.rglob("*.*")], "data"),
    "broken dataset.json": (lambda data: (data / "dataset.json").write_text("{", encoding="utf-8"), "dataset.json"),
    "unknown key in plan.yaml": (
        lambda data: (make_plan(open_dataset(data)).save(data / "plan.yaml"), _append(data / "plan.yaml", "ptch: 3\n")),
        r"plan\.yaml.*ptch",
    ),
}


def _append(path: Path, text: str) -> None:
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_data_is_refused_with_the_file_named(fault: str, tmp_path: Path) -> None:
    data = make_balls(tmp_path / "data", cases=3)
    spoil, words = FAULTS[fault]
    spoil(data)
    refuse(data, tmp_path / "run", f"(?s){words}")


def test_too_few_cases_are_refused(tmp_path: Path) -> None:
    for cases in (1, 2):
        data = make_balls(tmp_path / f"data{cases}", cases=cases)
        refuse(data, tmp_path / "run", f"{cases} case")


def test_a_used_folder_is_refused_and_left_as_it_is(balls: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_model(balls, run, epochs=1, **SMALL)
    before = sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*"))
    with pytest.raises(InputError, match="already holds a run"):
        train_model(balls, run, epochs=1, **SMALL)
    assert sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*")) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="not empty"):
        train_model(balls, other, epochs=1, **SMALL)
    with pytest.raises(InputError, match="no run to resume"):
        resume_training(other)


def test_a_yaml_of_options_is_checked_and_read_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for text, words in {
        "network: lightm-unet\nlearning_rate: 1\nepoch: 3\n": r"mine\.yaml: unknown key 'learning_rate'",
        "- a\n- b\n": "mine.*keys and values",
        "lr: 1\nlr: 2\n": "mine.*'lr' is given twice",
        "settings: {epoch: 3}\n": "mine.*unknown key 'settings.epoch'; did you mean 'epochs'",
        "lr: fast\n": "mine.*lr",
    }.items():
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=words):
            TrainConfig.of(path, {}, "train")
    path.write_text("seed: 3\nlr: 1e-3\npatch_size: [16, 24]\n", encoding="utf-8")
    config = TrainConfig.of(path, {"seed": 4, "epochs": None}, "train")
    assert (config.seed, config.lr, config.patch_size, config.epochs_given) == (4, 1e-3, [16, 24], False)
    path.write_text("seed: 3\nsettings:\n  lr: 1e-3\n", encoding="utf-8")
    assert TrainConfig.of(path, {}, "train").lr == 1e-3


def test_a_configuration_of_an_earlier_version_means_what_it_meant(tmp_path: Path) -> None:
    new = TrainConfig(dataset="data", recipe="arsl", max_time="15m", lr=0.5).resolved(3)
    settings = {name: value for name, value in new.model_dump(mode="json").items() if name in Recipe.model_fields}
    old = {"dataset": "data", "recipe": "seed", "settings": settings, "max_time_s": 900.0, "epochs_given": False}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(old), encoding="utf-8")
    loaded = load_config(path)
    assert loaded.model_dump() == new.model_dump()
    assert (loaded.recipe, loaded.max_time_s, loaded.epochs_given) == ("arsl", 900.0, False)
    loaded.save(path)
    again = load_config(path)
    assert (again.model_dump(), again.epochs_given) == (new.model_dump(), False)
    path.write_text(yaml.safe_dump({**old, "epochs_given": True}), encoding="utf-8")
    assert load_config(path).epochs_given


@pytest.mark.slow
def test_a_run_of_an_earlier_version_is_resumed(balls: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_model(balls, run, epochs=1, **SMALL)
    now = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    for key in ("plan", "postprocess", "test", "patch_size", "batch_size"):
        now.pop(key)
    settings = {key: now.pop(key) for key in list(now) if key in Recipe.model_fields}
    old = {**now, "settings": settings, "max_time_s": now.pop("max_time"), "epochs_given": True}
    old.pop("max_time")
    (run / "config.yaml").write_text(yaml.safe_dump(old), encoding="utf-8")
    last = load_checkpoint(run / "checkpoints" / "last.ckpt")
    (dice,) = last["lightm"].pop("dice")
    del last["lightm"]["best_epoch"], last["lightm"]["watched"]
    last["lightm"].update(ema_dice=dice, best_dice=dice, waited=0)
    save_checkpoint(last, run / "checkpoints" / "last.ckpt")
    rows = (run / "history.csv").read_text(encoding="utf-8")
    (run / "history.csv").write_text(rows.replace("pseudo_dice_smoothed", "pseudo_dice_ema"), encoding="utf-8")
    assert resume_training(run, epochs=2).epochs == 2
    first, second = history(run)
    assert float(first["pseudo_dice_smoothed"]) == dice
    assert second["pseudo_dice_smoothed"] == second["pseudo_dice"]


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("15m", 900), ("1h30m", 5400), (12, 12), ("7", 7)])
def test_durations(text: str | int, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-5m", "0", "5 apples"])
def test_wrong_durations(text: str) -> None:
    with pytest.raises(InputError, match="duration"):
        parse_duration(text)


@pytest.mark.parametrize(("network", "patch"), [("unet", [16, 16, 32]), ("lightm-small", [16, 16, 24])])
def test_a_patch_is_rounded_up_to_what_the_network_takes(
    balls: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, network: str, patch: list[int]
) -> None:
    options = {**SMALL, "epochs": 1, "steps_per_epoch": 1, "network": network, "network_options": {}}
    result = train_model(balls, tmp_path / "run", **{**options, "patch_size": [16, 16, 20]})
    assert result.plan.patch_size == patch
    assert load_plan(tmp_path / "run" / "plan.yaml").patch_size == patch
    assert "rounded up to" in caplog.text


def test_validation_patches_are_the_same_in_every_epoch(balls: Path, tmp_path: Path) -> None:
    run = new_run(balls, tmp_path / "run", **SMALL)
    cases = {case.id: case for case in preprocess_dataset(run.data, run.plan, tmp_path / "cache")}
    patches = PatchLoaders(run, [cases[i] for i in run.split.train], [cases[i] for i in run.split.val])
    first = [batch["image"] for batch in patches.validation()]
    assert len(list(patches.training(3, 0))) == 3
    assert all(torch.equal(a, b["image"]) for a, b in zip(first, patches.validation(), strict=True))
