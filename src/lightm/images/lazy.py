"""Images of which only a box at a time is converted: voxels stay in the dtype of the file, in memory or on disk.

`read_volume` gives float32 for a file whose header scales its voxels, which is twice the memory of the int16 that the
file holds (and four times more while nibabel computes in float64). Here scaling is applied to what is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lightm.errors import InputError
from lightm.images import nifti
from lightm.images.disk_array import Box, DiskArray
from lightm.images.io import file_suffix, read_volume, split_path
from lightm.images.limits import check_bytes
from lightm.images.volume import Volume, canonical_axes


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


@dataclass(frozen=True)
class Header:
    """What is known of an image before its voxels are read: its place, and the bytes per voxel has in the file.

    whole: whether the format can be read only as a whole (all but NIfTI), and `geometry` is that whole.
    """

    geometry: Volume
    itemsize: int
    whole: bool = False


def read_header(path: Path | str) -> Header:
    """Return shape, place and size of voxels of an image; raises InputError as `read_volume` does, for the header."""
    given, (path, channel) = path, split_path(path)
    if not _is_streamed(path):
        volume = read_volume(given)
        return Header(volume, volume.data.dtype.itemsize, whole=True)
    with nifti.opened(path) as stream:
        stored = nifti.read_stored(stream, path, channel)
        return Header(stored.geometry, stored.dtype.itemsize)


def open_volume(path: Path | str, folder: Path | None = None) -> LazyVolume:
    """Open an image of any format that `read_volume` reads, with its checks and its messages.

    folder=None: the file's voxels are held in memory in the file's dtype. Else nothing is held: boxes are read from
    an uncompressed file itself, and from a temporary copy, unpacked in `folder`, of a compressed one. Other formats
    are held in any case. Every voxel is read once here, so that NaN, infinities and a damaged file are found.
    """
    given, (path, channel) = path, split_path(path)
    if not _is_streamed(path):
        return LazyVolume.of(read_volume(given))
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
