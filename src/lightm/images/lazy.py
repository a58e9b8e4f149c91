"""Images of which only a box at a time is converted: voxels stay in the dtype of the file, in memory or on disk.

`read_volume` gives float32 for a file whose header scales its voxels, which is twice the memory of the int16 that the
file holds (and four times more while nibabel computes in float64). Here scaling is applied to what is asked for.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from nibabel.volumeutils import apply_read_scaling

from lightm.errors import InputError
from lightm.images import nifti
from lightm.images.disk_array import Box, Spool
from lightm.images.io import file_suffix, read_volume
from lightm.images.limits import check_bytes
from lightm.images.volume import Volume, affine_spacing_mm, canonical_axes

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_SLAB_BYTES = 8 << 20


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
    """What is known of an image before its voxels are read: its place, and the bytes a voxel has in the file.

    whole: whether the format can be read only as a whole (PNG, DICOM), and `geometry` is that whole.
    """

    geometry: Volume
    itemsize: int
    whole: bool = False


def read_header(path: Path | str) -> Header:
    """Return shape, place and size of voxels of an image; raises InputError as `read_volume` does, for the header."""
    path = Path(path)
    if not _is_streamed(path):
        volume = read_volume(path)
        return Header(volume, volume.data.dtype.itemsize, whole=True)
    with _NamedFaults(path), _opened(path) as stream:
        raw = _Raw.of(stream, path)
        return Header(raw.geometry, raw.dtype.itemsize)


def open_volume(path: Path | str, folder: Path | None = None) -> LazyVolume:
    """Open an image of any format that `read_volume` reads, with its checks and its messages.

    folder=None: the file's voxels are held in memory in the file's dtype. Else nothing is held: boxes are read from
    an uncompressed file itself, and from a temporary copy, unpacked in `folder`, of a compressed one. PNG and DICOM
    are held in any case. Every voxel is read once here, so that NaN, infinities and a damaged file are found.
    """
    path = Path(path)
    if not _is_streamed(path):
        return LazyVolume.of(read_volume(path))
    zipped = file_suffix(path) == ".nii.gz"
    try:
        with _NamedFaults(path), _opened(path) as stream:
            raw = _Raw.of(stream, path)
            if folder is None:
                check_bytes(int(np.prod(raw.shape, dtype=np.int64)) * raw.dtype.itemsize, "its voxels")
            stream.seek(raw.offset)
            if folder is not None and not zipped:
                file = open(path, "rb", buffering=0)  # noqa: SIM115  (kept open)
                spool = Spool(raw.shape, raw.dtype, stream=file, offset=raw.offset)
            else:
                spool = Spool(raw.shape, raw.dtype, folder)
            _fill(stream, raw, None if folder is not None and not zipped else spool)
            if zipped:
                nifti.drain(stream)
    except MemoryError:
        raise InputError(f"{path}: not enough memory to read its voxels; resample or crop the file") from None
    return LazyVolume(raw.geometry, lambda box: raw.convert(spool.read(box)))


def _is_streamed(path: Path) -> bool:
    """Whether this is a NIfTI file that has something in it; `read_volume` has the messages for all else."""
    named = file_suffix(path) in (".nii", ".nii.gz") and "\0" not in str(path)
    return named and path.is_file() and path.stat().st_size > 0


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb") if file_suffix(path) == ".nii.gz" else open(path, "rb"))


@dataclass(frozen=True)
class _Raw:
    """How voxels lie in a file and what is made of them. shape: (Z, Y, X) or (Y, X)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    slope: Any
    inter: Any
    geometry: Volume

    @classmethod
    def of(cls, stream: BinaryIO, path: Path) -> _Raw:
        image = nifti._open(stream)
        zipped = file_suffix(path) == ".nii.gz"
        shape = nifti._shape(image.header, path.stat().st_size * (nifti._MAX_DEFLATE if zipped else 1))[::-1]
        slope, inter = image.dataobj.slope, image.dataobj.inter
        if not (np.isfinite(slope) and np.isfinite(inter)):
            raise InputError(f"the header scales voxels by {slope} and {inter}; save the file with a finite slope")
        dtype = image.header.get_data_dtype()
        final = np.dtype(np.float32) if (slope, inter) != (1, 0) else dtype.newbyteorder("=")
        if final.kind == "f" and final.itemsize > 8:
            final = np.dtype(np.float64)
        affine = nifti._place(image, len(shape))
        stub = np.broadcast_to(np.zeros((), final), shape)
        codes = (int(image.header["sform_code"]), int(image.header["qform_code"]))
        geometry = Volume(stub, affine_spacing_mm(affine, len(shape)), affine, codes)
        return cls(shape, dtype, int(image.dataobj.offset), np.asanyarray(slope), np.asanyarray(inter), geometry)

    def convert(self, voxels: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):  # infinite voxels are refused, with their place
            if (self.slope, self.inter) != (1, 0):
                voxels = apply_read_scaling(voxels, self.slope, self.inter)
            return voxels.astype(self.geometry.data.dtype, copy=False)


