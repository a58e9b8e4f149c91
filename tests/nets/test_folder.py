"""Model folders: a round trip, and every way in which one can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightm.errors import InputError
from lightm.nets import create, load_model, save_model

NETWORK = {
    "name": "lightm-unet-small",
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 2,
    "options": {"base_channels": 8},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = create("lightm-unet-small", 2, 1, 2, base_channels=8)
    return save_model(
        tmp_path / "run" / "model",
        network=NETWORK,
        state_dict=network.state_dict(),
        plan={"dataset": "Dots", "labels": {"background": 0, "dot": 1}, "spacing_mm": [1, 1], "patch_size": [16, 16]},
        training={"epochs": 3},
    )


def test_round_trip_gives_the_same_logits_and_leaves_the_random_state_alone(model: Path) -> None:
    torch.manual_seed(0)
    original = create("lightm-unet-small", 2, 1, 2, base_channels=8).eval()
    image = torch.randn(1, 1, 16, 16)
    state = torch.get_rng_state()
    loaded, info = load_model(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not loaded.training
    assert torch.equal(loaded(image), original(image))
    assert info["plan"]["dataset"] == "Dots"
    assert info["training"] == {"epochs": 3}
    assert "Not for clinical decisions" in (model / "card.md").read_text(encoding="utf-8")


def test_saving_again_replaces_the_folder_and_leaves_nothing_else(model: Path) -> None:
    other = create("lightm-unet-small", 2, 1, 2, base_channels=8)
    save_model(model, network=NETWORK, state_dict=other.state_dict(), plan={}, training={"epochs": 9})
    assert load_model(model)[1]["training"] == {"epochs": 9}
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def test_a_failure_while_saving_leaves_the_older_model(model: Path) -> None:
    with pytest.raises(TypeError):
        save_model(model, network=NETWORK, state_dict={}, plan={"not": object()}, training={})
    load_model(model)
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def _edit(model: Path, **changes: object) -> None:
    path = model / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def test_wrong_folders_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.json is missing"):
        load_model(tmp_path)
    _edit(model, schema_version=99)
    with pytest.raises(InputError, match="99 is newer"):
        load_model(model)
    _edit(model, schema_version=1, network={**NETWORK, "options": {"base_channels": 16}})
    with pytest.raises(InputError, match="another network"):
        load_model(model)
    _edit(model, network={"name": "lightm-unet-small"})
    with pytest.raises(InputError, match=r"key .* is missing"):
        load_model(model)
    _edit(model, network=NETWORK)
    load_model(model)
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(InputError, match="checksum"):
        load_model(model)
    (model / "model.json").write_text("{torn", encoding="utf-8")
    with pytest.raises(InputError, match="not readable as JSON"):
        load_model(model)
