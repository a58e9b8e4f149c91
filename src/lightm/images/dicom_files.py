"""DICOM files: which they are, their headers, and the series that a folder holds. No pixel is read here."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lightm.errors import InputError, did_you_mean
from lightm.images.archives import Member, is_archive, members
from lightm.images.limits import opened

SEPARATOR = "::"
NO_UID = "none"

_log = logging.getLogger("lightm.images")

# Storage classes whose frames have a place in the patient, and the projections, which have none.
SLICES = {
    "1.2.840.10008.5.1.4.1.1.2": "CT",
    "1.2.840.10008.5.1.4.1.1.4": "MR",
    "1.2.840.10008.5.1.4.1.1.128": "PET",
}
MULTI_FRAME = {
    "1.2.840.10008.5.1.4.1.1.2.1": "Enhanced CT",
    "1.2.840.10008.5.1.4.1.1.2.2": "Legacy Converted Enhanced CT",
    "1.2.840.10008.5.1.4.1.1.4.1": "Enhanced MR",
    "1.2.840.10008.5.1.4.1.1.4.4": "Legacy Converted Enhanced MR",
    "1.2.840.10008.5.1.4.1.1.130": "Enhanced PET",
    "1.2.840.10008.5.1.4.1.1.128.1": "Legacy Converted Enhanced PET",
}
PROJECTIONS = {"1.2.840.10008.5.1.4.1.1.1": "CR", "1.2.840.10008.5.1.4.1.1.1.1": "DX"}
_CLASSES = {**SLICES, **MULTI_FRAME, **PROJECTIONS}
_READABLE = "CT, MR, PET (single-frame or enhanced), CR or DX images"

# Without preamble a file starts with its first element, of the group of file meta information or of identification: the
# tag, then a value representation or, where that is implicit, a length that fits such an element.
_FIRST_ELEMENTS = {
    b"\x02\x00": ("little", 0x0102), b"\x08\x00": ("little", 0x0070), b"\x00\x08": ("big", 0x0070)
}  # fmt: skip
_FIRST_KINDS = {b"UL", b"OB", b"UI", b"CS", b"SH", b"LO", b"DA", b"TM", b"DT", b"US"}
_SYNTAXES = {
    (True, True): "1.2.840.10008.1.2",
    (False, True): "1.2.840.10008.1.2.1",
    (False, False): "1.2.840.10008.1.2.2",
}

# A deflated file can unpack to a thousand times its size before anything in it can be checked.
_DEFLATED = "1.2.840.10008.1.2.1.99"


class NoSeriesError(InputError):
    """A folder or file that holds no image series."""


@dataclass(frozen=True, eq=False)
class Header:
    """One DICOM file without its pixels. uid, storage: of the instance, from the file's preamble where it has none.

    syntax: how it is encoded, from its meta information or, without that, from its first element.
    """

    file: Path | Member
    data: Any
    storage: str
    uid: str
    syntax: str


@dataclass(frozen=True, eq=False)
class Frame:
    """One slice: its file, its index there, its place in the patient (LPS, millimetres) and how it is rescaled.

    orientation: (2, 3), the directions in which columns and rows count up. spacing_mm: (between rows, between columns).
    """

    header: Header
    index: int
    position: np.ndarray
    orientation: np.ndarray
    spacing_mm: tuple[float, float]
    thickness_mm: float | None
    slope: float
    intercept: float
    size: tuple[int, int]

    def __str__(self) -> str:
        name = self.header.file.name
        return f"{name} frame {self.index + 1}" if self.header.storage in MULTI_FRAME else name

    @property
    def normal(self) -> np.ndarray:
        """The direction in which slices are ordered."""
        return np.cross(self.orientation[0], self.orientation[1])


@dataclass(frozen=True, eq=False)
class Series:
    """The image files of one series in one folder or zip archive, in the order of their names.

    uid: SeriesInstanceUID, or "none" where the files were stripped of it. number, modality, description: as stored.
    """

    folder: Path
    uid: str
    number: int | None
    modality: str
    description: str
    headers: tuple[Header, ...] = field(repr=False)

    @property
    def source(self) -> Path:
        """What to give as an input to name this series: `folder::SeriesInstanceUID`, or the file it was read from."""
        return self.folder if self.headers[0].file == self.folder else Path(f"{self.folder}{SEPARATOR}{self.uid}")

    def __str__(self) -> str:
        what = f"{self.modality}, {len(self.headers)} file(s)"
        return f"{self.uid}  ({what}, '{self.description}')" if self.description else f"{self.uid}  ({what})"


def pydicom_module() -> Any:
    """Return pydicom; raises InputError with the command that installs it where it is missing."""
    try:
        import pydicom
    except ImportError:
        raise InputError(
            "DICOM files need pydicom and highdicom, which are not installed; pip install 'lightm-unet[dicom]'"
        ) from None
    return pydicom


@contextmanager
def quietly() -> Iterator[None]:
    """Keep pydicom's remarks about odd but readable values from the user."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def split_source(path: Path | str) -> tuple[Path, str | None]:
    """Return folder and SeriesInstanceUID of `folder::UID`, or the path and None."""
    text = str(path)
    if SEPARATOR not in text:
        return Path(path), None
    folder, uid = text.rsplit(SEPARATOR, 1)
    return Path(folder), uid


