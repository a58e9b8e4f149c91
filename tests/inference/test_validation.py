"""Whole validation cases: they keep the better weights and choose post-processing, within the time budget."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lightm
from lightm.inference import validation
from lightm.inference.predictor import Predictor
from lightm.inference.validation import choose_on_whole_cases
from lightm.nets import load_model
from lightm.training import TrainResult, train_model
from lightm.training.loop import Training
from tests.helpers import killed_at, make_balls
from tests.messages import on_message
from tests.training.test_train import history

OPTIONS: dict[str, Any] = {
    "network": "lightm-unet-small",
    "network_options": {"base_channels": 8, "bottleneck_layers": 0},
    "steps_per_epoch": 4,
    "val_patches": 2,
    "batch_size": 2,
}
NAMES = [f"ball_{index:02}" for index in range(12)]
SPLIT = lightm.Split(kind="by hand", seed=0, train=NAMES[:6], val=NAMES[6:11], test=NAMES[11:])


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_balls(tmp_path_factory.mktemp("data") / "Dataset001_Discs", dims=2, size=32, classes=1, cases=12)


@pytest.fixture
def trained(discs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainResult:
    """Three epochs, of which the pseudo Dice names the first the best."""
    values = iter([0.9, 0.5, 0.6])
    validate = Training.validate

    def misled(self: Training) -> dict[str, float]:
        return {**validate(self), "pseudo_dice": next(values)}

    monkeypatch.setattr(Training, "validate", misled)
    return train_model(discs, tmp_path / "run", epochs=3, split=SPLIT, **OPTIONS)


def described(trained: TrainResult) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((trained.run_dir / "model" / "model.json").read_text(encoding="utf-8"))
    return content


def checkpoint(trained: TrainResult, name: str) -> dict[str, torch.Tensor]:
    return validation._network_part(validation.load_checkpoint(trained.run_dir / "checkpoints" / name))


def holds(trained: TrainResult, name: str) -> bool:
    model, state = load_model(trained.run_dir / "model")[0].state_dict(), checkpoint(trained, name)
    return all(torch.equal(model[key], state[key]) for key in model)


def favour(name: str, trained: TrainResult, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make the named weights predict every label perfectly and others nothing; returns what was predicted with."""
    key, wanted = next(iter(checkpoint(trained, name).items()))
    calls = []

    def predict(self: Predictor, images: list[Any], **_: Any) -> Any:
        right = torch.equal(self.network.state_dict()[key], wanted)
        calls.append(name if right else "other")
        return images[0].with_data((images[0].data > 0.5 * images[0].data.max()).astype(np.uint8) * right)

    monkeypatch.setattr(Predictor, "predict_volumes", predict)
    return calls


