"""NIfTI-1 and NIfTI-2 single files: headers through nibabel, with every check made before memory is asked for.

What a file may ask for: at most 2^31 voxels, if the file can hold them (1032 times its length where it is compressed,
which is deflate's limit) and the machine has the memory; at most 16 MB of header extensions, and 16 MB of anything
behind the voxels. More is an error, so that a small file that unpacks to gigabytes costs neither memory nor time.
"""

from __future__ import annotations

import gzip
import io
import logging
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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

_silent = logging.Logger("nibabel, silent", level=logging.CRITICAL + 1)
_CHUNK = 1 << 20  # of one read
_SLAB_BYTES = 8 << 20
MAX_EXTRA_BYTES = 16 << 20  # of header extensions before the voxels, and of anything behind them
# sform and qform may place a voxel this far apart, in voxels, before a check remarks on it.
_FORMS_APART = 0.5
_FAULTS = (*PARSE_ERRORS, ImageFileError, HeaderDataError, WrapStructError)


class _Lenient:
    """What other programs write and nibabel refuses: a qform rounded beyond a unit quaternion, or without meaning."""

    def get_qform_quaternion(self) -> np.ndarray:
        found: Any = super()
        b, c, d = (float(self[f"quatern_{part}"]) for part in "bcd")  # type: ignore[index]
        norm = np.sqrt(b * b + c * c + d * d)
        return np.array([0.0, b, c, d]) / norm if 1 < norm < 1.001 else found.get_qform_quaternion()

    def get_qform(self, coded: bool = False) -> Any:
        found: Any = super()
        try:
            with np.errstate(all="ignore"):  # what is not finite is refused
                return found.get_qform(coded)
        except (HeaderDataError, ValueError):
            return (np.full((4, 4), np.nan), int(self["qform_code"])) if coded else np.full((4, 4), np.nan)  # type: ignore[index]


class _Header1(_Lenient, nibabel.Nifti1Header):
    """NIfTI-1."""


class _Header2(_Lenient, nibabel.Nifti2Header):
    """NIfTI-2."""


@dataclass(frozen=True)
class Stored:
    """How voxels lie in a file, and what is made of them: all that is known before they are read.

    shape: (Z, Y, X) or (Y, X). dtype: the file's. geometry: a `Volume` of the shape, dtype and place of the result,
    whose voxels are all one zero that takes no memory. behind: bytes of further channels after these voxels.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    slope: Any
    inter: Any
    geometry: Volume
    behind: int = 0

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
        _drain(stream, self.behind)
        finite.check()


def is_packed(path: Path) -> bool:
    """Whether the content of a file is compressed by gzip."""
    with open(path, "rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a NIfTI file, unpacked if its content is compressed; a failure becomes an InputError that names the file."""
    with naming(path, "NIfTI", _FAULTS, "copy, download or export it again"):
        try:
            with gzip.open(path, "rb") if is_packed(path) else open(path, "rb") as stream:
                yield cast(BinaryIO, stream)
        except EOFError:
            raise InputError("the file ends too early (truncated); copy or download it again") from None


def read_stored(stream: BinaryIO, path: Path, channel: int | None = None) -> Stored:
    """Return what the header of an opened file says, checked, of one channel of it.

    The affine is the sform's where its code is set and it is usable, else the qform's, else that of spacing and shape
    alone.
    """
    header = _header(stream)
    packed = isinstance(stream, gzip.GzipFile)
    found, channels = _shape(header, path.stat().st_size * (MAX_DEFLATE if packed else 1))
    shape = found[::-1]
    if channel is None and channels > 1:
        raise InputError(
            f"it holds {channels} volumes of shape {found} (x, y, z): channels, time points or directions. Give one by "
            f"its number, as in {path.name}::0, or all of them as the channels of a case"
        )
    if not 0 <= (channel or 0) < channels:
        raise InputError(f"it holds {channels} channel(s), numbered from 0; there is no channel {channel}")
    slope, inter = header.get_slope_inter()
    slope, inter = 1.0 if slope is None else slope, 0.0 if inter is None else inter
    if not (np.isfinite(slope) and np.isfinite(inter)):
        raise InputError(f"the header scales voxels by {slope} and {inter}; save the file with a finite slope")
    dtype = header.get_data_dtype()
    final = np.dtype(np.float32) if (slope, inter) != (1, 0) else dtype.newbyteorder("=")
    if final.kind == "f" and final.itemsize > 8:
        final = np.dtype(np.float64)
    geometry = _place(header, np.broadcast_to(np.zeros((), final), shape))
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    offset, behind = int(header.get_data_offset()) + (channel or 0) * size, (channels - 1 - (channel or 0)) * size
    return Stored(shape, dtype, offset, np.asanyarray(slope), np.asanyarray(inter), geometry, behind)


