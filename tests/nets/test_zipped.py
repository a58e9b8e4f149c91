"""Single-file models: a round trip, and archives that are refused."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from lightm.errors import InputError, LightMError
from lightm.nets import create, load_model, pack_model, save_model
from lightm.nets.folder import set_postprocess
from tests.nets.test_folder import NETWORK

PLAN = {"dataset": "Dots", "labels": {"background": 0, "dot": 1}, "spacing_mm": [1, 1], "patch_size": [16, 16]}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    state = create("lightm-unet-small", 2, 1, 2, filters=8).state_dict()
    return save_model(tmp_path / "run" / "model", network=NETWORK, state_dict=state, plan=PLAN, training={})


@pytest.fixture
def packed(model: Path, tmp_path: Path) -> Path:
    return pack_model(model, tmp_path / "dots.zip")


def test_a_packed_model_is_the_same_model(model: Path, packed: Path, tmp_path: Path) -> None:
    (one, info), (other, same) = load_model(model), load_model(packed)
    image = torch.randn(1, 1, 16, 16)
    assert torch.equal(one(image), other(image))
    assert info == same
    assert pack_model(model.parent, tmp_path / "run.zip").read_bytes() == packed.read_bytes()
    direct = save_model(
        tmp_path / "direct.zip", network=NETWORK, state_dict=one.state_dict(), plan=PLAN, training={"epochs": 1}
    )
    assert load_model(direct)[1]["training"] == {"epochs": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["direct.zip", "dots.zip", "run", "run.zip"]


def test_a_folder_zipped_by_hand_is_read_too(model: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "hand.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("model") if hasattr(archive, "mkdir") else archive.writestr("model/", b"")
        for path in model.iterdir():
            archive.write(path, f"model/{path.name}")
    load_model(tmp_path / "hand.zip")


def test_what_is_there_is_not_replaced_and_wrong_calls_are_refused(model: Path, packed: Path, tmp_path: Path) -> None:
    for arguments, words in (
        ((model, packed), "is there already"),
        ((model, tmp_path / "model.tar"), r"ends in \.zip"),
        ((packed, tmp_path / "b.zip"), "already; copy"),
        ((tmp_path, tmp_path / "b.zip"), r"model\.json is missing"),
    ):
        with pytest.raises(InputError, match=words):
            pack_model(*arguments)
    pack_model(model, packed, overwrite=True)
    with pytest.raises(InputError, match="not changed"):
        set_postprocess(packed, [])
    (model / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="checksum"):
        pack_model(model, tmp_path / "torn.zip")
    assert not (tmp_path / "torn.zip").exists()
    blocker = tmp_path / "file"
    blocker.touch()
    with pytest.raises(LightMError, match="cannot be written"):
        save_model(blocker / "model", network=NETWORK, state_dict={}, plan={}, training={})


def rewritten(packed: Path, *extra: tuple[str | zipfile.ZipInfo, bytes], without: str = "", method: int = 0) -> Path:
    """A copy of the archive with other entries."""
    path = packed.with_name("bad.zip")
    with zipfile.ZipFile(packed) as source, zipfile.ZipFile(path, "w", method) as target:
        for name in source.namelist():
            if name != without:
                target.writestr(name, source.read(name))
        for entry, content in extra:
            target.writestr(entry, content)
    return path


def link(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = 0o120777 << 16
    return entry


@pytest.mark.parametrize(
    "name",
    [
        "../evil.txt",
        "/tmp/evil.txt",
        "..\\evil.txt",
        "C:\\evil.txt",
        "run/../../evil.json",
        "../model.json",
        "./model.json",
        "a/b/model.json",
        "model.pkl",
        "evil.py",
        "model.json/",
        "MODEL.JSON",
        "модель.json",
        "..../",
    ],
)
def test_paths_that_leave_the_folder_and_unknown_files_are_refused(packed: Path, name: str) -> None:
    before = set(packed.parent.parent.rglob("*"))
    path = rewritten(packed, (name, b"evil"))
    with pytest.raises(InputError, match=r"bad\.zip: (holds|its files lie in)"):
        load_model(path)
    assert set(packed.parent.parent.rglob("*")) - before == {path}


def test_odd_archives_are_refused(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, words: str) -> None:
        with pytest.raises(InputError, match=rf"(?s){path.name}.*{words}"):
            load_model(path)

    card, weights = "card.md", "model.safetensors"
    refused(rewritten(packed, without="model.json"), r"model\.json missing")
    refused(rewritten(packed, (link(card), b"/etc/passwd"), without=card), "link")
    refused(rewritten(packed, ("model/card.md", b"x"), without=card), "several folders")
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = rewritten(packed, ("model.json", b"{}"))
    refused(twice, "twice")
    refused(rewritten(packed, method=zipfile.ZIP_BZIP2), "method 12")
    refused(rewritten(packed, *((f"{n}.txt", b"") for n in range(9))), "table of 12 files")
    refused(rewritten(packed, (card, b"0" * (9 << 20)), without=card, method=zipfile.ZIP_DEFLATED), "zip bomb")
    monkeypatch.setattr("lightm.nets.zipped.MAX_TEXT_BYTES", 1000)
    refused(rewritten(packed, (card, b"0" * 1001), without=card), "limit is 1000")
    monkeypatch.undo()
    refused(rewritten(packed, (weights, b"no tensors"), without=weights), "checksum differs")
    deep = b'{"schema_version": ' + b"[" * 200_000
    refused(rewritten(packed, ("model.json", deep), without="model.json"), "not readable as JSON")
    info = json.loads(zipfile.ZipFile(packed).read("model.json"))
    newer = json.dumps({**info, "schema_version": 99}).encode()
    refused(rewritten(packed, ("model.json", newer), without="model.json"), "99 is newer")
    nothing = tmp_path / "nothing.zip"
    refused(nothing, "not a model folder")
    for content in (b"", b"PK\x05\x06", b"hello" * 99, b"PK\x05\x06" + bytes(18)):
        nothing.write_bytes(content)
        refused(nothing, "")


def test_an_archive_that_lies_about_its_sizes_is_refused(packed: Path) -> None:
    content = packed.read_bytes()
    (size,) = struct.unpack_from("<I", content, content.rindex(b"PK\x01\x02") + 24)
    lying = packed.with_name("lying.zip")
    at = content.rindex(b"PK\x01\x02")
    for wrong in (size - 9, size + 9, 0, 2**32 - 1):
        changed = bytearray(content)
        struct.pack_into("<I", changed, at + 24, wrong)
        lying.write_bytes(changed)
        with pytest.raises(InputError, match=r"lying\.zip"):
            load_model(lying)


def test_every_cut_and_many_changed_bytes_end_in_the_model_or_one_error(packed: Path) -> None:
    content, hurt = packed.read_bytes(), packed.with_name("hurt.zip")
    generator = torch.Generator().manual_seed(0)
    places = [int(p) for p in torch.randint(len(content), (60,), generator=generator)]
    table = content.index(b"PK\x01\x02")
    places += [int(p) for p in torch.randint(table, len(content), (60,), generator=generator)]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 0xFF
        for version in (bytes(changed), content[:place]):
            hurt.write_bytes(version)
            try:
                load_model(hurt)
            except InputError as error:
                assert "hurt.zip" in str(error)  # noqa: PT017


def test_the_verb_packs_and_a_program_can_read_the_answer(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightm", "pack", str(model), str(tmp_path / "a.zip"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"file": str(tmp_path / "a.zip"), "bytes": (tmp_path / "a.zip").stat().st_size}
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2
    assert "is there already" in again.stderr
