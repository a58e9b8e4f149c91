"""File formats that are not LightM's own, by the ending of a file's name: registered, or of installed packages."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightm.errors import InputError, LightMError
from lightm.files import disk_refusals
from lightm.images import itk, pictures
from lightm.images.volume import Volume
from lightm.registry import Registry

SUFFIXES = (".nii.gz", ".nii", *pictures.FORMATS, *itk.SUFFIXES)
"""Endings of the formats that LightM reads by itself."""

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

    reader: (path) -> `Volume`, its data (Z, Y, X) or (Y, X) and its affine in millimetres; it may raise any exception
    for a file that it cannot read, which becomes an InputError that names the file. writer: (path, volume), which
    writes the volume to the path given: a temporary one of the same ending, which takes the name of the file when it is
    complete. LightM checks voxels and labels as in its own formats. A whole volume is read into memory.

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


def registered_suffix(name: str) -> str | None:
    """The longest registered ending of a file's name in lower case, with its dot."""
    found = [f".{known}" for known in FORMATS.names() if name.endswith(f".{known}")]
    return max(found, key=len, default=None)


def read_registered(path: Path, suffix: str) -> Volume:
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


def write_registered(path: Path, suffix: str, volume: Volume) -> None:
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
