"""NIfTI-1 and NIfTI-2 single files: headers through nibabel, with every check made before memory is asked for.

What a file may ask for: at most 2^31 voxels, if the file can hold them (1032 times its length where it is compressed,
which is deflate's limit) and the machine has the memory; at most 16 MB of header extensions, and 16 MB of anything
behind the voxels. More is an error, so that a small file that unpacks to gigabytes costs neither memory nor time.
"""

from __future__ import annotations

import gzip
import io
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling
from nibabel.wrapstruct import WrapStructError

from lightm.errors import InputError
from lightm.images.limits import (
    MAX_DEFLATE,
    MAX_VOXELS,
    PARSE_ERRORS,
    FiniteCheck,
    check_bytes,
    check_place,
    naming,
)  # fmt: skip
from lightm.images.volume import Volume, affine_spacing_mm

_CHUNK = 1 << 20  # of one read
_SLAB_BYTES = 8 << 20
MAX_EXTRA_BYTES = 16 << 20  # of header extensions before the voxels, and of anything behind them
# sform and qform may place a voxel this far apart, in voxels, before a check remarks on it.
_FORMS_APART = 0.5
_FAULTS = (*PARSE_ERRORS, ImageFileError, HeaderDataError, WrapStructError)


@dataclass(frozen=True)
class Stored:
    """How voxels lie in a file, and what is made of them: all that is known before they are read.

    shape: (Z, Y, X) or (Y, X). dtype: the file's. geometry: a `Volume` of the shape, dtype and place of the result,
    whose voxels are all one zero that takes no memory.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    slope: Any
    inter: Any
    geometry: Volume

    @property
    def scaled(self) -> bool:
        """Whether the header scales the voxels, to float32."""
        return (self.slope, self.inter) != (1, 0)

    @property
    def file_bytes(self) -> int:
        """Bytes of the voxels as stored."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def read_bytes(self) -> int:
        """Bytes of the voxels as `read` gives them."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.geometry.data.dtype.itemsize

    def convert(self, voxels: np.ndarray) -> np.ndarray:
        """Return stored voxels as `read` gives them: scaled by the header, in the machine's byte order."""
        with np.errstate(all="ignore"):  # infinite voxels are refused, with their place
            if self.scaled:
                voxels = apply_read_scaling(voxels, self.slope, self.inter)
            return voxels.astype(self.geometry.data.dtype, copy=False)

    def slabs(self, stream: BinaryIO) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Read all voxels in order, and a compressed file to its end.

        Yields slices of the first axis, their voxels as stored, which the next ones overwrite, and these converted.

        Raises InputError where NaN or infinite voxels were seen, or much lies behind the voxels.
        """
        stream.seek(self.offset)
        per_slice = self.file_bytes // self.shape[0]
        depth, finite = max(1, _SLAB_BYTES // per_slice), FiniteCheck()
        buffer = np.empty((min(depth, self.shape[0]), *self.shape[1:]), self.dtype)
        for start in range(0, self.shape[0], depth):
            part = slice(start, min(start + depth, self.shape[0]))
            slab = buffer[: part.stop - start]
            wanted = memoryview(slab.reshape(-1).view(np.uint8).data)
            while wanted:
                count = cast(io.RawIOBase, stream).readinto(wanted[:_CHUNK])
                if not count:
                    got = per_slice * part.stop - len(wanted)
                    raise OSError(f"Expected {self.file_bytes} bytes, got {got} bytes - could the file be damaged?")
                wanted = wanted[count:]
            converted = self.convert(slab)
            finite.see(converted)
            yield part, slab, converted
        _drain(stream)
        finite.check()


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a .nii or .nii.gz file, unpacked; what reading raises becomes an InputError that names the file."""
    with naming(path, "NIfTI", _FAULTS, "copy, download or export it again"):
        try:
            with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb") as stream:
                yield cast(BinaryIO, stream)
        except EOFError:
            raise InputError("the file ends too early (truncated); copy or download it again") from None


