from __future__ import annotations

import gzip
import os
import shutil
import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from lightm.errors import InputError, LightMError
from lightm.images.io import channel_paths, place_remarks, read_volume, voxel_bytes, write_volume
from lightm.images.lazy import open_volume
from lightm.images.volume import Volume


def oblique(data: np.ndarray, codes: tuple[int, int] = (1, 1)) -> Volume:
    turn = np.deg2rad(25)
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, -1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([0.7, 0.8, 2.5])
    affine[:3, 3] = (-12.25, 30.5, 1e3)
    # Headers hold float32: what such a header gives back exactly.
    return Volume(data, (2.5, 0.8, 0.7), affine.astype(np.float32), codes)


def save(path: Path, array: np.ndarray, **header: object) -> Path:
    """Write with nibabel alone, array axes as in the file."""
    image = nibabel.Nifti1Image(array, np.eye(4), dtype=array.dtype)
    for key, value in header.items():
        image.header[key] = value
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint16, np.float32, np.float64])
def test_nifti_round_trip_keeps_voxels_affine_codes_and_units(tmp_path, name, dtype):
    data = (np.random.default_rng(0).random((3, 4, 5)) * 100).astype(dtype)
    volume = oblique(data, (2, 1))
    write_volume(tmp_path / name, volume)
    back = read_volume(tmp_path / name)
    assert back.data.dtype == dtype
    np.testing.assert_array_equal(back.data, data)
    np.testing.assert_array_equal(back.affine, volume.affine)
    assert back.form_codes == (2, 1)
    header = nibabel.load(tmp_path / name).header
    assert header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(header.get_zooms(), (0.7, 0.8, 2.5), rtol=1e-6)


def test_axes_are_the_reverse_of_the_files(tmp_path):
    array = np.arange(24, dtype=np.int16).reshape(4, 3, 2)
    volume = read_volume(save(tmp_path / "a.nii.gz", array))
    assert volume.shape == (2, 3, 4)
    np.testing.assert_array_equal(volume.data, array.T)


@pytest.mark.parametrize("codes", [(0, 1), (1, 0), (4, 2)])
def test_codes_of_the_file_go_back_as_they_came(tmp_path, codes):
    volume = oblique(np.ones((3, 4, 5), np.uint8), codes)
    write_volume(tmp_path / "a.nii", volume)
    back = read_volume(tmp_path / "a.nii")
    assert back.form_codes == codes
    np.testing.assert_allclose(back.affine, volume.affine, atol=1e-4)