def is_dicom_file(path: Path | Member) -> bool:
    """Return whether a file starts as DICOM files do, with or without preamble, or at least is named .dcm."""
    if path.name.lower().endswith((".dcm", ".dicom")):
        return isinstance(path, Member) or path.is_file()
    try:
        if isinstance(path, Member):
            start = path.read(132)
        else:
            with path.open("rb") as stream:
                start = stream.read(132)
    except (OSError, InputError):
        return False
    return start[128:] == b"DICM" or _is_bare(start)


def _is_bare(start: bytes) -> bool:
    """Return whether a file starts with a data set, without the 128 bytes and the DICM before it."""
    order, last = _FIRST_ELEMENTS.get(start[:2], (None, 0))
    if order not in ("little", "big") or len(start) < 12:
        return False
    element, length = (int.from_bytes(part, order) for part in (start[2:4], start[4:8]))  # type: ignore[arg-type]
    return element <= last and (start[4:6] in _FIRST_KINDS or length <= 1024)


def dicom_files(folder: Path) -> list[Path | Member]:
    """Return the DICOM files directly in a folder, or anywhere in a zip archive, sorted, without hidden ones.

    Raises InputError for an archive that cannot be read.
    """
    if is_archive(folder):
        return [member for member in members(folder) if is_dicom_file(member)]
    with os.scandir(folder) as entries:
        paths = sorted(Path(e.path) for e in entries if e.is_file() and not e.name.startswith("."))
    return [path for path in paths if is_dicom_file(path)]


def open_file(file: Path | Member) -> io.BufferedReader:
    """Open a DICOM file for pydicom, in a folder or in an archive."""
    return file.open() if isinstance(file, Member) else opened(file)


def read_header(file: Path | Member) -> Header:
    """Read one file without its pixels; raises InputError, naming it, for one that cannot be read as DICOM."""
    pydicom = pydicom_module()
    try:
        with quietly(), open_file(file) as stream:
            bare = _is_bare(stream.read(132))
            stream.seek(0)
            # As its read_file_meta_info, which opens the file itself and asks for what any length there says.
            pydicom.filereader.read_preamble(stream, bare)
            meta = pydicom.filereader._read_file_meta_info(stream)
            stream.seek(0)
            syntax = str(meta.get("TransferSyntaxUID", "") or "").strip(" \0")
            if syntax == _DEFLATED:
                raise InputError(
                    f"{file}: a deflated file, whose size cannot be checked before it is unpacked; convert it first, "
                    "for example with `dcmconv +te`"
                )
            data = pydicom.dcmread(stream, stop_before_pixels=True, force=bare)
            if bare and not syntax:
                syntax = _SYNTAXES.get(data.original_encoding, "")
            storage = str(data.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or "")
            uid = str(data.get("SOPInstanceUID") or meta.get("MediaStorageSOPInstanceUID") or "")
    except InputError as error:
        raise InputError(str(error) if str(file) in str(error) else f"{file}: {error}") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be opened ({error.strerror or error}); check the path") from None
    except Exception as error:  # pydicom lets most kinds of error through for a damaged file
        raise InputError(
            f"{file}: cannot be read as DICOM ({reason(error)}); copy or export it again, or remove it"
        ) from None
    return Header(file, data, storage, uid, syntax)


