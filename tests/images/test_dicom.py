"""DICOM series as volumes: order, place, scale, and every fault said once with its cure."""

from __future__ import annotations

import builtins
import logging
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from lightm.errors import InputError
from lightm.images.dicom import TiltError, find_series, is_dicom, list_series, read_series, series_folders
from lightm.images.io import read_volume, write_volume
from lightm.images.volume import Volume, geometry_difference

from .dicom_made import ORIENTATION, ORIGIN, SERIES, SPACING, STEP, base, normal, stored_pixels, write_ct
from .dicom_made import write_enhanced_mr as write_mr

pytest.importorskip("pydicom")


def ct(folder: Path, change: Any = None, shape: tuple[int, int, int] = (5, 6, 7)) -> np.ndarray:
    pixels = stored_pixels(shape)
    write_ct(folder, pixels, change=change)
    return pixels


def test_slices_are_ordered_by_place_and_rescaled(tmp_path: Path) -> None:
    pixels = ct(tmp_path / "scan")
    volume = read_series(tmp_path / "scan")
    assert np.array_equal(volume.data, pixels.astype(np.int16) - 1024)
    assert volume.data.dtype == np.int16
    np.testing.assert_allclose(volume.spacing_mm, (STEP, *SPACING), rtol=1e-6)
    # Every voxel lies where the standard's equation (PS3.3 C.7.6.2.1.1) puts it, in LPS.
    for z, y, x in ((0, 0, 0), (4, 5, 6), (2, 1, 3)):
        place = ORIGIN + z * STEP * normal()
        place = place + np.array(ORIENTATION[:3]) * SPACING[1] * x + np.array(ORIENTATION[3:]) * SPACING[0] * y
        np.testing.assert_allclose(volume.affine @ [x, y, z, 1], [-place[0], -place[1], place[2], 1], atol=1e-5)


def test_agrees_with_a_nifti_of_the_same_scan(tmp_path: Path) -> None:
    """The NIfTI is stored as converters do, rows from front to back turned over, and read by nibabel and LightM."""
    pixels = ct(tmp_path / "scan")
    volume = read_series(tmp_path / "scan")
    flip = np.diag([1.0, -1.0, 1.0, 1.0])
    flip[1, 3] = pixels.shape[1] - 1
    stored = (pixels.astype(np.int16) - 1024)[:, ::-1].T
    nibabel.save(nibabel.Nifti1Image(stored, volume.affine @ flip), tmp_path / "scan.nii.gz")
    nifti = read_volume(tmp_path / "scan.nii.gz")
    assert geometry_difference(volume, nifti) is not None  # rows count the other way
    assert geometry_difference(volume.to_canonical(), nifti.to_canonical()) is None
    assert np.array_equal(volume.to_canonical().data, nifti.to_canonical().data)
    write_volume(tmp_path / "ours.nii.gz", volume)
    ours = nibabel.load(tmp_path / "ours.nii.gz")
    closest = nibabel.as_closest_canonical(ours), nibabel.as_closest_canonical(nibabel.load(tmp_path / "scan.nii.gz"))
    assert np.array_equal(*(np.asarray(image.dataobj) for image in closest))
    np.testing.assert_allclose(closest[0].affine, closest[1].affine, atol=1e-4)


def test_scales_and_types(tmp_path: Path) -> None:
    pixels = stored_pixels()
    write_ct(tmp_path / "half", pixels, slope=0.5, intercept=-10)
    half = read_series(tmp_path / "half")
    assert half.data.dtype == np.float32
    np.testing.assert_array_equal(half.data, pixels * np.float32(0.5) - 10)
    write_ct(tmp_path / "wide", pixels, slope=100)
    assert read_series(tmp_path / "wide").data.dtype == np.int32


def test_enhanced_multi_frame(tmp_path: Path) -> None:
    pixels = stored_pixels()
    write_mr(tmp_path / "mr", pixels, [3, 0, 4, 1, 2])
    volume = read_volume(tmp_path / "mr")
    slopes = (np.arange(5) + 0.5)[:, None, None]
    np.testing.assert_allclose(volume.data, pixels * slopes - 3, rtol=1e-6)
    ct(tmp_path / "ct")
    assert geometry_difference(volume, read_series(tmp_path / "ct")) is None
    assert geometry_difference(volume, read_volume(tmp_path / "mr" / "enhanced.dcm")) is None