def test_a_file_without_codes_goes_back_without(tmp_path):
    image = nibabel.Nifti1Image(np.ones((3, 4, 5), np.uint8), None)
    image.header.set_zooms((0.5, 0.6, 0.7))
    nibabel.save(image, tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    assert volume.form_codes == (0, 0)
    write_volume(tmp_path / "b.nii", volume)
    back = read_volume(tmp_path / "b.nii")
    assert back.form_codes == (0, 0)
    np.testing.assert_array_equal(back.affine, volume.affine)


def test_codes_that_cannot_hold_the_affine_give_way(tmp_path):
    volume = oblique(np.ones((3, 4, 5), np.uint8), (0, 0))
    write_volume(tmp_path / "a.nii", volume)
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii").affine, volume.affine)


def test_equal_volumes_give_equal_bytes(tmp_path):
    volume = oblique(np.arange(60, dtype=np.int16).reshape(3, 4, 5))
    write_volume(tmp_path / "a.nii.gz", volume)
    write_volume(tmp_path / "b.nii.gz", volume)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_scaled_voxels_come_as_float32(tmp_path):
    image = nibabel.Nifti1Image(np.array([[[0, 1], [2, 3]]], np.int16), np.eye(4))
    image.header.set_slope_inter(0.5, -1)
    path = tmp_path / "a.nii"
    raw = bytearray(image.to_bytes())
    raw[112:120] = struct.pack("<ff", 0.5, -1)
    path.write_bytes(raw)
    stored = np.asarray(nibabel.load(path).dataobj)
    volume = read_volume(path)
    assert volume.data.dtype == np.float32
    np.testing.assert_allclose(volume.data, stored.T)
    assert not np.array_equal(stored, stored.round())


def test_big_endian_voxels_come_in_the_machines_order(tmp_path):
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    image = nibabel.Nifti1Image(np.arange(8, dtype=np.int16).reshape(2, 2, 2), np.eye(4), header)
    nibabel.save(image, tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    assert volume.data.dtype.isnative
    assert volume.data.sum() == 28


@pytest.mark.parametrize(("values", "dtype"), [((0, 255), np.uint8), ((0, 256), np.int16), ((-1, 3), np.int16)])
def test_labels_take_the_smallest_type(tmp_path, values, dtype):
    data = np.array(values, np.int64).reshape(1, 1, 2)
    write_volume(tmp_path / "a.nii.gz", Volume.from_spacing(data, (1, 1, 1)))
    back = read_volume(tmp_path / "a.nii.gz", kind="label")
    assert back.data.dtype == dtype
    assert nibabel.load(tmp_path / "a.nii.gz").get_data_dtype() == dtype
    np.testing.assert_array_equal(back.data, data)


def test_labels_next_to_whole_numbers_are_rounded(tmp_path):
    path = save(tmp_path / "a.nii", np.array([[[0.99999997, 2.0004, 0.0]]], np.float64))
    np.testing.assert_array_equal(read_volume(path, kind="label").data.ravel(), [1, 2, 0])
    path = save(tmp_path / "b.nii", np.array([[[0.5, 1, 0]]], np.float32))
    with pytest.raises(InputError, match=r"b\.nii: a label map holds whole numbers, found 0\.5"):
        read_volume(path, kind="label")
    path = save(tmp_path / "c.nii", np.array([[[0, 40000]]], np.int32))
    with pytest.raises(InputError, match=r"c\.nii: label values from 0 to 40000"):
        read_volume(path, kind="label")


def faulty_files(folder: Path) -> dict[str, tuple[Path, str]]:
    good = save(folder / "good.nii.gz", np.random.default_rng(0).random((9, 9, 9)).astype(np.float32)).read_bytes()
    plain = gzip.decompress(good)

    def file(name: str, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    def header(name: str, at: int, content: bytes) -> Path:
        return file(name, gzip.compress(plain[:at] + content + plain[at + len(content) :]))

    nan = np.zeros((3, 3, 3), np.float32)
    nan[2, 1, 0] = np.nan
    torn = bytearray(good)
    torn[len(torn) // 2] ^= 0x55
    return {
        "missing": (folder / "missing.nii.gz", "cannot be opened"),
        "folder": (folder.parent / folder.name / "x.nii", "a folder"),
        "suffix": (file("a.xyz", b"x"), "not a format"),
        "empty": (file("empty.nii.gz", b""), "0 bytes"),
        "truncated": (file("cut.nii.gz", good[: len(good) // 2]), "truncated"),
        "cut in the checksum": (file("tail.nii.gz", good[:-3]), "truncated"),
        "flipped bit": (file("torn.nii.gz", bytes(torn)), "not a readable NIfTI"),
        "truncated plain": (file("cut.nii", plain[:1000]), "truncated"),
        "text": (file("text.nii", b"hello " * 200), "no NIfTI header"),
        "short": (file("short.nii", b"ab"), "no NIfTI header"),
        "magic": (header("magic.nii.gz", 344, b"n+9\0"), "wrong magic"),
        "pair": (header("pair.nii.gz", 344, b"ni1\0"), "wrong magic"),
        "huge": (header("huge.nii.gz", 40, struct.pack("<4h", 3, 32767, 32767, 32767)), "at most 2147483648"),
        "too long": (header("long.nii.gz", 40, struct.pack("<4h", 3, 900, 900, 900)), "promises"),
        "negative": (header("neg.nii.gz", 40, struct.pack("<4h", 3, -9, 9, 9)), "neg.nii.gz"),
        "dims": (header("dims.nii.gz", 40, struct.pack("<h", 77)), "dims.nii.gz"),
        "datatype": (header("type.nii.gz", 70, struct.pack("<h", 12345)), "type.nii.gz"),
        "offset": (header("offset.nii.gz", 108, struct.pack("<f", 1e30)), "offset.nii.gz"),
        "affine": (header("affine.nii.gz", 280, struct.pack("<4f", 0, 0, 0, 0)), "affine"),
        "nan": (
            save(folder / "nan.nii.gz", nan),
            r"1 voxels are NaN or infinite, the first at \(z, y, x\) = \(0, 1, 2\)",
        ),
        "inf": (save(folder / "inf.nii", np.full((2, 2, 2), -np.inf, np.float32)), "8 voxels"),
        "beyond float32": (save(folder / "big.nii", np.full((2, 2, 2), 1e200)), "infinite"),
        "4D": (save(folder / "time.nii.gz", np.zeros((3, 3, 3, 2), np.uint8)), "time point"),
        "complex": (save(folder / "complex.nii", np.zeros((3, 3, 3), np.complex64)), "real numbers"),
    }


FAULTS = [
    "missing", "folder", "suffix", "empty", "truncated", "cut in the checksum", "flipped bit",
    "truncated plain", "text", "short", "magic", "pair", "huge", "too long", "negative", "dims", "datatype",
    "offset", "affine", "nan", "inf", "beyond float32", "4D", "complex",
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_a_nifti_is_one_error_that_names_the_file(tmp_path, fault):
    (tmp_path / "x.nii").mkdir()
    path, message = faulty_files(tmp_path)[fault]
    with pytest.raises(InputError, match=message) as raised:
        read_volume(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert str(raised.value).count(str(path)) == 1


def test_no_fault_is_left_out(tmp_path):
    assert set(faulty_files(tmp_path)) == set(FAULTS)


def test_an_axis_of_one_behind_three_is_dropped(tmp_path):
    path = save(tmp_path / "a.nii.gz", np.arange(24, dtype=np.uint8).reshape(2, 3, 4, 1))
    assert read_volume(path).shape == (4, 3, 2)


def test_every_odd_real_file_reads_or_gives_one_input_error(shared):
    read, refused, unnamed = set(), set(), []
    for folder in ("nifti_odd_real", "nibabel", "nifti-rs", "orphans"):
        for path in sorted((shared / "data" / "badinput" / folder).rglob("*")):
            if not path.is_file():
                continue
            for kind in ("image", "label"):
                try:
                    volume = read_volume(path, kind=kind)
                except InputError as error:
                    refused.add((path.name, kind))
                    unnamed += [] if str(error).startswith(f"{path}: ") else [str(error)]
                else:
                    assert np.isfinite(volume.data).all()
                    read.add((path.name, kind))
    assert not unnamed
    assert ("mask_float64_0.99999997.nii.gz", "label") in read
    assert ("label_int64.nii.gz", "label") in read
    assert {("has_nan.nii.gz", "image"), ("dmri_4d.nii.gz", "image"), ("crash-1.nii", "image")} <= refused


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_round_trip(tmp_path, dtype):
    data = np.arange(12, dtype=dtype).reshape(3, 4) * (20 if dtype == np.uint8 else 5000)
    write_volume(tmp_path / "a.png", Volume.from_spacing(data, (1, 1)))
    back = read_volume(tmp_path / "a.png")
    assert back.data.dtype == dtype
    assert back.spacing_mm == (1.0, 1.0)
    np.testing.assert_array_equal(back.data, data)


def test_png_labels_hold_the_values_themselves(tmp_path):
    label = np.array([[0, 1], [2, 3]], np.int64)
    write_volume(tmp_path / "a.png", Volume.from_spacing(label, (1, 1)), kind="label")
    picture = Image.open(tmp_path / "a.png")
    assert picture.mode == "L"
    np.testing.assert_array_equal(np.array(picture), label)


def test_pictures_of_other_modes(tmp_path):
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    Image.fromarray(np.stack([grey] * 3, -1)).save(tmp_path / "rgb.png")
    np.testing.assert_array_equal(read_volume(tmp_path / "rgb.png").data, grey)
    Image.fromarray(np.stack([grey] * 3 + [grey * 0 + 255], -1)).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(read_volume(tmp_path / "rgba.png").data, grey)
    palette = Image.fromarray(grey).convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255] + [0] * 759)
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_volume(tmp_path / "palette.png", kind="label").data, np.array(palette))
    Image.fromarray(grey > 2).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read_volume(tmp_path / "bits.png", kind="label").data, grey > 2)


def test_faulty_pictures_are_refused(tmp_path):
    colour = np.zeros((2, 2, 3), np.uint8)
    colour[0, 0, 0] = 9
    Image.fromarray(colour).save(tmp_path / "really.jpg")
    (tmp_path / "jpeg.png").write_bytes((tmp_path / "really.jpg").read_bytes())
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50)).astype(np.uint8)).save(tmp_path / "good.png")
    good = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(good[:900])
    (tmp_path / "bomb.png").write_bytes(good[:16] + struct.pack(">II", 60000, 60000) + good[24:])
    Image.fromarray(colour).save(tmp_path / "moving.png", save_all=True, append_images=[Image.fromarray(colour + 1)])
    for name, message in [
        ("jpeg", "no PNG header"),
        ("cut", "not a readable PNG"),
        ("bomb", "60000 x 60000 pixels"),
        ("moving", "animation"),
    ]:
        with pytest.raises(InputError, match=message) as raised:
            read_volume(tmp_path / f"{name}.png")
        assert str(raised.value).startswith(str(tmp_path / f"{name}.png"))


def test_what_a_format_cannot_hold_is_refused_and_nothing_is_written(tmp_path):
    flat, solid = np.zeros((2, 2)), np.zeros((2, 2, 2))
    for name, volume, message in [
        ("a.png", Volume.from_spacing(solid, (1, 1, 1)), "PNG holds 2D"),
        ("a.png", Volume.from_spacing(flat, (1, 1)), "whole numbers"),
        ("a.png", Volume.from_spacing(flat.astype(np.int16) - 1, (1, 1)), "0 to 255"),
        ("a.jpg", Volume.from_spacing(flat.astype(np.uint8), (1, 1)), "JPEG changes values"),
        ("a.xyz", Volume.from_spacing(flat, (1, 1)), "not a format"),
        ("a.vtk", oblique(solid.astype(np.uint8)), "no directions"),
        ("a.tif", oblique(solid.astype(np.uint8)), "no directions"),
        ("a.nii.gz", Volume.from_spacing(solid * np.nan, (1, 1, 1)), "NaN"),
    ]:
        with pytest.raises(InputError, match=message):
            write_volume(tmp_path / name, volume)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.nii.gz"
    old = oblique(np.zeros((2, 2, 2), np.uint8))
    write_volume(path, old)

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(LightMError, match=r"a\.nii\.gz: cannot be written \(No space left"):
        write_volume(path, old.with_data(old.data + 1))
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["a.nii.gz"]
    assert read_volume(path).data.sum() == 0


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.png"])
def test_random_damage_never_gives_another_error(tmp_path, name):
    rng = np.random.default_rng(0)
    if name.endswith(".png"):
        Image.fromarray(rng.integers(0, 255, (9, 9)).astype(np.uint8)).save(tmp_path / name)
    else:
        save(tmp_path / name, rng.random((5, 4, 3)).astype(np.float32))
    packed = (tmp_path / name).read_bytes()
    plain = gzip.decompress(packed) if name.endswith(".gz") else packed
    refused = 0
    for _ in range(300):
        damaged = bytearray(plain)
        for at in rng.integers(0, min(352, len(plain)), rng.integers(1, 6)):
            damaged[at] = rng.integers(256)
        content = gzip.compress(damaged, 1) if name.endswith(".gz") else bytes(damaged)
        (tmp_path / name).write_bytes(content)
        try:
            read_volume(tmp_path / name, kind="label" if rng.random() < 0.5 else "image")
        except InputError:
            refused += 1
    assert refused > 30


def raw(folder: Path, array: np.ndarray, at: dict[int, tuple[str, tuple[float, ...]]]) -> Path:
    """A file of nibabel's with numbers put at some bytes of its header."""
    path = save(folder / "odd.nii", array)
    content = bytearray(path.read_bytes())
    for place, (form, values) in at.items():
        struct.pack_into("<" + form, content, place, *values)
    path.write_bytes(content)
    return path


NUMBERS = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float64]


@pytest.mark.parametrize("dtype", NUMBERS)
def test_every_type_of_real_numbers_is_read_as_stored(tmp_path, dtype):
    array = np.arange(24).reshape(4, 3, 2).astype(dtype)
    for order in "<>":
        header = nibabel.Nifti1Header(endianness=order)
        header.set_data_dtype(dtype)
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4), header, dtype=dtype), tmp_path / "a.nii.gz")
        volume = read_volume(tmp_path / "a.nii.gz")
        assert volume.data.dtype == dtype
        np.testing.assert_array_equal(volume.data, array.T)
        assert read_volume(tmp_path / "a.nii.gz", kind="label").data.dtype == np.uint8


