"""An array in memory, or in a temporary file of which one block at a time is in memory.

A memory map would do the same with less code, but the pages that it touches count as memory of the process until the
system takes them back, so that no limit could be kept.
"""

from __future__ import annotations

import io
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np

from lightm.errors import LightMError

Box = tuple[slice, ...]


class DiskArray:
    """An array of two axes or more, C order, zeros at first.

    folder=None: in memory. Else in a file without a name there, which is gone when the object is, or the process;
    only what was written takes space on disk. `stream` and `offset`: in this open file instead, which is only read.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: np.dtype | type,
        folder: Path | None = None,
        *,
        stream: io.RawIOBase | None = None,
        offset: int = 0,
    ) -> None:
        self.shape = tuple(int(size) for size in shape)
        self.dtype = np.dtype(dtype)
        self._array: np.ndarray | None = None
        self._file: io.RawIOBase | None = stream
        self._offset = offset
        self._folder = folder
        if stream is None and folder is None:
            self._array = np.zeros(self.shape, self.dtype)
        elif stream is None:
            try:
                file = tempfile.TemporaryFile(dir=folder, prefix=".lightm-", buffering=0)  # noqa: SIM115  (kept open)
                file.truncate(prod(self.shape) * self.dtype.itemsize)
            except OSError as error:
                raise self._refusal(error) from None
            self._file = file
        if self._file is not None:
            weakref.finalize(self, self._file.close)

    @property
    def held(self) -> bool:
        """Whether the whole array is in memory."""
        return self._array is not None

    def read(self, box: Box) -> np.ndarray:
        """Return the voxels of a box, one slice with both ends per axis: a view in memory, a copy from a file."""
        if self._array is not None:
            return self._array[box]
        result = np.empty([part.stop - part.start for part in box], self.dtype)
        last = box[-1]
        whole = last.stop - last.start == self.shape[-1]
        for (start, count), target in self._runs(box, result):
            row = target if whole else np.empty((count, self.shape[-1]), self.dtype)
            self._read_into(start, row)
            if not whole:
                target[...] = row[:, last]
        return result

    def write(self, box: Box, values: np.ndarray) -> None:
        """Store the voxels of a box; nothing is done for a view that `read` gave.

        Raises LightMError where the disk refuses.
        """
        if self._array is not None:
            if not np.may_share_memory(self._array, values):
                self._array[box] = values
            return
        last = box[-1]
        whole = last.stop - last.start == self.shape[-1]
        for (start, count), source in self._runs(box, values):
            if not whole:
                rows = np.empty((count, self.shape[-1]), self.dtype)
                self._read_into(start, rows)
                rows[:, last] = source
                source = rows
            self._seek(start)
            data = memoryview(cast(Any, np.ascontiguousarray(source))).cast("B")
            try:
                while data:
                    data = data[self._open().write(data) or 0 :]
            except OSError as error:
                raise self._refusal(error) from None

    def _runs(self, box: Box, values: np.ndarray) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
        """Runs of whole rows that lie together in the file: (first row, rows), and their part of `values`."""
        rows = box[-2]
        if values.size == 0:
            return
        for place in product(*(range(part.stop - part.start) for part in box[:-2])):
            first = 0
            for part, index, size in zip(box, place, self.shape[:-2], strict=False):
                first = first * size + part.start + index
            yield (first * self.shape[-2] + rows.start, rows.stop - rows.start), values[place]

    def _read_into(self, row: int, target: np.ndarray) -> None:
        self._seek(row)
        data = memoryview(cast(Any, target)).cast("B")
        while data:
            count = self._open().readinto(data)
            if not count:
                raise OSError("the file ends too early; it was changed while it was read")
            data = data[count:]

    def _seek(self, row: int) -> None:
        self._open().seek(self._offset + row * self.shape[-1] * self.dtype.itemsize)

    def _open(self) -> io.RawIOBase:
        if self._file is None:
            raise LightMError("the array was closed")
        return self._file

    def _refusal(self, error: OSError) -> LightMError:
        return LightMError(
            f"{self._folder}: a temporary file of {prod(self.shape) * self.dtype.itemsize / 1e6:.0f} MB cannot be "
            f"written there ({error.strerror or error}); make space, or name another folder by the environment "
            f"variable {'TEMP' if os.name == 'nt' else 'TMPDIR'}"
        )

    def close(self) -> None:
        """Give the memory or the file back."""
        self._array = None
        if self._file is not None:
            self._file.close()
            self._file = None
