"""Zip archives as folders of DICOM files: members are read where they lie, and nothing is unpacked onto the disk.

What an archive may ask for: a table of contents of 8 MB, members that are stored or deflated, of 2 GB each and of what
the memory holds, and all together no more than deflate can pack into the archive's length.
"""

from __future__ import annotations

import io
import os
import weakref
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lightm.errors import InputError
from lightm.images.limits import MAX_DEFLATE, PARSE_ERRORS, CappedReader, check_bytes, naming

_MAX_TABLE_BYTES = 8 << 20  # of the table of contents, which Python holds at ten times its size
_MAX_MEMBER_BYTES = 1 << 31
_READS = 20_000  # of a member, and one more for every 8 bytes of it as packed: zeros are endless elements to a parser
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
_FAULTS = (*PARSE_ERRORS, zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError)
_LONGEST_NAME = 120


class _Archive(CappedReader):
    """An archive's file, which refuses a table of contents that is too long."""

    opening = True

    def read(self, size: int | None = -1, /) -> bytes:
        if self.opening and size is not None and size > _MAX_TABLE_BYTES:
            raise InputError(
                f"a zip archive whose table of contents takes {size} bytes; at most {_MAX_TABLE_BYTES} are read, "
                "unpack it and give the folder"
            )
        return super().read(size)


@dataclass(frozen=True, eq=False)
class Member:
    """One file in an archive, with what is used here of a Path: its name, its text, its size."""

    archive: Path
    info: zipfile.ZipInfo
    _zip: zipfile.ZipFile

    @property
    def name(self) -> str:
        """The name without folders, fit for a message."""
        return _printable(self.info.filename.rpartition("/")[2])

    @property
    def size(self) -> int:
        """Bytes of the content, as the archive promises."""
        return self.info.file_size

    def __str__(self) -> str:
        return f"{self.archive}/{_printable(self.info.filename)}"

    def open(self) -> io.BufferedReader:
        """Open the content for reading; raises InputError where it is encrypted or packed in an unusual way."""
        where = str(self)
        if self.info.flag_bits & 1:
            raise InputError(f"{where}: encrypted; unpack the archive with its password and give the folder")
        if self.info.compress_type not in _METHODS:
            raise InputError(
                f"{where}: packed by method {self.info.compress_type}; only stored and deflated files are read, unpack "
                "the archive and give the folder"
            )
        if self.size > _MAX_MEMBER_BYTES:
            raise InputError(
                f"{where}: {self.size} bytes in an archive; at most {_MAX_MEMBER_BYTES} are read, unpack it"
            )
        with naming(where, "zip", _FAULTS, "copy or download the archive again"):
            check_bytes(self.size, "its content")
            raw: Any = self._zip.open(self.info)
            return CappedReader(raw, self.size, _READS + self.info.compress_size // 8)

    def read(self, size: int) -> bytes:
        """Return the first bytes of the content; raises InputError as `open`, and for a damaged one."""
        with self.open() as stream, naming(str(self), "zip", _FAULTS, "copy or download the archive again"):
            return stream.read(size)


def is_archive(path: Path) -> bool:
    """Return whether a file is a zip archive, by its first bytes, or at least named as one."""
    if not path.is_file():
        return False
    if path.name.lower().endswith(".zip"):
        return True
    try:
        with path.open("rb") as stream:
            return stream.read(4) == b"PK\x03\x04"
    except OSError:
        return False


def members(archive: Path) -> Sequence[Member]:
    """Return the files in an archive, of all its folders, sorted by name, without hidden ones.

    Raises InputError, naming the archive, for one that is damaged, or promises more than its length can hold.
    """
    with naming(archive, "zip", _FAULTS, "copy or download it again"):
        state = os.stat(archive)
        return _members(archive, state.st_size, state.st_mtime_ns)


@lru_cache(8)
def _members(archive: Path, size: int, changed_ns: int) -> tuple[Member, ...]:
    stream = _Archive(io.FileIO(archive), size)
    try:
        opened = zipfile.ZipFile(stream)
        stream.opening = False
    except BaseException:
        stream.close()
        raise
    weakref.finalize(opened, stream.close)
    total = sum(info.file_size for info in opened.infolist())
    if total > MAX_DEFLATE * size or sum(info.compress_size for info in opened.infolist()) > size:
        raise InputError(
            f"the archive promises {total} bytes, which its {size} cannot hold (damaged, or made to fill the memory); "
            "copy or download it again"
        )
    found = [Member(archive, info, opened) for info in opened.infolist() if not info.is_dir()]
    shown = [member for member in found if not _is_hidden(member.info.filename)]
    return tuple(sorted(shown, key=lambda member: member.info.filename))


def _is_hidden(name: str) -> bool:
    """Hidden files, and those that macOS packs beside each file."""
    return any(part == "__MACOSX" or (part.startswith(".") and part.strip(".")) for part in name.split("/"))


def _printable(name: str) -> str:
    text = "".join(letter if letter.isprintable() else "?" for letter in name)
    return text if len(text) <= _LONGEST_NAME else f"...{text[-_LONGEST_NAME:]}"
