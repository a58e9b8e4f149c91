"""How much memory a file may ask for: never more than the machine can give, and never more than the file can hold."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lightm.errors import InputError
from lightm.memory import available_bytes

MAX_VOXELS = 2**31
# Deflate cannot pack tighter than 1032 to 1, so a header that promises more is wrong.
MAX_DEFLATE = 1032
_LARGE = 1 << 16  # bytes of a read that is looked at twice
# Voxels of a scan are between a cell's and a table's size, and lie within a kilometre of the scanner.
MIN_STEP_MM, MAX_STEP_MM, MAX_ORIGIN_MM = 1e-5, 1e3, 1e6


def check_bytes(needed: int, what: str) -> None:
    """Raise InputError where `needed` bytes, for `what`, are more than the machine has; before they are asked for."""
    there = available_bytes()
    if there is not None and needed > there:
        raise InputError(
            f"{what} need {needed / 1e9:.3g} GB of memory, and {there / 1e9:.3g} GB are there; crop or resample the "
            "file, or use a machine with more memory"
        )


def check_place(steps_mm: tuple[float, ...], affine: np.ndarray) -> None:
    """Raise InputError for voxel steps or an origin that no scan has; resampling such would ask for any memory."""
    if not np.isfinite(affine).all():
        return  # the volume's to refuse, with its own words, as steps of zero are
    longest = max(*steps_mm, float(np.abs(affine[:3, :3]).max()))
    if longest > MAX_STEP_MM or 0 < min(steps_mm) < MIN_STEP_MM:
        raise InputError(
            f"voxels of {' x '.join(f'{step:.4g}' for step in steps_mm[::-1])} mm (x, y, z); between {MIN_STEP_MM:g} "
            f"and {MAX_STEP_MM:g} mm are read, save the file with its true spacing in millimetres"
        )
    away = float(np.abs(affine[:3, 3]).max())
    if away > MAX_ORIGIN_MM:
        raise InputError(
            f"its first voxel lies {away:.3g} mm away; at most {MAX_ORIGIN_MM:g} mm are read, save the file with its "
            "true origin"
        )


class _Capped(io.BufferedReader):
    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _LARGE:
            here = self.tell()
            size = max(0, min(size, self.seek(0, os.SEEK_END) - here))
            self.seek(here)
        return super().read(size)


def opened(file: Path) -> io.BufferedReader:
    """Open a file for a parser that asks for as many bytes as some length in it says: it gets what is there.

    Python reserves the memory for a read before it looks at what the file has left.
    """
    return _Capped(io.FileIO(file))


class MemoryGate:
    """Lets threads hold files at the same time only as far as their voxels fit together into half of the memory.

    One that needs more by itself waits until the others are done, and goes alone.
    """

    def __init__(self, limit: int | None = None) -> None:
        there = limit if limit is not None else (available_bytes() or (4 << 30)) // 2
        self._limit, self._held, self._ready = there, 0, threading.Condition()

    @contextmanager
    def hold(self, needed: int) -> Iterator[None]:
        """Wait until `needed` bytes can be had, and keep them for the block."""
        with self._ready:
            self._ready.wait_for(lambda: self._held == 0 or self._held + needed <= self._limit)
            self._held += needed
        try:
            yield
        finally:
            with self._ready:
                self._held -= needed
                self._ready.notify_all()
