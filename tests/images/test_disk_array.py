"""An array on disk behaves as the same array in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightm.errors import LightMError
from lightm.images.lazy import DiskArray


@settings(max_examples=60, deadline=None)
@given(data=st.data(), shape=st.lists(st.integers(1, 6), min_size=2, max_size=4))
def test_boxes_of_a_file_are_those_of_an_array(
    data: st.DataObject, shape: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    on_disk, held = DiskArray(shape, np.int16, tmp_path_factory.getbasetemp()), np.zeros(shape, np.int16)
    assert not on_disk.held
    whole = tuple(slice(0, size) for size in shape)
    for value in range(1, 4):
        box = tuple(slice(*sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in shape)
        box = tuple(slice(part.start, max(part.stop, part.start)) for part in box)
        values = value * 100 + np.arange(held[box].size, dtype=np.int16).reshape(held[box].shape)
        on_disk.write(box, values)
        held[box] = values
        np.testing.assert_array_equal(on_disk.read(box), held[box])
    np.testing.assert_array_equal(on_disk.read(whole), held)
    on_disk.close()


def test_in_memory_a_box_is_a_view() -> None:
    spool = DiskArray((3, 4), np.float32)
    box = (slice(1, 3), slice(0, 2))
    view = spool.read(box)
    view += 5
    spool.write(box, view)
    assert spool.read((slice(0, 3), slice(0, 4))).sum() == 20


def test_a_file_is_gone_at_the_end_and_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = DiskArray((2, 3), np.uint8, tmp_path)
    spool.write((slice(0, 1), slice(0, 3)), np.ones((1, 3), np.uint8))
    spool.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(LightMError, match="was closed"):
        spool.read((slice(0, 1), slice(0, 3)))
    with pytest.raises(LightMError, match="cannot be written there"):
        DiskArray((2, 3), np.uint8, tmp_path / "missing")