def _fill(stream: BinaryIO, raw: _Raw, spool: Spool | None) -> None:
    """Read all voxels in order, keep them in `spool` if there is one, and check that they are finite."""
    rest = [slice(0, size) for size in raw.shape[1:]]
    slice_bytes = int(np.prod(raw.shape[1:], dtype=np.int64)) * raw.dtype.itemsize
    depth = max(1, _SLAB_BYTES // slice_bytes)
    finite = _Finite(raw)
    if spool is None and not finite.needed:
        return  # the header's check told that the file is long enough
    for start in range(0, raw.shape[0], depth):
        stop = min(start + depth, raw.shape[0])
        slab = np.empty((stop - start, *raw.shape[1:]), raw.dtype)
        wanted = memoryview(cast(Any, slab)).cast("B")
        while wanted:
            count = cast(io.RawIOBase, stream).readinto(wanted)
            if not count:
                total, got = slice_bytes * raw.shape[0], slice_bytes * stop - len(wanted)
                raise OSError(f"Expected {total} bytes, got {got} bytes - could the file be damaged?")
            wanted = wanted[count:]
        finite.see(slab, start)
        if spool is not None:
            spool.write((slice(start, stop), *rest), slab)
    finite.check()


class _Finite:
    """Counts voxels that are NaN, infinite or beyond float32, slab by slab, as `read_volume` does for a whole."""

    def __init__(self, raw: _Raw) -> None:
        self.raw = raw
        self.needed = raw.geometry.data.dtype.kind == "f"
        self.count = 0
        self.first: tuple[int, ...] | None = None

    def see(self, slab: np.ndarray, start: int) -> None:
        if not self.needed:
            return
        bad = ~(np.abs(self.raw.convert(slab)) <= _FLOAT32_MAX)
        if not bad.any():
            return
        if self.first is None:
            place = [int(index) for index in np.unravel_index(int(bad.argmax()), bad.shape)]
            self.first = (place[0] + start, *place[1:])
        self.count += int(bad.sum())

    def check(self) -> None:
        if self.first is not None:
            axes = "z, y, x"[-3 * len(self.first) + 2 :]
            raise InputError(
                f"{self.count} voxels are NaN or infinite, the first at ({axes}) = {self.first}; "
                "replace them, for example with numpy.nan_to_num, and save the file again"
            )


class _NamedFaults:
    """Turns what reading a NIfTI file raises into the messages of `lightm.images.nifti.read`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, InputError):
            raise InputError(f"{self.path}: {error}") from None
        if isinstance(error, EOFError):
            raise InputError(f"{self.path}: the file ends too early (truncated); copy or download it again") from None
        if isinstance(error, nifti._FAULTS):
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise InputError(
                f"{self.path}: not a readable NIfTI file ({reason}); copy, download or export it again"
            ) from None
