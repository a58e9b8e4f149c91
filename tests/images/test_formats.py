"""Formats from outside: read, written, refused, known to data sets."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

import lightm.registry
from lightm.datasets.description import read_description
from lightm.errors import InputError
from lightm.images.io import FORMATS, file_suffix, read_volume, register_format, write_volume
from lightm.images.volume import Volume


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = dict(FORMATS._items)
    yield
    FORMATS._items = before


def read(path: Path) -> Volume:
    with np.load(path) as content:
        return Volume.from_spacing(content["data"], tuple(content["spacing"]))


def write(path: Path, volume: Volume) -> None:
    np.savez(path, data=volume.data, spacing=volume.spacing_mm)


def test_a_registered_format_is_read_and_written(tmp_path: Path) -> None:
    register_format(".npz", read, write)
    data = np.arange(24, dtype=np.int64).reshape(2, 3, 4)
    path = tmp_path / "new" / "case.NPZ"
    write_volume(path, Volume.from_spacing(data, (2.0, 1.0, 1.0)))
    assert [file.name for file in path.parent.iterdir()] == ["case.NPZ"]
    found = read_volume(path, kind="label")
    assert found.data.dtype == np.uint8
    assert np.array_equal(found.data, data)
    assert found.spacing_mm == (2.0, 1.0, 1.0)
    write_volume(path, Volume.from_spacing(data / 3, (1.0, 1.0, 1.0)))
    with pytest.raises(InputError, match=r"case\.NPZ: a label map holds whole numbers"):
        read_volume(path, kind="label")
    path.write_bytes(b"torn")
    with pytest.raises(InputError, match=r"case\.NPZ: its reader failed"):
        read_volume(path)


def test_what_cannot_be(tmp_path: Path) -> None:
    for ending, words in ((".nii.gz", "comes with LightM"), ("npz", "expected the ending"), (".n/z", "one lower-case")):
        with pytest.raises(InputError, match=words):
            register_format(ending, read)
    with pytest.raises(InputError, match="a format is a reader"):
        register_format(".npz", 5)  # type: ignore[arg-type]
    register_format(".npz", lambda path: path.read_bytes())  # type: ignore[arg-type,return-value]
    write(tmp_path / "x.npz", Volume.from_spacing(np.zeros((2, 2)), (1.0, 1.0)))
    with pytest.raises(InputError, match="returned bytes, expected a"):
        read_volume(tmp_path / "x.npz")
    with pytest.raises(InputError, match="can be read, not written"):
        write_volume(tmp_path / "y.npz", Volume.from_spacing(np.zeros((2, 2)), (1.0, 1.0)))
    with pytest.raises(InputError, match="registered already"):
        register_format(".npz", read)


def test_an_installed_format_is_one_of_a_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '{"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1}, "file_ending": ".npz"}'
    (tmp_path / "dataset.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"file_ending .*\.npz"):
        read_description(tmp_path / "dataset.json")
    entry = EntryPoint("npz", f"{__name__}:read", "lightm.formats")
    monkeypatch.setattr(lightm.registry, "_installed", lambda group: {"npz": entry})
    assert file_suffix("case_0000.npz") == ".npz"
    assert read_description(tmp_path / "dataset.json").file_ending == ".npz"
    write(tmp_path / "x.npz", Volume.from_spacing(np.ones((2, 2)), (1.0, 1.0)))
    assert read_volume(tmp_path / "x.npz").data.sum() == 4
