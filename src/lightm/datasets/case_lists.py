"""Lists of cases to predict: text files with one case a line, or CSV files with a header."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from lightm.errors import InputError

LIST_SUFFIXES = (".txt", ".csv")

# What no file name may hold on some system; a case's name becomes the name of its label map.
_BAD_NAME = re.compile(r'[<>:"/\\|?*\x00-\x1f]|^\.|^\s|[\s.]$')


@dataclass(frozen=True)
class Entry:
    """One line of a list. where: file and line, for messages; case: its name, or None for that of the file."""

    where: str
    case: str | None
    paths: tuple[Path, ...]


def is_list(path: Path) -> bool:
    """Whether a path means a list of cases: by its ending, .txt or .csv, in any case; no folder is one."""
    return path.suffix.lower() in LIST_SUFFIXES and not path.is_dir()


def read_list(path: Path) -> list[Entry]:
    """Return the entries of a list in the order of its lines.

    .txt: one case a line, its channels' files separated by tabs; blanks around a path do not count.
    .csv: a header `case,channel0,channel1,...`, then one case a line.
    Blank lines and those that start with `#` are ignored; relative paths start at the folder of the list. UTF-8.

    Raises InputError, naming list and line, for a list that cannot be read or is empty, an empty field, a wrong header,
    and names of cases that are no file names.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror or error}); check the path") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a list of paths in UTF-8 ({error.reason}); save it as UTF-8 text") from None
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip() and line.lstrip()[0] != "#"]
    if not lines:
        raise InputError(f"{path}: an empty list; write one image path a line")
    return _from_csv(path, lines) if path.suffix.lower() == ".csv" else _from_text(path, lines)


def _from_text(path: Path, lines: list[tuple[int, str]]) -> list[Entry]:
    entries = []
    for number, line in lines:
        where = f"{path}, line {number}"
        fields = [field.strip() for field in line.strip().split("\t")]
        if not all(fields):
            raise InputError(f"{where}: an empty path between tabs; one tab separates the channels of a case")
        entries.append(Entry(where, None, tuple(path.parent / field for field in fields)))
    return entries


def _from_csv(path: Path, lines: list[tuple[int, str]]) -> list[Entry]:
    rows = [(number, _cells(f"{path}, line {number}", line)) for number, line in lines]
    number, header = rows[0]
    expected = ["case", *(f"channel{i}" for i in range(max(1, len(header) - 1)))]
    if header != expected:
        raise InputError(
            f"{path}, line {number}: header '{','.join(header)}', expected '{','.join(expected)}': one column for the "
            "name of the case and one for each channel"
        )
    entries = []
    for number, cells in rows[1:]:
        where = f"{path}, line {number}"
        if len(cells) != len(header):
            raise InputError(f"{where}: {len(cells)} columns, the header has {len(header)} ({','.join(header)})")
        for name, cell in zip(header, cells, strict=True):
            if not cell:
                raise InputError(f"{where}: column '{name}' is empty")
        if _BAD_NAME.search(cells[0]):
            raise InputError(f"{where}: case '{cells[0]}' cannot be the name of a file; use letters, digits, _ and -")
        entries.append(Entry(where, cells[0], tuple(path.parent / cell for cell in cells[1:])))
    if not entries:
        raise InputError(f"{path}: a header and no case; write one case a line")
    return entries


def _cells(where: str, line: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line], strict=True))]
    except csv.Error as error:
        raise InputError(f"{where}: not a line of CSV ({error})") from None
