"""The formats that SimpleITK, tifffile and Pillow read: voxels, place and channels against those libraries alone."""

from __future__ import annotations

import json
import locale
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import tifffile
from PIL import Image

from lightm.errors import InputError
from lightm.images import itk
from lightm.images.io import channel_paths, read_volume, voxel_bytes, write_volume
from lightm.images.volume import Volume, geometry_difference

SOLID = (".nrrd", ".nhdr", ".mha", ".mhd", ".hdr")


def turned(data: np.ndarray) -> Volume:
    turn = np.deg2rad(20)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, -1]])
    affine[:3, :3] *= (0.7, 0.8, 2.5)
    affine[:3, 3] = (-12.25, 30.5, 100)
    return Volume(data, (2.5, 0.8, 0.7), affine)


@pytest.mark.parametrize("suffix", SOLID)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32, np.float64])
def test_what_is_written_is_where_itk_finds_it_and_comes_back(tmp_path: Path, suffix: str, dtype: type) -> None:
    volume = turned((np.random.default_rng(0).random((3, 4, 5)) * 100).astype(dtype))
    path = tmp_path / f"scan{suffix}"
    write_volume(path, volume)
    image = SimpleITK.ReadImage(str(path))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image), volume.data)
    for index in ((0, 0, 0), (4, 3, 2), (1, 2, 0)):
        lps = np.array(image.TransformIndexToPhysicalPoint(index))
        np.testing.assert_allclose(lps * (-1, -1, 1), (volume.affine @ [*index, 1])[:3], atol=1e-3)
    back = read_volume(path)
    assert back.data.dtype == dtype
    np.testing.assert_array_equal(back.data, volume.data)
    assert geometry_difference(back, volume) is None
    assert voxel_bytes(path) == volume.data.nbytes
    path = tmp_path / f"scan{suffix.upper()}"  # ITK looks at the case of an ending
    write_volume(path, volume)
    np.testing.assert_array_equal(read_volume(path).data, volume.data)


def test_vtk_keeps_spacing_and_origin_of_axes_along_its_own(tmp_path: Path) -> None:
    affine = np.diag([-0.7, -0.8, 2.5, 1.0])
    affine[:3, 3] = (9, 8, -7)
    volume = Volume(np.arange(60, dtype=np.int16).reshape(3, 4, 5), (2.5, 0.8, 0.7), affine)
    before = locale.setlocale(locale.LC_ALL)
    write_volume(tmp_path / "scan.vtk", volume)
    assert locale.setlocale(locale.LC_ALL) == before  # ITK sets it to "C", and `open` would then read ASCII
    assert geometry_difference(read_volume(tmp_path / "scan.vtk"), volume) is None


@pytest.mark.parametrize("suffix", [*SOLID, ".vtk", ".nii", ".nii.gz", ".tif", ".bmp", ".jpg", ".png"])
def test_a_file_that_ends_too_early_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    """ITK fills the missing voxels of a pair or a VTK file with zeros, tifffile leaves out the slices that it lacks."""
    data = np.random.default_rng(0).integers(0, 1000, (13, 24, 25)).astype(np.int16)
    before = locale.setlocale(locale.LC_ALL)
    picture = suffix in (".bmp", ".jpg", ".png")
    with itk._itk(suffix, "not written"):
        SimpleITK.WriteImage(
            SimpleITK.GetImageFromArray(data[0].astype(np.uint8) if picture else data), str(tmp_path / f"scan{suffix}")
        )
    assert read_volume(tmp_path / f"scan{suffix}").data.shape == (data.shape[1:] if picture else data.shape)
    voxels = next(
        (file for file in itk.companions(tmp_path / f"scan{suffix}") if file.is_file()), tmp_path / f"scan{suffix}"
    )
    voxels.write_bytes(voxels.read_bytes()[:-300])
    with pytest.raises(InputError, match=rf"scan\{suffix}.*again"):
        read_volume(tmp_path / f"scan{suffix}")
    assert locale.setlocale(locale.LC_ALL) == before