def test_axes_of_length_one_behind_the_third_are_dropped_and_one_of_several_holds_channels(tmp_path):
    one = save(tmp_path / "one.nii", np.ones((4, 3, 2, 1, 1), np.uint8))
    assert read_volume(one).shape == (2, 3, 4)
    assert read_volume(save(tmp_path / "flat.nii", np.ones((4, 3), np.uint8))).shape == (3, 4)
    assert read_volume(save(tmp_path / "slice.nii", np.ones((4, 3, 1), np.uint8))).shape == (1, 3, 4)
    for shape in ((4, 3, 2, 5), (4, 3, 1, 5), (4, 3, 2, 1, 5)):
        data = np.random.default_rng(0).random(shape).astype(np.float32)
        for name in ("more.nii", "more.nii.gz"):
            path = save(tmp_path / name, data)
            assert len(channel_paths(path)) == 5
            for number, channel in enumerate(channel_paths(path)):
                expected = data.reshape(*shape[:3], 5)[..., number].T
                np.testing.assert_array_equal(read_volume(channel).data, expected)
                box = (slice(0, 1), slice(1, 3), slice(0, 2))
                for folder in (None, tmp_path):
                    np.testing.assert_array_equal(open_volume(channel, folder).read(box), expected[box])
            with pytest.raises(InputError, match=r"5 volumes of shape \(4, 3, "):
                read_volume(path)
            with pytest.raises(InputError, match="no channel 5"):
                read_volume(f"{path}::5")
    for shape in ((4, 3, 2, 2, 3), (4,)):
        with pytest.raises(InputError, match="one scan of two or three axes"):
            read_volume(save(tmp_path / "more.nii", np.ones(shape, np.uint8)))


