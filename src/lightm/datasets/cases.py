"""What a dataset is: cases with their files, channels and labels, and the problems found in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightm.errors import InputError


@dataclass(frozen=True)
class Case:
    """One case: an image file for each channel, and its label map where there is one."""

    id: str
    images: tuple[Path, ...]
    label: Path | None = None


@dataclass(frozen=True)
class Dataset:
    """Cases for training and for testing, with the names of their channels and labels.

    labels: name to value, ordered by value, background (0) first, without the ignore label. Class index k of a
    network stands for the k-th of them, so values need not be consecutive.
    """

    name: str
    root: Path
    channels: tuple[str, ...]
    labels: dict[str, int]
    ignore_label: int | None
    file_ending: str
    cases: tuple[Case, ...]
    test_cases: tuple[Case, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in the order of class indices, background first."""
        return tuple(self.labels)

    @property
    def values(self) -> tuple[int, ...]:
        """The label value of each class index."""
        return tuple(self.labels.values())

    def case(self, case_id: str) -> Case:
        """Return a training or test case by its id; raises InputError where there is none."""
        for case in (*self.cases, *self.test_cases):
            if case.id == case_id:
                return case
        raise InputError(
            f"{self.root}: no case '{case_id}' among {len(self.cases)} training and {len(self.test_cases)} test cases"
        )


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a dataset: where, what, and how to mend it."""

    severity: Literal["error", "warning"]
    case: str | None
    file: Path | None
    message: str
    cure: str

    def __str__(self) -> str:
        where = str(self.file) if self.file is not None else f"case {self.case}" if self.case else "dataset"
        return f"{where}: {self.message}; {self.cure}"