def test_one_slice_and_one_file(tmp_path: Path) -> None:
    files = write_ct(tmp_path / "scan", stored_pixels())
    volume = read_volume(files[2])
    assert volume.shape == (1, 6, 7)
    np.testing.assert_allclose(volume.spacing_mm, (STEP, *SPACING), rtol=1e-6)


def test_several_series_are_listed_and_chosen(tmp_path: Path) -> None:
    first, second = stored_pixels(seed=1), stored_pixels((3, 6, 7), seed=2)
    write_ct(tmp_path, first, prefix="a")
    write_ct(tmp_path, second, series=SERIES + "7", prefix="b")
    (tmp_path / "notes.txt").write_text("no DICOM")
    assert [series.uid for series in list_series(tmp_path)] == [SERIES, SERIES + "7"]
    with pytest.raises(InputError, match="2 series in one folder; choose one by FOLDER::SeriesInstanceUID") as caught:
        read_series(tmp_path)
    assert f"{SERIES}7  (CT, 3 file(s), 'made')" in str(caught.value)
    assert np.array_equal(read_volume(f"{tmp_path}::{SERIES}7").data, second.astype(np.int16) - 1024)
    with pytest.raises(InputError, match=r"no series '1\.2\.3' there"):
        read_volume(f"{tmp_path}::1.2.3")
    assert find_series(f"{tmp_path}::{SERIES}").source == Path(f"{tmp_path}::{SERIES}")


def test_equal_copies_are_taken_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pixels = ct(tmp_path)
    write_ct(tmp_path, pixels[1:3], prefix="copy", change=lambda z, data: move(data, z + 1))
    with caplog.at_level(logging.WARNING, "lightm.images"):
        volume = read_series(tmp_path)
    assert volume.shape == (5, 6, 7)
    assert "2 image(s) are there twice" in caplog.text


def move(data: Any, z: float, *, by: tuple[float, float, float] = (0, 0, 0)) -> None:
    data.ImagePositionPatient = [round(float(v), 6) for v in ORIGIN + z * STEP * normal() + np.array(by)]


def shift_last(z: int, data: Any) -> None:
    if z == 2:
        move(data, z, by=(3, 0, 0))


def drop(keyword: str, slice_: int = 3) -> Any:
    def change(z: int, data: Any) -> None:
        if z == slice_:
            delattr(data, keyword)

    return change


def assign(keyword: str, value: Any, slices: tuple[int, ...] = (3,)) -> Any:
    def change(z: int, data: Any) -> None:
        if z in slices:
            setattr(data, keyword, value)

    return change


def crop(z: int, data: Any) -> None:
    if z == 0:
        data.Rows, data.PixelData = 4, data.PixelData[: 4 * 7 * 2]


def no_pixels(z: int, data: Any) -> None:
    del data.PixelData


def truncate(z: int, data: Any) -> None:
    data.PixelData = data.PixelData[:20]


def compress(z: int, data: Any) -> None:
    from pydicom.encaps import encapsulate

    data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.70"
    data.PixelData = encapsulate([b"\xff\xd8 no image \xff\xd9"])
    data["PixelData"].is_undefined_length = True


def colour(z: int, data: Any) -> None:
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 3, "RGB", 0


