"""A model in a single file: the zip of a model folder, written in one step and read with suspicion.

Nothing is extracted under a name from the archive: the three known files are written under their own names, each with
a limit on its size, and everything else in the archive is a reason to refuse it.
"""

from __future__ import annotations

import contextlib
import re
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from lightm.errors import InputError, LightMError
from lightm.files import replacing

NAMES = ("model.safetensors", "model.json", "card.md")
NEEDED = NAMES[:2]
MAX_TEXT_BYTES = 16 << 20
MAX_WEIGHTS_BYTES = (4 << 30) - (1 << 20)  # beyond it an archive needs the zip64 format
MAX_RATIO = 100  # weights hardly shrink, text shrinks tenfold; a bomb shrinks a thousandfold
_FREE_BYTES = 1 << 20  # of any ratio
_MAX_DIRECTORY_BYTES = 16 << 10
_BLOCK = 1 << 20


def is_zip_path(path: Path) -> bool:
    """Whether a path means a single-file model: by its ending alone."""
    return Path(path).suffix.lower() == ".zip"


def write_zip(folder: Path, path: Path) -> None:
    """Write the files of a model folder to a zip, complete or not at all; equal folders give equal bytes.

    The weights are stored as they are, the text is deflated. Raises InputError for files above the limits, LightMError
    when the disk refuses.
    """
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name in NAMES:
            source = Path(folder) / name
            if not source.is_file():
                continue
            size, limit = source.stat().st_size, _limit(name)
            if size > limit:
                raise InputError(f"{source}: {size} bytes, and a single-file model holds at most {limit} of it")
            entry = zipfile.ZipInfo(name)  # dated 1980
            entry.compress_type = zipfile.ZIP_STORED if name.endswith(".safetensors") else zipfile.ZIP_DEFLATED
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            entry.file_size = size
            with source.open("rb") as file, archive.open(entry, "w") as target:
                while block := file.read(_BLOCK):
                    target.write(block)


@contextlib.contextmanager
def extracted(path: Path) -> Iterator[Path]:
    """Yield a temporary folder with the files of a single-file model; it is removed at the end of the block.

    Raises InputError, naming the archive and the entry, for no zip, a damaged or encrypted one, entries that are not
    the known files (all at the top, or all in one folder), twice the same, links, sizes above the limits, and what
    shrank so much that it looks like a bomb. Reads no byte beyond the sizes declared. Errors of the block that name the
    temporary folder name the archive instead.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory(prefix="lightm-model-", ignore_cleanup_errors=True) as place:
        folder = Path(place)
        try:
            _check_directory(path)
            with zipfile.ZipFile(path) as archive:
                for entry, name in _entries(path, archive):
                    _extract(path, archive, entry, folder / name)
        except InputError:
            raise
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, struct.error, ValueError) as error:
            raise InputError(f"{path}: not a readable zip ({error}); the file is damaged or no model") from error
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
        try:
            yield folder
        except LightMError as error:
            raise type(error)(str(error).replace(str(folder), str(path))) from error


def _check_directory(path: Path) -> None:
    """Refuse a table of contents that is too long to be a model's, before it is read into memory."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 66_000))
        end = file.read()
    at = end.rfind(b"PK\x05\x06")
    if at < 0 or len(end) < at + 22:
        raise InputError(f"{path}: not a readable zip (its end is missing); the file is cut off or no model")
    entries, length = struct.unpack_from("<HI", end, at + 10)
    if entries > len(NAMES) + 1 or length > _MAX_DIRECTORY_BYTES or b"PK\x06\x07" in end[max(0, at - 20) : at]:
        raise InputError(
            f"{path}: a table of {entries} files ({length} bytes); a model has {len(NAMES)}: {', '.join(NAMES)}"
        )


def _entries(path: Path, archive: zipfile.ZipFile) -> list[tuple[zipfile.ZipInfo, str]]:
    found: dict[str, zipfile.ZipInfo] = {}
    folders: set[str] = set()
    for entry in archive.infolist():
        match = re.fullmatch(r"(?:([\w .-]+)/)?([\w.-]*)", entry.filename)
        top, name = (match[1] or "", match[2]) if match else ("", "")
        if match is None or top.strip(" .") != top or (name not in NAMES and not (top and entry.is_dir())):
            raise InputError(
                f"{path}: holds {entry.filename!r}, which is no file of a model; expected only {', '.join(NAMES)}"
            )
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or (kind == stat.S_IFDIR) > entry.is_dir():
            raise InputError(f"{path}: {entry.filename!r} is a link or a device, not a file")
        folders.add(top)
        if entry.is_dir():
            continue
        if name in found:
            raise InputError(f"{path}: holds {name} twice")
        found[name] = entry
        if entry.flag_bits & 1:
            raise InputError(f"{path}: {name} is encrypted; a model is not")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(f"{path}: {name} is compressed by method {entry.compress_type}; store or deflate it")
        if entry.file_size > _limit(name):
            raise InputError(f"{path}: {name} would have {entry.file_size} bytes; the limit is {_limit(name)}")
        if entry.file_size > max(_FREE_BYTES, MAX_RATIO * entry.compress_size):
            raise InputError(
                f"{path}: {name} would grow from {entry.compress_size} to {entry.file_size} bytes, which no model "
                "does; it looks like a zip bomb"
            )
    if len(folders) > 1:
        raise InputError(
            f"{path}: its files lie in several folders: {', '.join(sorted(f or '(top)' for f in folders))}"
        )
    missing = [name for name in NEEDED if name not in found]
    if missing:
        raise InputError(f"{path}: not a model, {' and '.join(missing)} missing; make one with `lightm pack`")
    return [(entry, name) for name, entry in found.items()]


def _extract(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    done = 0
    with archive.open(entry) as source, target.open("xb") as file:
        while block := source.read(_BLOCK):  # checks the sum of the content at its end
            done += len(block)
            if done > entry.file_size:
                raise InputError(f"{path}: {entry.filename!r} is longer than it says")
            file.write(block)
    if done != entry.file_size:
        raise InputError(f"{path}: {entry.filename!r} has {done} bytes, not the {entry.file_size} that it says")


def _limit(name: str) -> int:
    return MAX_WEIGHTS_BYTES if name.endswith(".safetensors") else MAX_TEXT_BYTES