def test_gzip_is_told_by_content(tmp_path):
    plain = save(tmp_path / "a.nii", np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    shutil.copy(plain, tmp_path / "plain.nii.gz")
    (tmp_path / "packed.nii").write_bytes(gzip.compress(plain.read_bytes()))
    for name in ("plain.nii.gz", "packed.nii"):
        np.testing.assert_array_equal(read_volume(tmp_path / name).data, read_volume(plain).data)
        box = (slice(1, 3), slice(0, 2), slice(1, 2))
        found = open_volume(tmp_path / name, tmp_path).read(box)
        np.testing.assert_array_equal(found, read_volume(plain).data[box])


def _with_forms(path, sform=None, qform=None):
    """A file of 2 x 3 x 4 voxels whose header says these, as NIfTI-1 stores them."""
    image = nibabel.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.diag([2, 3, 4, 1.0]))
    image.header["sform_code"], image.header["qform_code"] = int(sform is not None), int(qform is not None)
    if sform is not None:
        for row, values in zip("xyz", sform, strict=True):
            image.header[f"srow_{row}"] = values
    if qform is not None:
        for name, value in zip(("b", "c", "d"), qform, strict=True):
            image.header[f"quatern_{name}"] = value
        image.header["qoffset_x"] = 7
    content = image.header.binaryblock + bytes(4) + np.asarray(image.dataobj).tobytes(order="F")
    path.write_bytes(content)
    return path


