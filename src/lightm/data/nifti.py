"""NIfTI-1 and NIfTI-2 single files, through nibabel, with every check made before memory is asked for."""

from __future__ import annotations

import gzip
import logging
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from lightm.data.volume import Volume, affine_spacing_mm
from lightm.errors import InputError

MAX_VOXELS = 2**31

# nibabel prints a line for each field of a header that it repairs; a fault that matters is an error here.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL + 1)

# Deflate cannot pack tighter than 1032 to 1, so a header that promises more is wrong.
_MAX_DEFLATE = 1032
_CHUNK = 1 << 20
_FAULTS = (
    ImageFileError,
    HeaderDataError,
    WrapStructError,
    OSError,
    EOFError,
    zlib.error,
    struct.error,
    ValueError,
    TypeError,
    OverflowError,
    KeyError,
    IndexError,
)


def read(path: Path, zipped: bool) -> Volume:
    """Read one file to its end, so that a gzip checksum is verified; raises InputError naming the file."""
    try:
        with gzip.open(path, "rb") if zipped else open(path, "rb") as stream:
            image = _open(cast(BinaryIO, stream))
            shape = _shape(image.header, path.stat().st_size * (_MAX_DEFLATE if zipped else 1))
            data = _voxels(image, shape)
            while zipped and stream.read(_CHUNK):
                pass
        codes = (int(image.header["sform_code"]), int(image.header["qform_code"]))
        affine = np.asarray(image.affine, dtype=np.float64)
        return Volume(data, affine_spacing_mm(affine, data.ndim), affine, codes)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except EOFError:
        raise InputError(f"{path}: the file ends too early (truncated); copy or download it again") from None
    except _FAULTS as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(f"{path}: not a readable NIfTI file ({reason}); copy, download or export it again") from None


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


def _open(stream: BinaryIO) -> Any:
    start = stream.read(544)
    stream.seek(0)
    for order in "<>":
        size = struct.unpack(order + "i", start[:4])[0] if len(start) >= 4 else 0
        for kind, length, at, magic in (
            (nibabel.Nifti1Image, 348, 344, b"n+1\0"),
            (nibabel.Nifti2Image, 540, 4, b"n+2\0"),
        ):
            if size == length:
                if start[at : at + 4] != magic:
                    raise InputError(
                        "its header is not that of a single NIfTI file (wrong magic); convert it to .nii.gz"
                    )
                return kind.from_stream(stream)
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


def _voxels(image: Any, shape: tuple[int, ...]) -> np.ndarray:
    slope, inter = image.dataobj.slope, image.dataobj.inter
    if slope == 1 and inter == 0:
        data = np.asarray(image.dataobj)
    else:
        if not (np.isfinite(slope) and np.isfinite(inter)):
            raise InputError(f"the header scales voxels by {slope} and {inter}; save the file with a finite slope")
        with np.errstate(over="ignore"):  # infinite voxels are refused by the caller, with their place
            data = np.asarray(image.dataobj).astype(np.float32)
    if data.dtype.kind == "f" and data.dtype.itemsize > 8:
        data = data.astype(np.float64)
    if not data.dtype.isnative:
        data = data.astype(data.dtype.newbyteorder("="))
    return data.reshape(shape, order="F").T
