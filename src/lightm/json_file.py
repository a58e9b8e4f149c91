"""JSON that others wrote, read with limits: of size, nesting and whatever else makes a parser give up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightm.errors import InputError

MAX_BYTES = 16 << 20


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """Return the content of a JSON file in UTF-8.

    Raises InputError, naming the file, for one that cannot be opened, is longer than `max_bytes`, or is no JSON: also
    where it is nested deeper, or its numbers are longer, than Python reads. Memory: some ten times the file.
    """
    try:
        if not path.is_file():
            raise InputError(f"{path}: cannot be read (no such file); check the path")
        with path.open("rb") as stream:
            content = stream.read(max_bytes + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    if len(content) > max_bytes:
        raise InputError(f"{path}: longer than {max_bytes >> 20} MB, which no such file is; is it another one?")
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError:
        raise InputError(f"{path}: not readable as JSON (nested too deeply); mend or write it again") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are some, numbers of 5000 digits too
        raise InputError(f"{path}: not readable as JSON ({str(error)[:200]}); mend or write it again") from None
