"""The experiment's YAML: what it means, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightm.errors import InputError
from lightm.lab.compare import Experiment, load_experiment

ROOT = Path(__file__).resolve().parents[3]
BASE: dict[str, Any] = {
    "name": "trial",
    "phantom": {"kind": "liver"},
    "networks": ["lightm-small", "segresnet"],
    "losses": {"Dice": "ce+dice", "ARSL": {"loss": "ce+arsl", "options": {"skip_empty": True}}},
    "seeds": [3, 5],
    "epochs": 2,
}


def _load(tmp_path: Path, **changes: Any) -> Experiment:
    content = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
    path = tmp_path / "trial.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return load_experiment(path)


def test_the_grid_has_every_trial_once_and_whole_seeds_first(tmp_path: Path) -> None:
    trials = _load(tmp_path).trials()
    assert [(c.network, c.loss, c.recipe, c.seed) for c in trials] == [
        (network, loss, "default", seed)
        for seed in (3, 5)
        for network in ("lightm-small", "segresnet")
        for loss in ("Dice", "ARSL")
    ]
    assert len({trial.id for trial in trials}) == 8


def test_the_baseline_comes_first_and_methods_are_named_by_what_differs(tmp_path: Path) -> None:
    experiment = _load(tmp_path, baseline={"loss": "ARSL"})
    names = [experiment.method_name(method) for method in experiment.methods()]
    assert names == ["lightm-small, ARSL", "lightm-small, Dice", "segresnet, Dice", "segresnet, ARSL"]
    alone = _load(tmp_path, networks=["lightm-small"])
    assert [alone.method_name(method) for method in alone.methods()] == ["Dice", "ARSL"]


def test_settings_are_those_of_a_training_and_change_the_fingerprint(tmp_path: Path) -> None:
    experiment = _load(tmp_path, recipes={"slow": {"recipe": "default", "settings": {"lr": 1e-3}}})
    dice, arsl = experiment.trials()[:2]
    settings = experiment.settings_of(arsl)
    assert settings["loss"] == "ce+arsl"
    assert settings["settings"] == {"lr": 1e-3, "loss_options": {"skip_empty": True}}
    assert (settings["network"], settings["seed"], settings["epochs"]) == ("lightm-small", 3, 2)
    other = _load(tmp_path, recipes={"slow": {"recipe": "default", "settings": {"lr": 2e-3}}})
    assert experiment.fingerprint(dice) != experiment.fingerprint(arsl)
    assert experiment.fingerprint(dice) != other.fingerprint(dice)
    assert experiment.fingerprint(dice) == _load(
        tmp_path, recipes={"slow": {"recipe": "default", "settings": {"lr": 1e-3}}}
    ).fingerprint(dice)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    experiment = _load(tmp_path, phantom=None, dataset="scans", split="split.json")
    assert experiment.dataset == str(tmp_path / "scans")
    assert experiment.split == str(tmp_path / "split.json")


def test_saved_and_read_again_it_is_the_same(tmp_path: Path) -> None:
    experiment = _load(tmp_path, max_time="90s", baseline={"network": "segresnet"})
    experiment.save(tmp_path / "again.yaml")
    assert load_experiment(tmp_path / "again.yaml") == experiment


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"networks": ["lightm-smal"]}, "lightm-small"),
        ({"networks": ["lightm-small", "lightm-small"]}, "occurs twice"),
        ({"networks": []}, "networks"),
        ({"networks": None}, "networks"),
        ({"losses": ["ce+dise"]}, "dise"),
        ({"losses": {"a": {"loss": "ce+dice", "options": {"skip_empty": True}}}}, "skip_empty"),
        ({"losses": {"../a": "ce+dice"}}, "usable name"),
        ({"recipes": ["fast"]}, "fast"),
        ({"baseline": {"loss": "Tversky"}}, "Tversky"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"seeds": [-1]}, "seeds"),
        ({"epochs": None}, "max_time"),
        ({"max_time": "soon"}, "soon"),
        ({"dataset": "x"}, "one of"),
        ({"phantom": None}, "one of"),
        ({"phantom": {"kind": "heart"}}, "kind"),
        ({"netwroks": ["lightm"]}, "netwroks"),
        ({"name": "a/b"}, "usable name"),
        ({"losses": {"a b": "ce+dice", "a-b": "ce+arsl"}}, "differ only"),
    ],
)
def test_a_fault_is_one_error_that_names_the_file(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        _load(tmp_path, **changes)
    assert words in str(error.value)
    assert str(tmp_path / "trial.yaml") in str(error.value)


@pytest.mark.parametrize(
    "path",
    [ROOT / "examples" / "quick.yaml", *sorted((ROOT / "examples" / "compare").glob("*.yaml"))],
    ids=lambda p: p.stem,
)
def test_every_shipped_experiment_is_valid(path: Path) -> None:
    experiment = load_experiment(path)
    assert experiment.name == path.stem
    assert len(experiment.trials()) >= 2
    assert f"lightm compare examples/{path.relative_to(ROOT / 'examples').as_posix()}" in path.read_text(
        encoding="utf-8"
    )
