"""Reading and writing of images and label maps in every format, and of one channel of a file that holds several.

A file that cannot be used gives one InputError that names it and says how to fix it. A file is written under
another name and renamed when complete, so that nobody ever sees half of one.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightm.errors import InputError, LightMError
from lightm.files import atomic_file, disk_refusals
from lightm.images import dicom, itk, nifti, pictures
from lightm.images.limits import check_finite, naming
from lightm.images.volume import Volume
from lightm.registry import Registry

SUFFIXES = (".nii.gz", ".nii", *pictures.FORMATS, *itk.SUFFIXES)
"""Endings of the formats that LightM reads by itself."""

Kind = Literal["image", "label"]

_CHANNEL = re.compile(r"::\d{1,4}$")
# A label made by resampling or by another program may hold 0.99999997 for 1.
_ROUNDING = 1e-3


def file_suffix(path: Path | str) -> str | None:
    """Return which of SUFFIXES or registered endings a file's name ends with (in any case), or None.

    >>> file_suffix("BRATS_001.NII.GZ::2")
    '.nii.gz'
    """
    name = _CHANNEL.sub("", Path(path).name).lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None) or _registered_suffix(name)


def split_path(path: Path | str) -> tuple[Path, int | None]:
    """Return a file and the channel that is meant of it, None where the path names none, as in `scan.nii.gz::2`.

    >>> split_path("BRATS_001.nii.gz::2")[1]
    2
    """
    path = Path(path)
    found = _CHANNEL.search(path.name)
    if found is None or file_suffix(path) is None:
        return path, None
    return path.with_name(path.name[: found.start()]), int(found[0][2:])


def channel_paths(path: Path) -> tuple[Path, ...]:
    """The channels of a file as paths that `read_volume` reads: the file itself where it holds one.

    Raises InputError, naming the file, for one whose header cannot be read.
    """
    count, suffix = 1, file_suffix(path)
    if path.is_file() and path.stat().st_size:
        if suffix in (".nii", ".nii.gz"):
            count = nifti.channel_count(path)
        elif suffix in pictures.FORMATS:
            count = pictures.channel_count(path, suffix)
        elif suffix in itk.SUFFIXES:
            count = itk.channel_count(path)
    return (path,) if count == 1 else tuple(path.with_name(f"{path.name}::{number}") for number in range(count))


def companions(file: Path) -> tuple[str, ...]:
    """Names of files beside an image that are parts of it: the voxels of a pair, the spacing of a TIFF stack."""
    suffix = file_suffix(file)
    if suffix in (".tif", ".tiff"):
        stem = file.name[: -len(suffix)]
        return (f"{stem}.json", f"{re.sub(r'_[0-9]{4}$', '', stem)}.json")
    return tuple(path.name for path in itk.companions(file)) if suffix in itk.SUFFIXES else ()


def read_volume(path: Path | str, *, kind: Kind = "image", correct_gantry_tilt: bool = False) -> Volume:
    """Read an image or a label map of any format in docs/files.md, or a DICOM series, as a volume.

    kind="image": real voxels, dtype as stored (float32 where the header scales them). kind="label": whole numbers
    as uint8 or int16; floats within 0.001 of one are rounded. Of a file that holds several channels, such as four MR
    sequences along the fourth axis of a NIfTI file, `FILE::2` is the third; a colour picture without such a number is
    read as grey. DICOM (a folder or zip archive, `folder::SeriesInstanceUID`, or a file that starts or is named as
    one) is read as `lightm.images.dicom.read_series` says, as an image only; correct_gantry_tilt: as there.

    Raises InputError, naming the file, for one that is missing, empty, damaged, of another format, of more than 2^31
    voxels or more than its length or the memory can hold, of more than three axes, with NaN or infinite voxels, or, for
    labels, with other than whole numbers; docs/files.md lists every rule. Cost: the voxels once, once more while a
    label map is converted, and at most 64 MB beside them.

    >>> data = lightm.phantoms("xray", folder / "data", cases=1, size=32)
    >>> int(lightm.read_volume(data / "labelsTr" / "xray_000.png", kind="label").data.max())
    1
    """
    if "\0" in str(path):
        raise InputError(f"{str(path)!r}: holds a NUL character, which no file name does; check the path")
    path, channel = split_path(path)
    suffix = file_suffix(path)
    if suffix is None:
        if path.is_dir() or dicom.is_dicom(path):
            if kind == "label":
                raise InputError(f"{path}: DICOM is read as an image, not as a label map; convert the labels to NIfTI")
            volume = dicom.read_series(path, correct_gantry_tilt=correct_gantry_tilt)
            with naming(path):
                check_finite(volume.data)
            return volume
        raise InputError(
            f"{path}: not a format that can be read; expected a name that ends in {', '.join(SUFFIXES)}, or DICOM"
        )
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror or error}); check the path") from None
    if not path.is_file():
        raise InputError(f"{path}: a folder where a file is needed; give the file itself")
    if size == 0:
        raise InputError(f"{path}: the file is empty (0 bytes); copy or export it again")
    try:
        if suffix not in SUFFIXES:
            volume = _read_registered(path, suffix)
        elif suffix in pictures.FORMATS:
            volume = pictures.read(path, suffix, kind, channel)
        else:
            volume = itk.read(path, channel) if suffix in itk.SUFFIXES else nifti.read(path, channel)
    except MemoryError:
        raise InputError(f"{path}: not enough memory to read its voxels; resample or crop the file") from None
    with naming(path):
        if suffix not in (".nii", ".nii.gz"):
            check_finite(volume.data)
        return volume.with_data(as_label(volume.data)) if kind == "label" else volume


def voxel_bytes(path: Path) -> int:
    """Return about how much memory reading a file of SUFFIXES takes, from its header; 0 where it will be refused."""
    path, _ = split_path(path)
    suffix = file_suffix(path)
    try:
        if not path.is_file() or suffix is None:
            return 0
        if suffix not in SUFFIXES:
            return path.stat().st_size
        if suffix in pictures.FORMATS:
            return pictures.voxel_bytes(path, suffix)
        return itk.voxel_bytes(path) if suffix in itk.SUFFIXES else nifti.voxel_bytes(path)
    except (OSError, InputError):
        return 0


def place_remarks(path: Path) -> list[tuple[str, str]]:
    """Return what is odd about the place in space that a readable file gives, each with its cure."""
    path, _ = split_path(path)
    suffix = file_suffix(path)
    return nifti.remarks(path) if suffix in (".nii", ".nii.gz") else []


def write_volume(path: Path | str, volume: Volume, *, kind: Kind | None = None) -> None:
    """Write a volume in the format that a file's name ends in (JPEG and DICOM are only read), complete or not at all.

    kind="label" stores whole numbers as uint8, or int16 where they need it; kind=None does so for bool and int64
    arrays, and keeps every other dtype. NIfTI keeps affine and codes, units millimetres; the same volume gives the same
    bytes. PNG and BMP take 2D arrays of whole numbers from 0 to 255, PNG also uint16. Missing folders
    are made. Raises InputError for what the format cannot hold, LightMError when writing fails.

    >>> import numpy as np
    >>> volume = lightm.Volume.from_spacing(np.ones((4, 8, 8), np.uint8), (2.0, 1.0, 1.0))
    >>> lightm.write_volume(folder / "label.nii.gz", volume, kind="label")
    >>> lightm.read_volume(folder / "label.nii.gz").spacing_mm
    (2.0, 1.0, 1.0)
    """
    path = Path(path)
    suffix = file_suffix(path)
    if suffix is None:
        raise InputError(f"{path}: not a format that can be written; use a name that ends in {', '.join(SUFFIXES)}")
    with naming(path):
        check_finite(volume.data)
        if kind == "label" or (kind is None and volume.data.dtype in (np.bool_, np.int64, np.uint64)):
            volume = volume.with_data(as_label(volume.data))
        if suffix not in SUFFIXES:
            return _write_registered(path, suffix, volume)
        if suffix in itk.SUFFIXES:
            return itk.write(path, suffix, volume)
        packed = suffix == ".nii.gz"
        encode = pictures.encoder(volume, suffix) if suffix in pictures.FORMATS else nifti.encoder(volume, packed)
    with atomic_file(path) as stream:
        encode(stream)


def as_label(data: np.ndarray) -> np.ndarray:
    """Return a label map as uint8, or int16 where its values need it.

    Raises InputError for values further than 0.001 from whole numbers, or outside int16.
    """
    floats = data.dtype.kind == "f"
    if floats:
        _check_whole(data)
    low, high = (round(float(end)) if floats else int(end) for end in (data.min(), data.max()))
    if low < -32768 or high > 32767:
        raise InputError(f"label values from {low} to {high}; values between 0 and 32767 are expected, renumber them")
    dtype = np.uint8 if low >= 0 and high <= 255 else np.int16
    if not floats:
        return data.astype(dtype, copy=False)
    result = np.empty(data.shape, dtype)
    for slab, target in zip(data, result, strict=True):
        target[...] = np.rint(slab)
    return result


def _check_whole(data: np.ndarray) -> None:
    found, value = 0, 0.0
    for slab in data:  # slice by slice, so that a large map is not there three times
        off = np.abs(slab - np.rint(slab)) > _ROUNDING
        if off.any():
            value = value if found else float(slab[off][0])
            found += int(off.sum())
    if found:
        raise InputError(
            f"a label map holds whole numbers, found {value:.6g} ({found} such voxels); "
            "it may be an image or a probability map: threshold it, or resample labels with nearest neighbour"
        )


Reader = Callable[[Path], Volume]
Writer = Callable[[Path, Volume], None]


@dataclass(frozen=True)
class Format:
    """How files of one ending are read and, if they can be, written."""

    reader: Reader
    writer: Writer | None = None


def _wrap(given: Any) -> Format:
    found = given if isinstance(given, Format) else Format(*given) if isinstance(given, tuple) else Format(given)
    if not callable(found.reader) or not (found.writer is None or callable(found.writer)):
        raise InputError("a format is a reader (path) -> Volume and, or None, a writer (path, volume)")
    return found


FORMATS: Registry[Format] = Registry("format", "lightm.formats", _wrap)


def register_format(ending: str, reader: Reader, writer: Writer | None = None, *, overwrite: bool = False) -> None:
    """Make LightM read, and with a writer write, files whose names end in `ending`, such as ".mgz".

    reader: (path) -> `Volume`, its data (Z, Y, X) or (Y, X) and its affine in millimetres; whatever it raises
    becomes an InputError that names the file. writer: (path, volume), which writes to the path
    given, a temporary one of the same ending. LightM checks voxels and labels as in its own formats. A whole volume is
    read into memory.

    The command line and other programs know the ending if a package declares it as an entry point of the group
    "lightm.formats" (in pyproject.toml: `[project.entry-points."lightm.formats"]`, `mgz = "my_package:FORMAT"`, the
    name without its dot, for a reader or a pair of reader and writer).

    Raises InputError for an ending that is LightM's own or taken (unless `overwrite`), and for what cannot be called.

    >>> import numpy as np
    >>> def read(path):
    ...     return lightm.Volume.from_spacing(np.load(path), (1.0, 1.0, 1.0))
    >>> def write(path, volume):
    ...     with open(path, "wb") as stream:
    ...         np.save(stream, volume.data)
    >>> lightm.register_format(".npy", read, write, overwrite=True)
    >>> lightm.write_volume(folder / "scan.npy", lightm.Volume.from_spacing(np.ones((2, 4, 4)), (1.0, 1.0, 1.0)))
    >>> lightm.read_volume(folder / "scan.npy").shape
    (2, 4, 4)
    """
    if not isinstance(ending, str) or not ending.startswith("."):
        raise InputError(f"format {ending!r}: expected the ending of a file's name, such as '.mgz'")
    if ending in SUFFIXES:
        raise InputError(f"format '{ending}' comes with LightM and cannot be replaced; register another ending")
    FORMATS.register(ending[1:], (reader, writer), overwrite=overwrite)


def _registered_suffix(name: str) -> str | None:
    """The longest registered ending of a file's name in lower case, with its dot."""
    found = [f".{known}" for known in FORMATS.names() if name.endswith(f".{known}")]
    return max(found, key=len, default=None)


def _read_registered(path: Path, suffix: str) -> Volume:
    """Read a file of a registered format; every failure is an InputError that names the file."""
    reader = FORMATS[suffix[1:]].reader
    try:
        volume = reader(path)
    except LightMError:
        raise
    except Exception as error:  # a reader from outside may raise anything
        raise InputError(f"{path}: its reader failed ({type(error).__name__}: {error})") from error
    if not isinstance(volume, Volume):
        raise InputError(f"{path}: its reader returned {type(volume).__name__}, expected a lightm.Volume")
    return volume


def _write_registered(path: Path, suffix: str, volume: Volume) -> None:
    """Write a file of a registered format, complete or not at all."""
    writer = FORMATS[suffix[1:]].writer
    if writer is None:
        raise InputError(f"{path}: files that end in {suffix} can be read, not written; use another name")
    temporary = path.with_name(f".{uuid.uuid4().hex[:12]}{suffix}")
    try:
        with disk_refusals(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            writer(temporary, volume)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