def test_vtk_in_text(tmp_path: Path) -> None:
    head = (
        "# vtk DataFile Version 3.0\nmade by hand\nASCII\nDATASET STRUCTURED_POINTS\nDIMENSIONS 3 2 1\n"
        "SPACING 1 1 1\nORIGIN 0 0 0\nPOINT_DATA 6\nSCALARS scalars float 1\nLOOKUP_TABLE default\n"
    )
    path = tmp_path / "scan.vtk"
    path.write_text(head + "1 2 3\n-4 .5 6e0\nMETADATA\n")
    np.testing.assert_array_equal(read_volume(path).data.ravel(), [1, 2, 3, -4, 0.5, 6])
    for voxels in ("1 2 3\n4 5\n", "1 2 x 4 5 6\n", ""):
        path.write_text(head + voxels)
        with pytest.raises(InputError, match=r"scan\.vtk.*again"):
            read_volume(path)


@pytest.mark.parametrize("way", ["components", "fourth axis"])
@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mhd"])
def test_channels_of_one_file(tmp_path: Path, suffix: str, way: str) -> None:
    data = np.random.default_rng(0).random((2, 3, 4, 5)).astype(np.float32)  # (C, Z, Y, X)
    if way == "components":
        image = SimpleITK.GetImageFromArray(np.moveaxis(data, 0, -1), isVector=True)
    else:
        image = SimpleITK.GetImageFromArray(data, isVector=False)
    path = tmp_path / f"scan{suffix}"
    SimpleITK.WriteImage(image, str(path))
    assert [channel.name for channel in channel_paths(path)] == [f"{path.name}::0", f"{path.name}::1"]
    for channel, expected in zip(channel_paths(path), data, strict=True):
        np.testing.assert_array_equal(read_volume(channel).data, expected)
    with pytest.raises(InputError, match=f"{path.name}: it holds 2 channels"):
        read_volume(path)
    with pytest.raises(InputError, match="no channel 2"):
        read_volume(f"{path}::2")


@pytest.mark.parametrize("place", ["../secret.raw", "/etc/hostname", "LIST", "there.raw"])
def test_voxels_outside_of_the_folder_are_not_read(tmp_path: Path, place: str) -> None:
    (tmp_path / "secret.raw").write_bytes(bytes(120))
    folder = tmp_path / "in"
    folder.mkdir()
    write_volume(folder / "scan.mhd", turned(np.zeros((3, 4, 5), np.int16)))
    text = (folder / "scan.mhd").read_bytes().replace(b"scan.zraw", place.encode())
    (folder / "scan.mhd").write_bytes(text)
    with pytest.raises(InputError, match=r"only a file beside it|are missing"):
        read_volume(folder / "scan.mhd")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"NDims = 3", b"NDims = 99999999"),  # ends the process in ITK
        (b"DimSize = 5 4 3", b"DimSize = 5 4 99999999"),
        (b"DimSize = 5 4 3", b"DimSize = 99999 99999 99999"),
        (b"DimSize = 5 4 3", b"DimSize = 5 4 -3"),
        (b"DimSize = 5 4 3", b"DimSize = 5 4"),
        (b"ElementSpacing = 0.6", b"ElementSpacing = 1e9"),
        (b"ElementType = MET_SHORT", b"ElementType = MET_STRING"),
    ],
)
def test_a_header_that_asks_too_much_is_refused_by_name(tmp_path: Path, old: bytes, new: bytes) -> None:
    affine = np.diag([0.7, 0.8, 2.5, 1.0])
    write_volume(tmp_path / "scan.mha", Volume(np.zeros((3, 4, 5), np.int16), (2.5, 0.8, 0.7), affine))
    content = (tmp_path / "scan.mha").read_bytes()
    assert old in content
    (tmp_path / "scan.mha").write_bytes(content.replace(old, new))
    with pytest.raises(InputError, match=r"scan\.mha: ") as raised:
        read_volume(tmp_path / "scan.mha")
    assert str(raised.value).count("scan.mha") == 1