def test_a_broken_sform_gives_way_to_a_valid_qform_and_the_reverse(tmp_path):
    good = [[2, 0, 0, 5], [0, 3, 0, 6], [0, 0, 4, 7]]
    turned = np.diag([-2.0, -3.0, 4.0, 1.0])  # a half turn about z
    turned[0, 3] = 7
    for broken in (np.zeros((3, 4)), np.full((3, 4), np.nan), [[2, 0, 0, 0], [2, 0, 0, 0], [0, 0, 4, 0]]):
        volume = read_volume(_with_forms(tmp_path / "a.nii", broken, (0, 0, 1)))
        np.testing.assert_allclose(volume.affine, turned, atol=1e-6)
        assert any("not usable" in text for text, _ in place_remarks(tmp_path / "a.nii"))
    volume = read_volume(_with_forms(tmp_path / "a.nii", good, (3, 3, 3)))
    np.testing.assert_allclose(volume.affine[:3], good)
    with pytest.raises(InputError, match=r"a\.nii"):
        read_volume(_with_forms(tmp_path / "a.nii", np.zeros((3, 4)), (3, 3, 3)))
    for rounded in (1.0000004, 1.0002):  # single precision, and four digits
        volume = read_volume(_with_forms(tmp_path / "a.nii", None, (0, 0, rounded)))
        np.testing.assert_allclose(volume.affine, turned, atol=1e-3)


