"""What a file may ask for (no more memory than the machine can give or the file can hold) and what it may contain."""

from __future__ import annotations

import io
import os
import struct
import threading
import zlib
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
_FLOAT32_MAX = float(np.finfo(np.float32).max)
# Voxels of a scan are between a cell's and a table's size, and lie within a kilometre of the scanner.
MIN_STEP_MM, MAX_STEP_MM, MAX_ORIGIN_MM = 1e-5, 1e3, 1e6

# What parsers raise for damaged files, LookupError being that of a missing key or index.
PARSE_ERRORS = (OSError, EOFError, zlib.error, struct.error, ValueError, TypeError, OverflowError, LookupError)


@contextmanager
def naming(where: object, kind: str = "", faults: tuple[type[Exception], ...] = (), remedy: str = "") -> Iterator[None]:
    """Let InputErrors of the block begin with `where`; `faults` become such: not a readable file of this kind."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except faults as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(f"{where}: not a readable {kind} file ({reason}); {remedy}") from None


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


class CappedReader(io.BufferedReader):
    """A reader for parsers that ask for as many bytes as some length in a file says: it gets what is there.

    Python reserves the memory for a read before it looks at what is left. length: bytes that `raw` gives at most.
    reads: how often may be read, None for any number; more is an InputError.
    """

    def __init__(self, raw: io.RawIOBase, length: int, reads: int | None = None) -> None:
        super().__init__(raw)
        self._length, self._left = length, reads

    def read(self, size: int | None = -1, /) -> bytes:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise InputError("it holds far more elements than its packed size has room for; unpack the archive")
        if size is not None and size > _LARGE:
            size = max(0, min(size, self._length - self.tell()))
        return super().read(size)


def opened(file: Path) -> io.BufferedReader:
    """Open a file for such a parser."""
    raw = io.FileIO(file)
    return CappedReader(raw, os.fstat(raw.fileno()).st_size)


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


class FiniteCheck:
    """Counts the voxels that are NaN, infinite or beyond float32 in the slabs of one image, in order."""

    def __init__(self) -> None:
        self._slices = self._count = 0
        self._first: tuple[int, ...] = ()

    def see(self, slab: np.ndarray) -> None:
        """Look at the next slices of the first axis; integers cost nothing."""
        start, self._slices = self._slices, self._slices + len(slab)
        if slab.dtype.kind != "f":
            return
        with np.errstate(invalid="ignore"):
            low, high = float(slab.min()), float(slab.max())  # NaN where a voxel is
        if max(-low, high) <= _FLOAT32_MAX and low == low:
            return
        for index, part in enumerate(slab, start):
            bad = ~(np.abs(part) <= _FLOAT32_MAX)
            if bad.any():
                self._first = self._first or (index, *map(int, np.unravel_index(int(bad.argmax()), bad.shape)))
                self._count += int(bad.sum())

    def check(self) -> None:
        """Raise InputError, with number and first place, where there were any."""
        if self._count:
            axes = "z, y, x"[-3 * len(self._first) + 2 :]
            raise InputError(
                f"{self._count} voxels are NaN or infinite, the first at ({axes}) = {self._first}; "
                "replace them, for example with numpy.nan_to_num, and save the file again"
            )


def check_finite(data: np.ndarray) -> None:
    """Raise InputError where an image, (Z, Y, X) or (Y, X), holds such voxels."""
    check = FiniteCheck()
    check.see(data)
    check.check()
