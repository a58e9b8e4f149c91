"""Single-file models: a round trip, and files that are refused."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightm.errors import InputError
from lightm.nets import create, load_model, pack_model, save_model
from tests.nets.test_folder import NETWORK

PLAN = {"dataset": "Dots", "labels": {"background": 0, "dot": 1}, "spacing_mm": [1, 1], "patch_size": [16, 16]}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    state = create("lightm-unet-small", 2, 1, 2, base_channels=8).state_dict()
    return save_model(tmp_path / "run" / "model", network=NETWORK, state_dict=state, plan=PLAN, training={})


@pytest.fixture
def packed(model: Path, tmp_path: Path) -> Path:
    return pack_model(model, tmp_path / "dots.safetensors")


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        found: dict[str, str] = opened.metadata()
        return found


def test_a_packed_model_is_the_same_model(model: Path, packed: Path, tmp_path: Path) -> None:
    (one, info), (other, same) = load_model(model), load_model(packed)
    image = torch.randn(1, 1, 16, 16)
    assert torch.equal(one(image), other(image))
    assert info == same
    assert metadata(packed)["card.md"] == (model / "card.md").read_text(encoding="utf-8")
    assert load_file(packed).keys() == one.state_dict().keys()
    pack_model(model.parent, tmp_path / "run.safetensors")
    assert load_model(tmp_path / "run.safetensors")[1] == info
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dots.safetensors", "run", "run.safetensors"]


def test_a_zip_of_former_versions_is_refused_with_the_remedy(model: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "old.zip", "w") as archive:
        for path in model.iterdir():
            archive.write(path, path.name)
    with pytest.raises(InputError, match=r"old\.zip: models are no longer zip files; unzip it"):
        load_model(tmp_path / "old.zip")
    zipfile.ZipFile(tmp_path / "old.zip").extractall(tmp_path / "unzipped")
    load_model(tmp_path / "unzipped")


def test_what_is_there_is_not_replaced_and_wrong_calls_are_refused(model: Path, packed: Path, tmp_path: Path) -> None:
    for arguments, words in (
        ((model, packed), "is there already"),
        ((model, tmp_path / "model.zip"), r"ends in \.safetensors"),
        ((packed, tmp_path / "b.safetensors"), "already; copy"),
        ((tmp_path, tmp_path / "b.safetensors"), r"model\.json is missing"),
    ):
        with pytest.raises(InputError, match=words):
            pack_model(*arguments)
    pack_model(model, packed, overwrite=True)
    (model / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="checksum"):
        pack_model(model, tmp_path / "torn.safetensors")
    assert not (tmp_path / "torn.safetensors").exists()


def test_files_that_are_no_model_are_refused(model: Path, packed: Path, tmp_path: Path) -> None:
    texts, state, bad = metadata(packed), load_file(packed), tmp_path / "bad.safetensors"

    def refused(words: str, **changes: Any) -> None:
        save_file(state, bad, metadata={**texts, **changes} if changes else None)
        with pytest.raises(InputError, match=rf"bad\.safetensors.*{words}"):
            load_model(bad)

    refused("weights alone")
    refused("checksum differs", tensors_sha256="0")
    refused("not readable as JSON", **{"model.json": "[" * 200_000})
    info = json.loads(texts["model.json"])
    refused("99 is newer", **{"model.json": json.dumps({**info, "schema_version": 99})})
    huge = {**info, "network": {**NETWORK, "options": {"base_channels": 10**9}}}
    refused("add up to more", **{"model.json": json.dumps(huge)})
    wider = {**info, "network": {**NETWORK, "options": {"base_channels": 16}}}
    refused("another network", **{"model.json": json.dumps(wider)})
    for content in (b"", b"hello" * 99, (2**62).to_bytes(8, "little") + b"{}"):
        bad.write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.safetensors: not a readable"):
            load_model(bad)


def test_every_cut_and_many_changed_bytes_end_in_the_model_or_one_error(packed: Path) -> None:
    content, hurt = packed.read_bytes(), packed.with_name("hurt.safetensors")
    generator = torch.Generator().manual_seed(0)
    places = [int(p) for p in torch.randint(len(content), (60,), generator=generator)]
    places += [int(p) for p in torch.randint(4096, (60,), generator=generator)]
    refused = 0
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 0xFF
        for version in (bytes(changed), content[:place]):
            hurt.write_bytes(version)
            try:
                load_model(hurt)
            except InputError as error:
                assert "hurt.safetensors" in str(error)  # noqa: PT017
                refused += 1
    assert refused > len(places)


@pytest.mark.slow
def test_the_verb_packs_and_a_program_can_read_the_answer(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    command = [sys.executable, "-m", "lightm", "pack", str(model), str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"file": str(out), "bytes": out.stat().st_size}
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2
    assert "is there already" in again.stderr
