"""Model folders that lie about their network: refused before memory or minutes are spent on them."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightm.errors import InputError
from lightm.nets import create, load_model, names, save_model
from lightm.nets.folder import create_described, tensor_shapes
from tests.nets.test_folder import NETWORK

PLAN = {"dataset": "Dots", "labels": {"background": 0, "dot": 1}, "spacing_mm": [1, 1], "patch_size": [16, 16]}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    state = create("lightm-unet-small", 2, 1, 2, base_channels=8).state_dict()
    return save_model(tmp_path / "model", network=NETWORK, state_dict=state, plan=PLAN, training={})


def describe(model: Path, **changes: Any) -> None:
    path = model / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def exchange(model: Path, state: dict[str, torch.Tensor]) -> None:
    save_file(state, model / "model.safetensors")
    describe(model, weights_sha256=hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest())


HUGE: list[dict[str, Any]] = [
    {"base_channels": 8_000_000},
    {"base_channels": 2**62},
    {"base_channels": 10**30},
    {"base_channels": -8},
    {"base_channels": 8.5},
    {"base_channels": "8"},
    {"base_channels": None},
    {"bottleneck_layers": 10**9},
    {"bottleneck_layers": 100_000},
    {"encoder_layers": [10**9]},
    {"encoder_layers": [1] * 70},
    {"encoder_layers": [1] * 5000},
    {"encoder_layers": []},
    {"encoder_layers": 7},
    {"encoder_layers": [[1]]},
    {"state_size": 10**10},
    {"expand": 10**9},
    {"groups": 0},
    {"layer": "spm", "parts": 10**9},
    {"layer": ["rvm"]},
    {"scan": {}},
    {"unknown": 1},
    {"name": "x"},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", HUGE, ids=[str(options)[:40] for options in HUGE])
def test_a_description_of_a_huge_or_impossible_network_is_refused_at_once(model: Path, options: dict[str, Any]) -> None:
    describe(model, network={**NETWORK, "options": {"base_channels": 8, **options}})
    before = peak_bytes()
    began = time.monotonic()
    with pytest.raises(InputError, match=r"model\.(json|safetensors)"):
        load_model(model)
    assert time.monotonic() - began < 10
    assert peak_bytes() - before < 300 << 20


def peak_bytes() -> int:
    """The most memory that this process has held; 0 where the system does not say it."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize(
    "changes",
    [
        {"in_channels": 10**12},
        {"out_channels": 10**12},
        {"in_channels": "1"},
        {"spatial_dims": 77},
        {"spatial_dims": None},
        {"name": "swinunetr", "image_size": [96, 96], "options": {"feature_size": 24 * 10**6}},
        {"name": "swinunetr", "options": {"depths": [10**9] * 4}},
        {"name": "dynunet", "options": {"base_channels": [10**9] * 3}},
        {"name": "unetr", "image_size": [10**7, 10**7], "options": {}},
        {"name": "umamba-bot", "options": {}},
        {"name": "nothing"},
        {"name": ["lightm"]},
        {"name": None},
        {"options": 5},
        {"options": [["base_channels", 10**9]]},
        {"surplus": 1},
    ],
    ids=lambda changes: str(changes)[:50],
)
def test_other_lies_about_the_network_are_refused(model: Path, changes: dict[str, Any]) -> None:
    describe(model, network={**NETWORK, **changes})
    before, began = peak_bytes(), time.monotonic()
    with pytest.raises(InputError, match=r"model\.(json|safetensors)"):
        load_model(model)
    assert time.monotonic() - began < 20
    assert peak_bytes() - before < 300 << 20


def test_weights_that_no_training_wrote_are_refused(model: Path, tmp_path: Path) -> None:
    state = load_file(model / "model.safetensors")
    name = next(iter(state))
    for change, words in (
        ({name: torch.full_like(state[name], torch.nan)}, "NaN"),
        ({name: torch.full_like(state[name], -torch.inf)}, "NaN"),
        ({name: state[name].to(torch.complex64)}, "complex"),
        ({name: state[name][..., :-1].contiguous() if state[name].ndim else state[name].reshape(1)}, "another shape"),
        ({"more": torch.zeros(3)}, "1 unknown"),
        ({f"t{i}": torch.zeros(0) for i in range(20_000)}, "20000 unknown"),
    ):
        exchange(model, {**state, **change})
        with pytest.raises(InputError, match=words) as raised:
            load_model(model)
        assert "model.safetensors" in str(raised.value)
    exchange(model, state)
    load_model(model)
    for size in (2**63 - 1, 10**15, 5):  # a header longer than the file, and cut off
        content = (model / "model.safetensors").read_bytes()
        (model / "model.safetensors").write_bytes(size.to_bytes(8, "little") + content[8:])
        digest = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
        describe(model, weights_sha256=digest)
        with pytest.raises(InputError, match=r"model\.safetensors: not a readable"):
            load_model(model)
        (model / "model.safetensors").write_bytes(content)


def test_descriptions_that_break_parsers_are_refused(model: Path) -> None:
    good = (model / "model.json").read_text(encoding="utf-8")
    for content in (
        "[" * 200_000,
        good.replace('"schema_version": 1', '"schema_version": ' + "1" * 5000),
        good.replace('"network": {', '"network": {"deep": ' + '{"a": ' * 100_000),
        '{"schema_version": 1}',
        "null",
        "",
        "\0",
        good[:-20],
        " " * (17 << 20),
    ):
        (model / "model.json").write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=r"model\.json"):
            load_model(model)
    (model / "model.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match=r"model\.json: not readable as JSON"):
        load_model(model)
    shutil.rmtree(model)
    model.write_text("a file", encoding="utf-8")
    with pytest.raises(InputError, match="not a model folder"):
        load_model(model)


@pytest.mark.slow
@pytest.mark.parametrize("dims", [2, 3])
def test_every_network_is_built_from_its_own_description(tmp_path: Path, dims: int) -> None:
    torch.manual_seed(0)
    built = 0
    for name in names():
        described = {"name": name, "spatial_dims": dims, "in_channels": 1, "out_channels": 2, "image_size": [64] * dims}
        if name.startswith("lightm"):
            del described["image_size"]
        if name in ("transunet", "nnformer", "unetr", "deeplabv3plus", "dynunet", "unet", "umamba-enc"):
            continue  # large; the sound ones of every kind are enough
        with torch.device("meta"):
            try:
                shapes = {key: tuple(value.shape) for key, value in create(**described).state_dict().items()}
            except RuntimeError:  # builds on no device without memory
                shapes = {key: tuple(value.shape) for key, value in _on_cpu(described).items()}
        state = torch.get_rng_state()
        network = create_described(described, shapes, tmp_path / "model.json", tmp_path / "model.safetensors")
        assert torch.equal(torch.get_rng_state(), state)
        assert not any(parameter.is_meta for parameter in network.parameters())
        assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == shapes
        with pytest.raises(InputError, match="another network"):
            create_described(described, {**shapes, "more": (1,)}, tmp_path / "model.json", tmp_path / "w")
        built += 1
    assert built > 12


def _on_cpu(described: dict[str, Any]) -> dict[str, torch.Tensor]:
    with torch.device("cpu"):
        return create(**described).state_dict()


def test_shapes_come_from_the_header(model: Path) -> None:
    state = load_file(model / "model.safetensors")
    assert tensor_shapes(model / "model.safetensors") == {name: tuple(value.shape) for name, value in state.items()}
