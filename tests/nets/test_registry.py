"""Networks and losses from outside: registered, installed, saved and loaded again; former names of options."""

from __future__ import annotations

import doctest
import json
import sys
import types
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lightm.losses.base
import lightm.registry
from lightm.errors import InputError
from lightm.losses import LOSSES, create_loss, register_loss
from lightm.nets import NETWORKS, create, load_model, register_network, save_model
from tests.nets.test_folder import NETWORK


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = dict(NETWORKS._items), dict(LOSSES._items)
    yield
    NETWORKS._items, LOSSES._items = before


def tiny(spatial_dims: int, in_channels: int, out_channels: int, width: int = 4) -> nn.Module:
    conv = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
    return nn.Sequential(conv(in_channels, width, 3, padding=1), nn.ReLU(), conv(width, out_channels, 1))


def test_a_registered_network_is_built_saved_and_loaded(tmp_path: Path) -> None:
    register_network("tiny", tiny)
    network = create("tiny", 2, 1, 2, image_size=(8, 8), width=3)
    described = {"name": "tiny", "spatial_dims": 2, "in_channels": 1, "out_channels": 2, "options": {"width": 3}}
    folder = save_model(tmp_path / "m", network=described, state_dict=network.state_dict(), plan={}, training={})
    loaded, _ = load_model(folder)
    image = torch.randn(1, 1, 8, 8)
    assert torch.equal(loaded(image), network(image))
    del NETWORKS._items["tiny"]
    with pytest.raises(InputError, match=r"model\.json: unknown network 'tiny'.*register_network"):
        load_model(folder)


def test_names_and_builders_that_cannot_be(tmp_path: Path) -> None:
    register_network("tiny", tiny)
    for name, builder, words in (
        ("lightm", tiny, "comes with LightM"),
        ("tiny", tiny, "registered already"),
        ("Tiny Net", tiny, "one lower-case word"),
        ("other", 5, "expected a class or function"),
    ):
        with pytest.raises(InputError, match=words):
            register_network(name, builder)  # type: ignore[arg-type]
    register_network("tiny", lambda dims, inputs, outputs: "text", overwrite=True)  # type: ignore[arg-type,return-value]
    with pytest.raises(InputError, match=r"returned str, expected an nn\.Module"):
        create("tiny")
    with pytest.raises(InputError, match=r"unknown network 'tini'; did you mean 'tiny'"):
        create("tini")


def test_entry_points_are_known_and_imported_late(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {
        "lightm.networks": {"theirs": EntryPoint("theirs", "made_up_package:tiny", "lightm.networks")},
        "lightm.losses": {"their-loss": EntryPoint("their-loss", "made_up_package:Loss", "lightm.losses")},
    }
    monkeypatch.setattr(lightm.registry, "_installed", lambda group: entries.get(group, {}))
    assert "theirs" in NETWORKS.names()
    with pytest.raises(InputError, match=r"'theirs' is an entry point, made_up_package:tiny, which cannot be used"):
        create("theirs")
    package = types.ModuleType("made_up_package")
    package.tiny = tiny  # type: ignore[attr-defined]
    package.Loss = lambda: lambda logits, target: logits.square().mean()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "made_up_package", package)
    assert isinstance(create("theirs", 2), nn.Sequential)
    assert create_loss("their-loss", spatial_dims=2)(torch.ones(1, 2, 4, 4), torch.zeros(1, 4, 4).long()) == 1


def test_a_registered_loss_alone_and_in_a_sum() -> None:
    def scaled(num_classes: int, factor: float = 2.0) -> object:
        return lambda logits, target: factor * num_classes * logits.mean()

    register_loss("scaled", scaled)
    logits, target = torch.ones(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)
    sizes = {"spatial_dims": 2, "num_classes": 3}
    assert create_loss("scaled", **sizes)(logits, target) == 6
    both = create_loss("ce+scaled", factor=1.0, weights=(1, 0.5), **sizes)(logits.half(), target)
    torch.testing.assert_close(both, torch.tensor(3.0).log() + 1.5)
    with pytest.raises(InputError, match=r"no option 'factr'.*did you mean 'factor'"):
        create_loss("scaled", factr=1, **sizes)
    register_loss("whole", lambda: lambda logits, target: logits)
    whole = create_loss("whole", **sizes)
    with pytest.raises(InputError, match="returned a tensor of shape"):
        whole(logits, target)
    for name, words in (("ce", "comes with LightM"), ("a+b", "one lower-case word")):
        with pytest.raises(InputError, match=words):
            register_loss(name, scaled)


def test_former_names_of_options_are_read(tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match="'filters' is now 'base_channels'"):
        network = create("lightm-unet-small", 2, 1, 2, filters=8)
    folder = save_model(tmp_path / "m", network=NETWORK, state_dict=network.state_dict(), plan={}, training={})
    path = folder / "model.json"
    info = json.loads(path.read_text(encoding="utf-8"))
    info["network"]["options"] = {"filters": 8}  # as former versions wrote it; read without a warning
    path.write_text(json.dumps(info), encoding="utf-8")
    image: Tensor = torch.randn(1, 1, 16, 16)
    assert torch.equal(load_model(folder)[0](image), network.eval()(image))
    with pytest.warns(DeprecationWarning, match="'filters' is now 'channels'"):
        create("unet", 2, 1, 2, filters=(4, 8, 8))


@pytest.mark.parametrize("module", [lightm.losses.base, lightm.registry])
def test_the_examples_of_the_docstrings(module: types.ModuleType) -> None:
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0
    assert found.failed == 0