def test_a_header_without_its_voxels_is_refused_by_name(tmp_path: Path) -> None:
    for suffix in (".mhd", ".hdr", ".nhdr"):
        write_volume(tmp_path / f"scan{suffix}", turned(np.zeros((3, 4, 5), np.int16)))
        for file in itk.companions(tmp_path / f"scan{suffix}"):
            file.unlink(missing_ok=True)
        with pytest.raises(InputError, match="must lie beside it"):
            read_volume(tmp_path / f"scan{suffix}")


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_colour_is_three_channels_or_grey(tmp_path: Path, suffix: str) -> None:
    colour = np.random.default_rng(0).integers(0, 255, (5, 6, 3)).astype(np.uint8)
    path = tmp_path / f"picture{suffix}"
    Image.fromarray(colour).save(path)
    assert len(channel_paths(path)) == 3
    for number, channel in enumerate(channel_paths(path)):
        np.testing.assert_array_equal(read_volume(channel).data, colour[..., number])
    np.testing.assert_array_equal(read_volume(path).data, np.rint(colour @ np.array([0.299, 0.587, 0.114])))
    with pytest.raises(InputError, match="label map in colour"):
        read_volume(path, kind="label")
    alpha = np.dstack([colour, np.full((5, 6), 100, np.uint8)])
    if suffix != ".bmp":
        Image.fromarray(alpha).save(path)
        assert len(channel_paths(path)) == 3
        np.testing.assert_array_equal(read_volume(f"{path}::2").data, colour[..., 2])


def test_jpeg_is_an_image_and_never_a_label_map(tmp_path: Path) -> None:
    grey = (np.arange(64 * 64).reshape(64, 64) // 32).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.JPG", quality=95)
    assert np.abs(read_volume(tmp_path / "a.JPG").data.astype(int) - grey).max() <= 3
    with pytest.raises(InputError, match="JPEG changes values"):
        read_volume(tmp_path / "a.JPG", kind="label")


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_tiff_stacks_of_any_compression(tmp_path: Path, compression: str, dtype: type) -> None:
    data = (np.random.default_rng(0).random((4, 5, 6)) * 200).astype(dtype)
    pages = [Image.fromarray(page) for page in data]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:], compression=compression)
    volume = read_volume(tmp_path / "a.tif")
    assert volume.data.dtype == dtype
    np.testing.assert_array_equal(volume.data, data)
    assert volume.spacing_mm == (1.0, 1.0, 1.0)


def test_spacing_of_tiff_stacks(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 200, (4, 5, 6)).astype(np.uint8)
    volume = Volume.from_spacing(data, (3.0, 0.5, 0.25))
    write_volume(tmp_path / "own.tiff", volume)
    assert geometry_difference(read_volume(tmp_path / "own.tiff"), volume) is None
    with tifffile.TiffFile(tmp_path / "own.tiff") as file:
        assert file.imagej_metadata["spacing"] == 3.0
    micrometres = {"axes": "ZYX", "unit": "um", "spacing": 2.0}
    tifffile.imwrite(
        tmp_path / "um.tif", data, imagej=True, photometric="minisblack", metadata=micrometres, resolution=(2, 4)
    )
    np.testing.assert_allclose(read_volume(tmp_path / "um.tif").spacing_mm, (2e-3, 0.25e-3, 0.5e-3), rtol=1e-6)
    tifffile.imwrite(tmp_path / "case_0000.tif", data, photometric="minisblack")
    (tmp_path / "case.json").write_text(json.dumps({"spacing": [5, 2, 1]}), encoding="utf-8")
    assert read_volume(tmp_path / "case_0000.tif").spacing_mm == (5.0, 2.0, 1.0)
    (tmp_path / "case.json").write_text(json.dumps({"spacing": [5, 2]}), encoding="utf-8")
    with pytest.raises(InputError, match=r"case_0000\.tif: case\.json beside it"):
        read_volume(tmp_path / "case_0000.tif")


def test_a_compressed_metaimage_that_ends_early_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    path = tmp_path / "torn.mha"
    image = SimpleITK.GetImageFromArray(np.arange(60, dtype=np.int16).reshape(3, 4, 5))
    SimpleITK.WriteImage(image, str(path), useCompression=True)
    np.testing.assert_array_equal(read_volume(path).data, np.arange(60).reshape(3, 4, 5))
    content = path.read_bytes()
    start = content.index(b"LOCAL\n") + 6
    for torn in (
        content[:-20],
        content[:start] + b"x 0 0 0 1" + content[start + 9 :],
        content[:start] + content[start:][:3],
    ):
        path.write_bytes(torn)
        with pytest.raises(InputError, match=r"torn\.mha"):
            read_volume(path)