def read_stored(stream: BinaryIO, path: Path) -> Stored:
    """Return what the header of an opened file says, checked; the affine is the sform's where its code is set, else
    the qform's, else that of spacing and shape alone.
    """
    image = _header(stream)
    packed = isinstance(stream, gzip.GzipFile)
    shape = _shape(image.header, path.stat().st_size * (MAX_DEFLATE if packed else 1))[::-1]
    slope, inter = image.dataobj.slope, image.dataobj.inter
    if not (np.isfinite(slope) and np.isfinite(inter)):
        raise InputError(f"the header scales voxels by {slope} and {inter}; save the file with a finite slope")
    dtype = image.header.get_data_dtype()
    final = np.dtype(np.float32) if (slope, inter) != (1, 0) else dtype.newbyteorder("=")
    if final.kind == "f" and final.itemsize > 8:
        final = np.dtype(np.float64)
    affine = np.asarray(image.affine, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        steps = affine_spacing_mm(affine, len(shape))
        check_place(steps, affine)
    codes = (int(image.header["sform_code"]), int(image.header["qform_code"]))
    geometry = Volume(np.broadcast_to(np.zeros((), final), shape), steps, affine, codes)
    return Stored(shape, dtype, int(image.dataobj.offset), np.asanyarray(slope), np.asanyarray(inter), geometry)


def read(path: Path) -> Volume:
    """Read one file to its end, so that a gzip checksum is verified; raises InputError naming the file.

    Memory: the voxels, and some 16 MB while they are read.
    """
    with opened(path) as stream:
        stored = read_stored(stream, path)
        check_bytes(stored.read_bytes, "its voxels")
        data = np.empty(stored.shape, stored.geometry.data.dtype)
        for part, _, voxels in stored.slabs(stream):
            data[part] = voxels
        return stored.geometry.with_data(data)


def voxel_bytes(path: Path) -> int:
    """Return the bytes that reading this file takes, from its header alone; 0 for one that `read` refuses."""
    try:
        with opened(path) as stream:
            return read_stored(stream, path).read_bytes
    except (InputError, MemoryError):
        return 0


def remarks(path: Path) -> list[tuple[str, str]]:
    """Return what is odd about the place that a readable file's header gives, each with its cure."""
    found = []
    try:
        with opened(path) as stream:
            header = _header(stream).header
            shape = tuple(int(size) for size in header.get_data_shape())
            units = header.get_xyzt_units()[0]
            sform, qform = header.get_sform(), header.get_qform()
    except (InputError, MemoryError):
        return []
    codes = int(header["sform_code"]), int(header["qform_code"])
    if len(shape) > 2 and not any(codes):
        remark = "neither sform nor qform is set, so its directions are not known; spacing alone is used"
        remedy = "export it with its geometry, or make sure that left and right are as in the other cases"
        found.append((remark, remedy))
    if min(codes) > 0:
        corner = np.array([*(size - 1 for size in (*shape, 1, 1)[:3]), 1.0])
        step = min(affine_spacing_mm(sform, 3)) or 1.0
        apart = max(float(np.linalg.norm((sform - qform) @ place)) for place in (corner, np.array([0, 0, 0, 1.0])))
        if apart > _FORMS_APART * step:
            remark = f"sform and qform place it up to {apart:.3g} mm apart; the sform is used"
            found.append((remark, "save it with one geometry, other programs may take the qform"))
    if units in ("meter", "micron"):
        remark = f"its unit is the {units}; lengths are taken as millimetres all the same"
        found.append((remark, "save it in millimetres"))
    return found


def encoder(volume: Volume, zipped: bool) -> Callable[[BinaryIO], None]:
    """Return a function that writes the volume as NIfTI-1; equal volumes give equal bytes."""
    data = volume.data
    if data.dtype == np.bool_:
        data = data.astype(np.uint8)
    elif data.dtype == np.float16:  # not a NIfTI type
        data = data.astype(np.float32)
    if max(data.shape) > 32767:
        raise InputError(f"NIfTI-1 holds at most 32767 voxels along an axis, got shape {volume.shape}")
    image = nibabel.Nifti1Image(data.T, volume.affine, dtype=data.dtype)
    sform, qform = volume.form_codes
    image.header.set_xyzt_units("mm")
    image.set_sform(volume.affine, code=sform)
    image.set_qform(volume.affine, code=qform)
    # Codes of another file need not be able to express this affine (a sheared one, or none given at all).
    stored = image.header.get_best_affine()
    if np.abs(stored - volume.affine).max() > 1e-4 * min(volume.spacing_mm):
        image.set_sform(volume.affine, code=max(sform, 1))

    def encode(stream: BinaryIO) -> None:
        if not zipped:
            image.to_stream(stream)
            return
        with gzip.GzipFile(filename="", mode="wb", fileobj=stream, compresslevel=4, mtime=0) as packed:
            image.to_stream(packed)

    return encode


# Image, length of its header, place of its magic, and code and place of the voxels' offset and the number of axes.
_LAYOUTS: list[tuple[Any, ...]] = [
    (nibabel.Nifti1Image, 348, 344, b"n+1\0", ("f", 108), ("h", 40)),
    (nibabel.Nifti2Image, 540, 4, b"n+2\0", ("q", 168), ("q", 16)),
]


def _header(stream: BinaryIO) -> Any:
    start = stream.read(544)
    stream.seek(0)
    for (kind, length, magic_at, magic, *fields), order in product(_LAYOUTS, "<>"):
        if start[:4] != struct.pack(order + "i", length):
            continue
        if start[magic_at : magic_at + 4] != magic:
            raise InputError("its header is not that of a single NIfTI file (wrong magic); convert it to .nii.gz")
        offset, axes = (struct.unpack_from(order + code, start, at)[0] for code, at in fields)
        if not 0 <= offset <= length + MAX_EXTRA_BYTES:
            raise InputError(
                f"its voxels start at byte {offset}, with at most {MAX_EXTRA_BYTES >> 20} MB of header before "
                "them expected; the header is corrupt, export it again"
            )
        if not 1 <= axes <= 7:
            raise InputError(f"its header gives {axes} axes; 1 to 7 are possible, export it again")
        # Only the header goes to nibabel: header extensions may claim any length, and nothing here needs them.
        with np.errstate(all="ignore"):  # what overflows here is refused later
            return kind.from_stream(io.BytesIO(start[:length] + bytes(4)))
    raise InputError("not a NIfTI file: the first bytes are no NIfTI header; check the format, or export it again")


def _shape(header: Any, most_bytes: int) -> tuple[int, ...]:
    shape = tuple(int(size) for size in header.get_data_shape())
    if not shape or min(shape) < 1:
        raise InputError(f"the header gives shape {shape} (x, y, z, ...); every axis needs at least one voxel")
    squeezed = shape
    while len(squeezed) > 3 and squeezed[-1] == 1:
        squeezed = squeezed[:-1]
    voxels = int(np.prod(squeezed, dtype=object))
    if voxels > MAX_VOXELS:
        raise InputError(
            f"the header gives shape {shape}, {voxels} voxels; at most {MAX_VOXELS} are read. "
            "The header is corrupt, or the file must be cropped or resampled"
        )
    if len(squeezed) > 3 or len(squeezed) < 2:
        raise InputError(
            f"one scan of two or three axes is needed, got shape {shape} (x, y, z, ...); "
            "save each time point, direction or channel as a file of its own"
        )
    kind = header.get_data_dtype()
    if kind.names is not None or kind.kind not in "iuf":
        what = "colour" if kind.names is not None else f"{kind}"
        raise InputError(f"voxels must be real numbers, got {what}; save one grey channel as its own file")
    offset = float(header["vox_offset"])
    if not 0 <= offset <= most_bytes or offset + voxels * kind.itemsize > most_bytes:
        raise InputError(
            f"the header promises {voxels} voxels of {kind.itemsize} bytes, shape {shape}, which the file is too "
            "short to hold (truncated, or a corrupt header); copy or download it again"
        )
    return squeezed


def _drain(stream: BinaryIO) -> None:
    """Read a compressed file to its end, which checks its sum; raises InputError where much lies behind the voxels."""
    if not isinstance(stream, gzip.GzipFile):
        return
    extra = 0
    while block := stream.read(_CHUNK):
        extra += len(block)
        if extra > MAX_EXTRA_BYTES:
            raise InputError(
                f"it unpacks to over {MAX_EXTRA_BYTES >> 20} MB more than its header promises; the header is corrupt, "
                "or the file is made to fill the memory"
            )