FAULTS: dict[str, tuple[Any, str]] = {
    "gap": (lambda z, d: move(d, z + 2 * (z > 2)), r"about 2 slice\(s\) are missing between .*_2 and .*_3"),
    "uneven": (lambda z, d: move(d, z + 0.3 * (z == 2)), "the slices are spaced unevenly"),
    "tilt": (
        lambda z, d: move(d, z, by=(0.5 * z, 0, 0)),
        r"sheared by 11\.3 degrees \(gantry tilt\).*--correct-gantry-tilt",
    ),
    "shifted": (shift_last, "_2 is shifted in its plane by"),
    "other pixels": (lambda z, d: move(d, z - (z == 4)), "lie in the same plane with different pixels; they differ in"),
    "sizes": (crop, r"mixes images of 2 sizes \(rows, columns\):\n  4 of \(6, 7\)"),
    "scout": (assign("ImageOrientationPatient", [1, 0, 0, 0, 0, -1]), "mixes images of 2 directions.*such as a scout"),
    "spacings": (assign("PixelSpacing", [1, 1]), "mixes images of 2 pixel spacings"),
    "no position": (drop("ImagePositionPatient"), r"_3: ImagePositionPatient is missing, .* move the file out"),
    "no orientation": (drop("ImageOrientationPatient"), "ImageOrientationPatient is missing"),
    "no spacing": (drop("PixelSpacing"), "PixelSpacing is missing"),
    "zero spacing": (assign("PixelSpacing", [0, 1]), "PixelSpacing .* must be positive"),
    "skew": (assign("ImageOrientationPatient", [1, 0, 0, 0.5, 0.5, 0]), "no pair of perpendicular directions"),
    "no rows": (drop("Rows"), "Rows is missing"),
    "zero slope": (assign("RescaleSlope", 0), "RescaleSlope is 0"),
    "colour": (colour, r"a colour image \(RGB, 3 samples a pixel\); only grey"),
    "no pixels": (no_pixels, "no pixels in the file"),
    "truncated": (truncate, "cannot be decoded here .*truncated or damaged; export it again"),
    "compressed": (compress, r"JPEG Lossless.*cannot be decoded here .*pip install python-gdcm"),
    "huge": (lambda z, d: (setattr(d, "Rows", 65535), setattr(d, "Columns", 65535)), "at most 2147483648 voxels"),
    "class": (assign("SOPClassUID", "1.2.840.10008.5.1.4.1.1.7", (0, 1, 2, 3, 4)), "only 5 x Secondary Capture Image"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_said(fault: str, tmp_path: Path) -> None:
    change, message = FAULTS[fault]
    ct(tmp_path / "scan", change)
    with pytest.raises(InputError, match="(?s)" + message) as caught:
        read_volume(tmp_path / "scan")
    assert str(tmp_path / "scan") in str(caught.value)


def test_steps_that_drift(tmp_path: Path) -> None:
    """No step differs by a tenth, yet together they leave an even grid by more than a quarter step."""
    ct(tmp_path, lambda z, d: move(d, z * (1 + 0.01 * z)), (12, 6, 7))
    with pytest.raises(InputError, match=r"slices lie up to 0\.7\d* mm off an even grid of 2\.77\d* mm"):
        read_series(tmp_path)


def test_faults_of_multi_frame_files(tmp_path: Path) -> None:
    pixels = stored_pixels()
    write_mr(tmp_path / "a", pixels, [0, 1, 1, 2], change=lambda d: d.PerFrameFunctionalGroupsSequence.pop())
    with pytest.raises(InputError, match="4 frames, but 3 descriptions of their places"):
        read_series(tmp_path / "a")
    write_mr(tmp_path / "b", pixels, [0, 2, 4, 3])
    with pytest.raises(InputError, match=r"missing between enhanced\.dcm frame 1 and enhanced\.dcm frame 2"):
        read_series(tmp_path / "b")


def rewrite(folder: Path, *, syntax: str = "1.2.840.10008.1.2.1", meta: bool = False) -> None:
    """Save a folder's files in another transfer syntax and without preamble, with or without meta information."""
    import pydicom

    for file in folder.iterdir():
        data = pydicom.dcmread(file)
        data.file_meta.TransferSyntaxUID = syntax
        little, implicit = not syntax.endswith("2.2"), syntax.endswith("10008.1.2")
        if not little:
            data.PixelData = np.frombuffer(data.PixelData, "<u2").astype(">u2").tobytes()
        data["PixelData"].VR = "OW"
        whole = BytesIO()
        pydicom.dcmwrite(whole, data, implicit_vr=implicit, little_endian=little, enforce_file_format=True)
        content = whole.getvalue()[132:]
        length = 12 + int.from_bytes(content[8:12], "little")  # of the group of meta information
        file.write_bytes(content if meta else content[length:])


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"])
@pytest.mark.parametrize("meta", [True, False])
def test_files_without_preamble(tmp_path: Path, syntax: str, meta: bool) -> None:
    pixels = ct(tmp_path / "scan")
    rewrite(tmp_path / "scan", syntax=syntax, meta=meta)
    assert np.array_equal(read_volume(tmp_path / "scan").data, pixels.astype(np.int16) - 1024)
    file = next((tmp_path / "scan").iterdir())
    assert read_volume(file).shape == (1, 6, 7)


def test_what_only_starts_like_a_file_without_preamble_is_left_alone(tmp_path: Path) -> None:
    for name, content in {
        "short": b"\x08\0\x05\0",
        "text": b"\x08\0 notes of a long day, and more",
        "element": b"\x08\0\xff\xffCS\x0a\0ISO_IR 100",
        "length": b"\x08\0\x05\0\xff\xff\xff\x7fISO_IR 100",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert not is_dicom(tmp_path / name)


def packed(folder: Path, archive: Path, *, inside: str = "study/series/", method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(archive, "a", method) as target:
        for file in sorted(folder.iterdir()):
            target.write(file, inside + file.name)
    return archive


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_archive_is_read_as_a_folder(tmp_path: Path, method: int) -> None:
    pixels = ct(tmp_path / "scan")
    archive = packed(tmp_path / "scan", tmp_path / "scan.zip", method=method)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "._im0_1").write_bytes(b"of macOS")
    (tmp_path / "notes" / "readme.txt").write_bytes(b"no DICOM")
    packed(tmp_path / "notes", archive)
    volume = read_volume(archive)
    assert np.array_equal(volume.data, pixels.astype(np.int16) - 1024)
    assert geometry_difference(volume, read_volume(tmp_path / "scan")) is None
    plain = archive.rename(tmp_path / "scan of 2026")  # told by its content too
    assert read_volume(plain).shape == volume.shape
    assert read_volume(f"{plain}::{SERIES}").shape == volume.shape
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "scan", "scan of 2026"]


def test_faults_in_an_archive_name_it_and_the_file(tmp_path: Path) -> None:
    ct(tmp_path / "scan", FAULTS["no position"][0])
    with pytest.raises(InputError, match=r"scan\.zip/study/series/im.*_3: ImagePositionPatient is missing"):
        read_volume(packed(tmp_path / "scan", tmp_path / "scan.zip"))
    ct(tmp_path / "two")
    write_ct(tmp_path / "two", stored_pixels(), series=SERIES + "7", prefix="b")
    two = packed(tmp_path / "two", tmp_path / "two.zip", inside="../../../outside/")
    with pytest.raises(InputError, match=r"two\.zip: 2 series in one folder"):
        read_volume(two)
    assert [series.source.name for series in list_series(two)] == [f"two.zip::{SERIES}", f"two.zip::{SERIES}7"]
    assert not (tmp_path / "outside").exists()
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(InputError, match=r"empty\.zip: no DICOM file in this archive"):
        read_volume(tmp_path / "empty.zip")
    (tmp_path / "torn.zip").write_bytes(two.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"torn\.zip: not a readable zip file"):
        read_volume(tmp_path / "torn.zip")


def test_a_tilted_gantry_is_corrected_when_asked_for(tmp_path: Path) -> None:
    """A ball of a known place, cut by slices that drift along rows and columns, lies at that place afterwards."""
    shape, by = (20, 30, 28), np.array([0.21, -0.35, 0.0]) @ np.array([ORIENTATION[:3], ORIENTATION[3:], normal()])
    centre = np.array(ORIGIN) + 10 * STEP * normal() + 10 * np.array(ORIENTATION[:3]) + 12 * np.array(ORIENTATION[3:])
    z, y, x = np.indices(shape)
    place = (
        np.array(ORIGIN) + z[..., None] * (STEP * normal() + by)
        + y[..., None] * SPACING[0] * np.array(ORIENTATION[3:]) + x[..., None] * SPACING[1] * np.array(ORIENTATION[:3])
    )  # fmt: skip
    soft = np.clip(6 - np.linalg.norm(place - centre, axis=-1), 0, 2) * 500
    write_ct(tmp_path / "scan", soft.astype(np.uint16), change=lambda z, d: move(d, z, by=tuple(z * by)))
    with pytest.raises(TiltError, match=r"scan: the slices are sheared.*--correct-gantry-tilt"):
        read_volume(tmp_path / "scan")
    volume = read_volume(tmp_path / "scan", correct_gantry_tilt=True)
    assert volume.data.dtype == np.int16
    assert volume.data.min() == -1024
    steps = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    np.testing.assert_allclose(steps.T @ steps, np.eye(3), atol=1e-5)
    weights = volume.data + 1024.0
    index = [(weights * part).sum() / weights.sum() for part in np.indices(volume.shape)[::-1]]
    np.testing.assert_allclose(volume.affine @ [*index, 1], [-centre[0], -centre[1], centre[2], 1], atol=0.05)
    assert abs(weights.sum() / soft.sum() - 1) < 0.01
    upright = ct(tmp_path / "upright")
    assert read_volume(tmp_path / "upright", correct_gantry_tilt=True).shape == upright.shape


def test_what_no_gantry_can_tilt_is_refused(tmp_path: Path) -> None:
    ct(tmp_path, lambda z, d: move(d, z, by=(4.0 * z, 0, 0)))
    with pytest.raises(TiltError, match="no gantry tilts by more than 45 degrees"):
        read_series(tmp_path, correct_gantry_tilt=True)


def test_files_that_are_no_dicom(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "up" / "down").mkdir(parents=True)
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "a.dcm").write_bytes(b"junk" * 100)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "a").write_bytes(b"\0" * 128 + b"DICM" + b"\x02\x00\x00\x00UL\x04")
    messages = {
        "empty": "no DICOM file in this folder; give a folder",
        "up": "it has subfolders such as",
        "junk": r"a\.dcm: cannot be read as DICOM",
        "torn": "torn",
        "none": "not a format that can be read",
    }
    for name, message in messages.items():
        with pytest.raises(InputError, match=message):
            read_volume(tmp_path / name)
    assert not is_dicom(tmp_path / "up")
    ct(tmp_path / "up" / "down")
    assert series_folders(tmp_path / "up") == [tmp_path / "up" / "down"]
    with pytest.raises(InputError, match="read as an image, not as a label map"):
        read_volume(tmp_path / "up" / "down", kind="label")