def test_the_last_weights_are_kept_where_whole_cases_score_higher(
    trained: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert described(trained)["training"]["best_epoch"] == 0
    assert holds(trained, "best.ckpt")
    calls = favour("last.ckpt", trained, monkeypatch)
    lines: list[str] = []
    with on_message(lines.append, "inference"):
        predictor = choose_on_whole_cases(trained)
    count = len(trained.split.val)
    assert len(calls) == 2 * count, "each case once with each of the two"
    assert holds(trained, "last.ckpt")
    whole = described(trained)["training"]["whole_cases"]
    assert (whole["kept"], whole["epochs"], whole["cases"]) == ("last", {"best": 0, "last": 2}, count)
    assert whole["dsc"]["last"]["ball"] > whole["dsc"]["best"]["ball"] == 0
    assert any("with the last weights (epoch 2); kept" in line for line in lines)
    card = (trained.run_dir / "model" / "card.md").read_text(encoding="utf-8")
    assert f"- mean DSC of 5 validation case(s): ball {whole['dsc']['last']['ball']:.3f} (weights of epoch 2)" in card
    key, wanted = next(iter(checkpoint(trained, "last.ckpt").items()))
    assert torch.equal(predictor.network.state_dict()[key].cpu(), wanted)


def test_the_best_weights_stay_where_they_are_better_or_as_good(
    trained: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    favour("best.ckpt", trained, monkeypatch)
    choose_on_whole_cases(trained)
    assert holds(trained, "best.ckpt")
    monkeypatch.setattr(
        Predictor, "predict_volumes", lambda self, images, **_: images[0].with_data(images[0].data > 9e9)
    )
    choose_on_whole_cases(trained)
    assert holds(trained, "best.ckpt")
    assert described(trained)["training"]["whole_cases"]["kept"] == "best"


def test_post_processing_takes_the_same_predictions_and_its_reasons_are_kept(trained: TrainResult) -> None:
    lines: list[str] = []
    with on_message(lines.append, "inference"):
        choose_on_whole_cases(trained)
    record = described(trained)["postprocess"]
    assert record["cases"] == len(trained.split.val) < 10
    assert record["why"] == f"{record['cases']} validation cases predicted, fewer than 10"
    assert lines[-1] == f"post-processing: none ({record['why']})"
    whole = described(trained)["training"]["whole_cases"]
    assert list(record["dsc_before"].values()) == pytest.approx([whole["dsc"][whole["kept"]]["ball"]])
    off = dataclasses.replace(trained, config=trained.config.model_copy(update={"postprocess": False}))
    choose_on_whole_cases(off)
    assert "postprocess" not in described(trained)


def test_without_time_left_the_best_weights_by_pseudo_dice_stay(trained: TrainResult) -> None:
    late = dataclasses.replace(trained, config=trained.config.model_copy(update={"max_time": 1.0}), train_seconds=2.0)
    lines: list[str] = []
    with on_message(lines.append, "inference"):
        choose_on_whole_cases(late)
    assert holds(trained, "best.ckpt")
    assert described(trained)["training"]["whole_cases"]["cases"] == 0
    assert described(trained)["postprocess"]["steps"] == []
    assert lines[0] == f"0 of {len(trained.split.val)} whole validation cases were predicted within the time budget"


def test_the_time_ends_within_a_case(trained: TrainResult, monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter(range(7))

    def clock(_: float | None) -> Callable[[], None]:
        def check_time() -> None:
            if next(left, None) is None:
                raise validation.TimeIsUp

        return check_time

    monkeypatch.setattr(validation, "_clock", clock)
    choose_on_whole_cases(trained)
    whole = described(trained)["training"]["whole_cases"]
    assert whole["cases"] == 2, (
        "three looks at the clock a case: before it, and after its window with each of the weights"
    )
    assert whole["kept"] == "best", "two cases are too few to choose"
    assert holds(trained, "best.ckpt")


def test_weights_that_are_not_finite_are_no_candidate(trained: TrainResult, monkeypatch: pytest.MonkeyPatch) -> None:
    load = validation.load_checkpoint

    def spoilt(path: Path) -> dict[str, Any]:
        content = load(path)
        content["state_dict"] = {key: tensor * np.nan for key, tensor in content["state_dict"].items()}
        return content

    monkeypatch.setattr(validation, "load_checkpoint", spoilt)
    choose_on_whole_cases(trained)
    assert list(described(trained)["training"]["whole_cases"]["dsc"]) == ["best"]


class Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1].new_full((x.shape[0], 2, *x.shape[2:]), torch.nan)


def test_a_network_whose_cases_cannot_be_predicted_yet_has_no_score(trained: TrainResult) -> None:
    score = validation.scorer(trained.data, trained.plan, "cpu")
    assert np.isnan(score(Nothing(), trained.split.val[:1]))
    network = load_model(trained.run_dir / "model")[0].train()
    assert 0 <= score(network, trained.split.val[:2]) <= 1


@pytest.mark.slow
def test_a_run_scores_whole_cases_now_and_then_and_resumes_to_the_same(
    discs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightm.training.loop.WHOLE_SHARE", 0.2)
    options = {**OPTIONS, "epochs": 3, "test": False, "split": SPLIT, "val_cases": 3}
    lightm.train(discs, tmp_path / "whole", **options)
    with killed_at(10):  # in the third epoch
        lightm.train(discs, tmp_path / "killed", **options)
    lightm.resume(tmp_path / "killed")
    rows = history(tmp_path / "whole")
    assert history(tmp_path / "killed") == rows
    assert [row["whole_case_dice"] != "nan" for row in rows] == [False, True, True]  # 6 windows of 24, 48, 72
    models = [json.loads((tmp_path / name / "model" / "model.json").read_text()) for name in ("whole", "killed")]
    for model in models:
        model["training"].pop("train_seconds")
    assert models[0] == models[1]
