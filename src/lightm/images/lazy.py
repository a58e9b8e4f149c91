"""Images of which only a box at a time is converted: voxels stay in the dtype of the file, in memory or on disk.

`read_volume` gives float32 for a file whose header scales its voxels, which is twice the memory of the int16 that the
file holds (and four times more while nibabel computes in float64). Here scaling is applied to what is asked for.

On disk: a memory map would do what `DiskArray` does with less code, but the pages that it touches count as memory of
the process until the system takes them back, so that no limit could be kept.
"""

from __future__ import annotations

import io
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np

from lightm.errors import InputError, LightMError
from lightm.images import nifti
from lightm.images.io import file_suffix, read_volume, split_path
from lightm.images.limits import check_bytes
from lightm.images.volume import Volume, canonical_axes

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
            file, data = self._at(start), memoryview(cast(Any, np.ascontiguousarray(source))).cast("B")
            try:
                while data:
                    data = data[file.write(data) or 0 :]
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
        file, data = self._at(row), memoryview(cast(Any, target)).cast("B")
        while data:
            count = file.readinto(data)
            if not count:
                raise OSError("the file ends too early; it was changed while it was read")
            data = data[count:]

    def _at(self, row: int) -> io.RawIOBase:
        """The file at the start of a row."""
        if self._file is None:
            raise LightMError("the array was closed")
        self._file.seek(self._offset + row * self.shape[-1] * self.dtype.itemsize)
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


@dataclass(frozen=True)
class LazyVolume:
    """A volume whose voxels are read by the box.

    geometry: a `Volume` of the right shape, dtype and place, whose voxels are all one zero that takes no memory.
    read: box in the axis order of `geometry` -> voxels as `read_volume` gives them, to be left unchanged.
    """

    geometry: Volume
    read: Callable[[Box], np.ndarray]

    @classmethod
    def of(cls, volume: Volume) -> LazyVolume:
        """A volume that is in memory already, as it is."""
        return cls(volume, lambda box: volume.data[box])

    def read_canonical(self, box: Box) -> np.ndarray:
        """Return a box of `geometry.to_canonical()`; a view or a copy."""
        axes = canonical_axes(self.geometry)
        native = [slice(0, 0)] * len(box)
        for part, (axis, flipped) in zip(box, axes, strict=True):
            length = self.geometry.shape[axis]
            native[axis] = slice(length - part.stop, length - part.start) if flipped else part
        voxels = self.read(tuple(native)).transpose([axis for axis, _ in axes])
        return voxels[tuple(slice(None, None, -1 if flipped else 1) for _, flipped in axes)]


def spread_voxels(image: LazyVolume, count: int = 100_000) -> np.ndarray:
    """Return about `count` voxels of an image, spread evenly over at most 48 of its slices, in one axis."""
    shape = image.geometry.shape
    if len(shape) == 2:
        slices: list[Box] = [(slice(0, shape[0]), slice(0, shape[1]))]
    else:
        depth = min(48, shape[0])
        places = sorted({int((index + 0.5) * shape[0] / depth) for index in range(depth)})
        slices = [(slice(place, place + 1), *(slice(0, size) for size in shape[1:])) for place in places]
    step = max(1, prod(shape[-2:]) * len(slices) // count)
    # Whole columns must not be all that is seen of a picture whose width the step divides.
    step += step > 1 and shape[-1] % step == 0
    return np.concatenate([image.read(box).ravel()[index % step :: step] for index, box in enumerate(slices)])


@dataclass(frozen=True)
class Header:
    """What is known of an image before its voxels are read: its place, and the bytes per voxel has in the file.

    whole: whether the format can be read only as a whole (all but NIfTI), and `geometry` is that whole.
    """

    geometry: Volume
    itemsize: int
    whole: bool = False


def read_header(path: Path | str, *, correct_gantry_tilt: bool = False) -> Header:
    """Return shape, place and size of voxels of an image; raises InputError as `read_volume` does, for the header."""
    given, (path, channel) = path, split_path(path)
    if not _is_streamed(path):
        volume = read_volume(given, correct_gantry_tilt=correct_gantry_tilt)
        return Header(volume, volume.data.dtype.itemsize, whole=True)
    with nifti.opened(path) as stream:
        stored = nifti.read_stored(stream, path, channel)
        return Header(stored.geometry, stored.dtype.itemsize)


def open_volume(path: Path | str, folder: Path | None = None, *, correct_gantry_tilt: bool = False) -> LazyVolume:
    """Open an image of any format that `read_volume` reads, with its checks and its messages.

    folder=None: the file's voxels are held in memory in the file's dtype. Else boxes are read from an uncompressed file
    itself, or from a temporary copy, unpacked in `folder`, of a compressed one. Other formats are held in any case.
    Every voxel is read once here, so that NaN, infinities and a damaged file are found.
    """
    given, (path, channel) = path, split_path(path)
    if not _is_streamed(path):
        return LazyVolume.of(read_volume(given, correct_gantry_tilt=correct_gantry_tilt))
    in_file = folder is not None and not nifti.is_packed(path)
    try:
        with nifti.opened(path) as stream:
            stored = nifti.read_stored(stream, path, channel)
            if folder is None:
                check_bytes(stored.file_bytes, "its voxels")
            if in_file:
                file = open(path, "rb", buffering=0)  # noqa: SIM115  (kept open)
                held = DiskArray(stored.shape, stored.dtype, stream=file, offset=stored.offset)
            else:
                held = DiskArray(stored.shape, stored.dtype, folder)
            if not in_file or stored.geometry.data.dtype.kind == "f":
                rest = [slice(0, size) for size in stored.shape[1:]]
                for part, slab, _ in stored.slabs(stream):
                    if not in_file:
                        held.write((part, *rest), slab)
    except MemoryError:
        raise InputError(f"{path}: not enough memory to read its voxels; resample or crop the file") from None
    return LazyVolume(stored.geometry, lambda box: stored.convert(held.read(box)))


def _is_streamed(path: Path) -> bool:
    """Whether this is a NIfTI file that has something in it; `read_volume` has the messages for all else."""
    named = file_suffix(path) in (".nii", ".nii.gz") and "\0" not in str(path)
    return named and path.is_file() and path.stat().st_size > 0