def list_series(path: Path | str) -> list[Series]:
    """Return the image series directly in a folder, in a zip archive or of one file, sorted by number and UID.

    Objects that are no CT, MR, PET, CR or DX images (segmentations, reports, plans, DICOMDIR) are passed over. Reads
    headers, no pixels: about a millisecond a file. Raises InputError, naming folder or file, where there is no such
    series or a file is damaged, and where pydicom is missing.
    """
    folder, uid = split_source(path)
    files: list[Path | Member]
    if folder.is_dir() or is_archive(folder):
        files = dicom_files(folder)
    elif folder.is_file():
        files = [folder]
    else:
        raise InputError(f"{folder}: no such file or folder; give a folder of DICOM files")
    groups: dict[str, list[Header]] = {}
    others: Counter[str] = Counter()
    for header in map(read_header, files):
        if header.storage in _CLASSES:
            groups.setdefault(str(text(header.data, "SeriesInstanceUID") or NO_UID), []).append(header)
        else:
            with quietly():
                name = (
                    pydicom_module().uid.UID(header.storage).name if header.storage else "an object without SOP class"
                )
            others[str(name)] += 1
    if not groups:
        raise NoSeriesError(_nothing(folder, others))
    found = [_series(folder, key, headers) for key, headers in groups.items()]
    found.sort(key=lambda series: (series.number is None, series.number or 0, series.uid))
    if uid is None:
        return found
    chosen = [series for series in found if series.uid == uid]
    if not chosen:
        near = did_you_mean(uid, groups)
        raise InputError(f"{folder}: no series '{uid}' there{near}; it holds:\n{_lines(found)}")
    return chosen


def find_series(path: Path | str) -> Series:
    """Return the one series of a folder, a file or `folder::SeriesInstanceUID`.

    Raises InputError as `list_series`, and, with the list of them, where the folder holds several.
    """
    found = list_series(path)
    if len(found) > 1:
        raise InputError(
            f"{split_source(path)[0]}: {len(found)} series in one folder; choose one by "
            f"FOLDER{SEPARATOR}SeriesInstanceUID:\n{_lines(found)}"
        )
    return found[0]


def text(data: Any, keyword: str) -> str | None:
    """Return an attribute as text, or None where it is missing, empty or unreadable."""
    try:
        with quietly():
            value = data.get(keyword)
            return None if value is None else str(value) or None
    except Exception:
        return None


def _series(folder: Path, uid: str, headers: list[Header]) -> Series:
    first = headers[0]
    number = text(first.data, "SeriesNumber")
    return Series(
        folder,
        uid,
        int(number) if number is not None and number.lstrip("-").isdigit() else None,
        text(first.data, "Modality") or _CLASSES[first.storage],
        text(first.data, "SeriesDescription") or "",
        tuple(headers),
    )


def _nothing(folder: Path, others: Counter[str]) -> str:
    if others:
        what = ", ".join(f"{count} x {name}" for name, count in sorted(others.items()))
        return f"{folder}: no image series that can be read, only {what}; expected {_READABLE}"
    below = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    hint = f"; it has subfolders such as {below[0]}, give one that holds DICOM files" if below else ""
    what = "folder" if folder.is_dir() else "archive"
    return f"{folder}: no DICOM file in this {what}{hint or '; give a folder of DICOM files'}"


def _lines(series: list[Series]) -> str:
    return "\n".join(f"  {one}" for one in series)


def reason(error: BaseException) -> str:
    """Return the first line of an error, or its kind."""
    lines = str(error).strip().splitlines()
    return (lines[0][:200] if lines else "") or type(error).__name__