def test_projections_are_flat(tmp_path: Path) -> None:
    pixels = stored_pixels((1, 6, 7))[0]
    data = base("1.2.840.10008.5.1.4.1.1.1.1", "DX", SERIES, SERIES + ".1", pixels)
    data.PhotometricInterpretation, data.ImagerPixelSpacing = "MONOCHROME1", [0.2, 0.1]
    data.save_as(tmp_path / "chest.dcm", enforce_file_format=True)
    volume = read_volume(tmp_path / "chest.dcm")
    assert volume.spacing_mm == (0.2, 0.1)
    assert np.array_equal(volume.data, int(pixels.max()) + int(pixels.min()) - pixels.astype(int))


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ct(tmp_path)
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "pydicom":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match=r"pip install 'lightm-unet\[dicom\]'"):
        read_volume(tmp_path)


def test_a_real_series(shared: Path) -> None:
    """JPEG 2000, instance UIDs in the preamble only, study and series UIDs blanked, names against the z axis."""
    import pydicom

    folder = shared / "data" / "dicom" / "totalseg_ct"
    volume = read_volume(folder)
    assert volume.shape == (20, 512, 512)
    assert volume.spacing_mm == (2.0, 0.9765625, 0.9765625)
    files = sorted(folder.iterdir())
    last = pydicom.dcmread(files[-1])
    assert np.array_equal(volume.data[0], last.pixel_array.astype(int) - 1024)
    place = np.array(last.ImagePositionPatient, dtype=float) * [-1, -1, 1]
    np.testing.assert_allclose(volume.affine[:3, 3], place)
    assert isinstance(volume, Volume)


def test_odd_files_end_in_a_volume_or_one_error(shared: Path) -> None:
    volumes, faults = 0, []
    for root in ("pydicom", "highdicom"):
        for path in sorted((shared / "data" / "badinput" / root).rglob("*")):
            if path.is_file() and is_dicom(path):
                try:
                    read_series(path)
                    volumes += 1
                except InputError as error:
                    faults.append((path.name, str(error)))
    assert [name for name, fault in faults if name not in fault] == []
    assert volumes > 20
    assert len(faults) > 60