def test_both_forms_go_back_as_they_came(tmp_path):
    good = [[2, 0, 0, 5], [0, 3, 0, 6], [0, 0, 4, 7]]
    volume = read_volume(_with_forms(tmp_path / "a.nii", good, (0, 0, 1)))
    write_volume(tmp_path / "b.nii.gz", volume)
    for form in ("sform", "qform"):
        names = ("a.nii", "b.nii.gz")
        first, second = (getattr(nibabel.load(tmp_path / name).header, f"get_{form}")(True) for name in names)
        np.testing.assert_allclose(first[0], second[0], atol=1e-5)
        assert first[1] == second[1]


@pytest.mark.parametrize(
    ("at", "words"),
    [
        ({280: ("4f", (0, 0, 0, 0))}, "affine|spacing"),
        ({280: ("f", (float("nan"),))}, "spacing"),
        ({280: ("f", (float("inf"),))}, "finite|spacing"),
        ({280: ("f", (1e-9,))}, "voxels of 1e-09"),
        ({280: ("f", (2e3,))}, "voxels of 2000"),
        ({292: ("f", (1e7,))}, "1e[+]07 mm away"),
        ({280: ("8f", (1, 1, 0, 0, 0, 0, 0, 0))}, "point the same way"),
        ({112: ("2f", (2.0, float("inf")))}, "scale|slope|inf"),
        ({108: ("f", (float("nan"),))}, "start at byte nan"),
        ({108: ("f", (1e9,))}, "start at byte"),
        ({70: ("2h", (128, 24))}, "colour"),
        ({70: ("2h", (2304, 32))}, "colour"),
        ({70: ("2h", (32, 64))}, "real numbers, got complex64"),
        ({70: ("2h", (1, 1))}, "odd.nii"),
    ],
)
def test_headers_that_give_no_scan_are_refused(tmp_path, at, words):
    path = raw(tmp_path, np.ones((4, 3, 2), np.uint8), at)
    with pytest.raises(InputError, match=words) as raised:
        read_volume(path)
    assert str(raised.value).startswith(f"{path}: ")


def test_the_sform_goes_before_the_qform_and_a_check_says_where_they_disagree(tmp_path):
    image = nibabel.Nifti1Image(np.ones((4, 3, 2), np.uint8), np.diag([2.0, 2, 2, 1]))
    image.set_sform(np.diag([1.0, 1, 1, 1]), code=1)
    image.set_qform(np.diag([-1.0, 1, 1, 1]), code=1)
    nibabel.save(image, tmp_path / "two.nii")
    np.testing.assert_array_equal(read_volume(tmp_path / "two.nii").affine, np.eye(4))
    assert [text for text, _ in place_remarks(tmp_path / "two.nii")] == [
        "sform and qform place it up to 6 mm apart; the sform is used"
    ]
    image.set_sform(None, code=0)
    nibabel.save(image, tmp_path / "one.nii")
    assert read_volume(tmp_path / "one.nii").affine[0, 0] == -1
    assert place_remarks(tmp_path / "one.nii") == []
    image.set_qform(None, code=0)
    nibabel.save(image, tmp_path / "none.nii")
    assert "neither sform nor qform" in place_remarks(tmp_path / "none.nii")[0][0]
    image.set_qform(np.eye(4), code=1)
    image.header.set_xyzt_units("micron")
    nibabel.save(image, tmp_path / "small.nii")
    assert "the micron" in place_remarks(tmp_path / "small.nii")[0][0]


def test_memory_is_known_before_a_file_is_read(tmp_path):
    path = save(tmp_path / "a.nii.gz", np.ones((40, 30, 20), np.int16))
    assert voxel_bytes(path) == 40 * 30 * 20 * 2
    assert voxel_bytes(tmp_path / "none.nii") == 0
    path.write_bytes(b"x" * 400)
    assert voxel_bytes(path) == 0
