"""Reading by the box gives the voxels, the geometry and the messages of `read_volume`."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from lightm.errors import InputError
from lightm.images import nifti
from lightm.images.io import read_volume, write_volume
from lightm.images.lazy import LazyVolume, open_volume, read_header
from lightm.images.volume import Volume

BAD = Path(__file__).parents[3] / "shared" / "data" / "badinput"
# Axes that are permuted and flipped: x of the file runs to posterior, y to the left, z to inferior.
TURNED = np.array([[0, -2.0, 0, 5], [-1.5, 0, 0, 7], [0, 0, -3.0, 9], [0, 0, 0, 1]])


def save(path: Path, voxels: np.ndarray, slope: float | None = None, inter: float = 0.0) -> Path:
    image = nibabel.Nifti1Image(voxels.T, TURNED)
    if slope is None:
        nibabel.save(image, path)
        return path
    # nibabel would scale the voxels itself; the header's fields are set by hand.
    header = image.header.copy()
    header.set_slope_inter(slope, inter)
    header.set_data_offset(352)
    header["magic"] = b"n+1"
    content = header.binaryblock + bytes(4) + voxels.tobytes()
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return path


def whole(image: LazyVolume) -> np.ndarray:
    return image.read(tuple(slice(0, size) for size in image.geometry.shape))


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize(("dtype", "slope"), [("<i2", None), ("<i2", 0.37), (">i2", None), ("<f4", None), ("<u1", -3.0),
                                              (">f8", None), ("<f4", 2.5)])  # fmt: skip
def test_voxels_and_place_are_those_of_read_volume(
    ending: str, held: bool, dtype: str, slope: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nifti, "_SLAB_BYTES", 200)
    voxels = np.random.default_rng(0).normal(40, 30, (7, 6, 5)).astype(dtype)
    path = save(tmp_path / f"image{ending}", voxels, slope, 1.5)
    expected = read_volume(path)
    found = open_volume(path, None if held else tmp_path)
    assert (
        whole(found).dtype == expected.data.dtype == found.geometry.data.dtype == read_header(path).geometry.data.dtype
    )
    np.testing.assert_array_equal(whole(found), expected.data)
    np.testing.assert_array_equal(found.geometry.affine, expected.affine)
    assert found.geometry.form_codes == expected.form_codes
    assert read_header(path).itemsize == voxels.dtype.itemsize
    assert found.geometry.data.strides == (0, 0, 0)  # no memory
    canonical = expected.to_canonical().data
    box = (slice(1, 5), slice(2, 4), slice(0, 6))
    np.testing.assert_array_equal(found.read_canonical(box), canonical[box])
    assert canonical.shape != expected.shape


def test_png_and_2d(tmp_path: Path) -> None:
    picture = Volume.from_spacing(np.arange(12, dtype=np.uint8).reshape(3, 4), (1.0, 1.0))
    for ending in ("png", "nii.gz"):
        write_volume(tmp_path / f"a.{ending}", picture)
        found = open_volume(tmp_path / f"a.{ending}")
        np.testing.assert_array_equal(whole(found), picture.data)
        np.testing.assert_array_equal(found.read_canonical((slice(1, 2), slice(0, 3))), picture.data[1:2, :3])
    assert read_header(tmp_path / "a.png").whole


def outcome(call: Callable[[Path], Any], path: Path) -> Any:
    """What a reader gives for a file, or the message with which it refuses."""
    try:
        return call(path)
    except InputError as error:
        return str(error)


def message(call: object, *given: object) -> str:
    with pytest.raises(InputError) as found:
        call(*given)  # type: ignore[operator]
    return str(found.value)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_faults_have_the_same_message(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nifti, "_SLAB_BYTES", 100)
    voxels = np.ones((6, 5, 4), np.float32)
    voxels[2, 1, 3], voxels[4, 0, 0] = np.nan, -np.inf
    bad = [save(tmp_path / f"nan{ending}", voxels), save(tmp_path / f"big{ending}", np.full((2, 3, 4), 1e39))]
    fine = save(tmp_path / f"fine{ending}", np.arange(24000, dtype=np.int32).reshape(20, 30, 40))
    (tmp_path / f"cut{ending}").write_bytes(fine.read_bytes()[:-2000])
    (tmp_path / f"empty{ending}").write_bytes(b"")
    (tmp_path / f"text{ending}").write_bytes(gzip.compress(b"words" * 200) if ending == ".nii.gz" else b"words" * 200)
    (tmp_path / f"folder{ending}").mkdir()
    bad += [tmp_path / f"{name}{ending}" for name in ("cut", "empty", "text", "folder", "missing")]
    for path in bad:
        for folder in (None, tmp_path):
            assert message(open_volume, path, folder) == message(read_volume, path)
    assert "2 voxels are NaN" in message(open_volume, bad[0])
    assert "(2, 1, 3)" in message(open_volume, bad[0])


def test_a_damaged_checksum_is_found(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", np.arange(2400, dtype=np.int16).reshape(10, 12, 20))
    content = bytearray(path.read_bytes())
    content[-8] ^= 255
    path.write_bytes(content)
    assert message(open_volume, path) == message(read_volume, path)


@pytest.mark.skipif(not BAD.is_dir(), reason="../shared/data/badinput is not here")
def test_files_that_break_readers_are_treated_alike(tmp_path: Path) -> None:
    paths = [path for path in sorted(BAD.rglob("*.nii*")) if path.is_file() and path.stat().st_size < 2_000_000]
    refused = 0
    for path in paths:
        found = [outcome(call, path) for call in (read_volume, lambda path: open_volume(path, tmp_path))]
        if isinstance(found[0], Volume):
            np.testing.assert_array_equal(whole(found[1]), found[0].data)
        else:
            assert found[0] == found[1]
            refused += 1
    assert refused
    assert refused < len(paths)
