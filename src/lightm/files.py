"""Files that appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lightm.errors import LightMError


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it is synced and renamed to `path`, else removed.

    Missing folders are made. Raises LightMError, naming the file, when the disk refuses.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise LightMError(
            f"{path}: cannot be written ({error.strerror or error}); check the folder's rights and the free space"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name only when the block ends without an error; as `replacing`."""
    with replacing(path) as temporary, open(temporary, "xb") as stream:
        yield stream


def write_text(path: Path | str, text: str) -> None:
    """Write a UTF-8 text file in one step; as `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