def _place(header: Any, data: np.ndarray) -> Volume:
    """Give voxels the place of a header: of its sform, of its qform where that is unusable, or of spacing alone."""
    errors: list[InputError] = []
    codes = int(header["sform_code"]), int(header["qform_code"])
    places: dict[str, np.ndarray] = {}
    for name, code in zip(("sform", "qform"), codes, strict=True):
        if code > 0:
            try:
                places[name] = np.asarray(getattr(header, f"get_{name}")(), dtype=np.float64)
                _volume(data, places[name], codes)
            except (InputError, HeaderDataError, ValueError) as error:
                errors.append(InputError(str(error)))
                places.pop(name, None)
    if not any(code > 0 for code in codes):
        return _volume(data, np.asarray(header.get_base_affine(), dtype=np.float64), codes)
    if not places:
        raise errors[0]
    volume = _volume(data, next(iter(places.values())), codes)
    return replace(volume, qform=places["qform"]) if len(places) == 2 else volume


def _volume(data: np.ndarray, affine: np.ndarray, codes: tuple[int, int]) -> Volume:
    with np.errstate(over="ignore", invalid="ignore"):
        steps = affine_spacing_mm(affine, data.ndim)
        check_place(steps, affine)
        return Volume(data, steps, affine, codes)


def channel_count(path: Path) -> int:
    """How many volumes a file holds, from its header; raises InputError naming the file."""
    with opened(path) as stream:
        header = _header(stream)
        return _shape(header, path.stat().st_size * (MAX_DEFLATE if isinstance(stream, gzip.GzipFile) else 1))[1]


def read(path: Path, channel: int | None = None) -> Volume:
    """Read one file to its end, so that a gzip checksum is verified; raises InputError naming the file.

    Memory: the voxels, and some 16 MB while they are read.
    """
    with opened(path) as stream:
        stored = read_stored(stream, path, channel)
        check_bytes(stored.read_bytes, "its voxels")
        data = np.empty(stored.shape, stored.geometry.data.dtype)
        for part, _, voxels in stored.slabs(stream):
            data[part] = voxels
        return stored.geometry.with_data(data)


def voxel_bytes(path: Path) -> int:
    """Return the bytes that reading this file takes, from its header alone; 0 for one that `read` refuses."""
    try:
        with opened(path) as stream:
            return read_stored(stream, path, 0).read_bytes
    except (InputError, MemoryError):
        return 0


def remarks(path: Path) -> list[tuple[str, str]]:
    """Return what is odd about the place that a readable file's header gives, each with its cure."""
    found = []
    try:
        with opened(path) as stream:
            header = _header(stream)
            shape = tuple(int(size) for size in header.get_data_shape())
            units = header.get_xyzt_units()[0]
            used = read_stored(stream, path, 0).geometry
    except (InputError, MemoryError):
        return []
    codes = int(header["sform_code"]), int(header["qform_code"])
    if len(shape) > 2 and not any(codes):
        remark = "neither sform nor qform is set, so its directions are not known; spacing alone is used"
        remedy = "export it with its geometry, or make sure that left and right are as in the other cases"
        found.append((remark, remedy))
    if min(codes) > 0 and used.qform is None:
        remark = "one of its two places, sform and qform, is not usable; the other is taken"
        found.append((remark, "save it with one geometry"))
    if used.qform is not None:
        sform, qform = used.affine, used.qform
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
    image.set_qform(volume.affine if volume.qform is None else volume.qform, code=qform)
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


# Header, its length, place of its magic, and code and place of the voxels' offset and the number of axes.
_LAYOUTS: list[tuple[Any, ...]] = [
    (_Header1, 348, 344, b"n+1\0", ("f", 108), ("h", 40)),
    (_Header2, 540, 4, b"n+2\0", ("q", 168), ("q", 16)),
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
            header = kind.from_fileobj(io.BytesIO(start[:length]), check=False)
            header.check_fix(logger=_silent)  # what matters of what it says is checked and said here
            return header
    raise InputError("not a NIfTI file: the first bytes are no NIfTI header; check the format, or export it again")


def _shape(header: Any, most_bytes: int) -> tuple[tuple[int, ...], int]:
    """Shape of one volume, (x, y, z) or (x, y), and how many volumes there are."""
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
    further = [size for size in squeezed[3:] if size > 1]
    if len(further) > 1 or len(squeezed) < 2:
        raise InputError(
            f"one scan of two or three axes, or several along a fourth, are needed, got shape {shape} (x, y, z, ...); "
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
    return squeezed[:3], further[0] if further else 1


def _drain(stream: BinaryIO, behind: int) -> None:
    """Read a compressed file to its end, which checks its sum; raises InputError where much lies behind the voxels."""
    if not isinstance(stream, gzip.GzipFile):
        return
    extra = 0
    while block := stream.read(_CHUNK):
        extra += len(block)
        if extra > behind + MAX_EXTRA_BYTES:
            raise InputError(
                f"it unpacks to over {MAX_EXTRA_BYTES >> 20} MB more than its header promises; the header is corrupt, "
                "or the file is made to fill the memory"
            )
