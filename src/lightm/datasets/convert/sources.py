"""What a finder of a layout finds: cases to write, and the problems of their names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lightm.datasets.cases import Problem
from lightm.images.io import file_suffix


@dataclass(frozen=True)
class Source:
    """A case as it was downloaded.

    images: a file per channel, or one 4D NIfTI file that holds `parts` channels (0: it is none). label: its label
    map; masks: pictures of which any pixel above 0 is label 1, merged. A case without either is for testing.
    """

    case: str
    images: tuple[Path, ...]
    label: Path | None = None
    masks: tuple[Path, ...] = ()
    parts: int = 0


@dataclass
class Found:
    """A data set as it was downloaded: what dataset.json will say, the cases, problems, and remarks to tell."""

    name: str
    channels: tuple[str, ...]
    labels: dict[str, int]
    train: list[Source] = field(default_factory=list)
    test: list[Source] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    about: dict[str, str] = field(default_factory=dict)


def files_below(folder: Path) -> Iterator[Path]:
    """All readable image files below a folder in the order of their paths, without hidden ones (macOS's `._x`)."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(folder).parts)
        if not hidden and file_suffix(path) is not None and path.is_file():
            yield path
