"""Pixels of DICOM frames: decoded, rescaled to what they measure, in the smallest type that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightm.errors import InputError
from lightm.images.archives import Member
from lightm.images.dicom_files import Frame, Header, open_file, pydicom_module, quietly, reason, text
from lightm.images.limits import MAX_DEFLATE, MAX_VOXELS, check_bytes, naming

_PLAIN = {"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"}
_DEEPEST_BYTES = 8  # of a pixel, DoubleFloatPixelData


def check_pixels(header: Header) -> tuple[int, int, int]:
    """Return frames, rows and columns of a file; raises InputError for colour, missing or absurd sizes."""
    data, file = header.data, header.file
    samples, colour = text(data, "SamplesPerPixel"), text(data, "PhotometricInterpretation")
    if (samples or "1") != "1" or colour not in ("MONOCHROME1", "MONOCHROME2", None):
        raise InputError(
            f"{file}: a colour image ({colour}, {samples} samples a pixel); only grey images are read, "
            "remove it or export the original series"
        )
    if not header.syntax:
        raise InputError(f"{file}: no TransferSyntaxUID, so its pixels cannot be decoded; export the file again")
    sizes = []
    for keyword in ("NumberOfFrames", "Rows", "Columns"):
        value = text(data, keyword)
        if value is None and keyword == "NumberOfFrames":
            value = "1"
        try:
            sizes.append(int(value or ""))
        except ValueError:
            sizes.append(0)
        if sizes[-1] <= 0:
            raise InputError(f"{file}: {keyword} is {value or 'missing'}; export the file again")
    frames, rows, columns = sizes
    voxels = frames * rows * columns
    if voxels > MAX_VOXELS:
        raise InputError(f"{file}: {frames} frames of {rows} x {columns}; at most {MAX_VOXELS} voxels are read")
    # more pixels than the file can hold, or the machine, are refused before they are decoded
    bits = text(data, "BitsAllocated") or "16"
    stored = max(1, int(bits)) if bits.isdigit() and len(bits) < 4 else 16
    size = file.stat().st_size if isinstance(file, Path) else file.size
    if voxels * stored // 8 > size * (1 if header.syntax in _PLAIN else MAX_DEFLATE):
        raise InputError(
            f"{file}: its header promises {voxels} pixels of {stored} bits, which {size} bytes cannot hold "
            "(truncated, or a corrupt header); export it again"
        )
    with naming(file):
        check_bytes(voxels * max(_DEEPEST_BYTES, stored // 8), "its pixels")
    return frames, rows, columns


def check_modality_lut(header: Header, groups: Sequence[Any]) -> None:
    """Raise InputError for a table of measured values, which is not applied here."""
    if any("ModalityLUTSequence" in group for group in groups):
        raise InputError(
            f"{header.file}: its values go through a table (ModalityLUTSequence), which is not applied; "
            "export the series with RescaleSlope and RescaleIntercept"
        )


def raw_frames(header: Header) -> np.ndarray:
    """Return the stored pixels of one file as (frames, rows, columns).

    Raises InputError, naming the file, for pixels that are missing, cannot be decoded or have another size than the
    header says. Memory: the file and its pixels.
    """
    frames, rows, columns = check_pixels(header)
    pydicom = pydicom_module()
    try:
        with quietly(), open_file(header.file) as stream:
            data = pydicom.dcmread(stream, force=True)  # it was read before; without preamble it must be asked for
            if not data.file_meta.get("TransferSyntaxUID"):
                data.file_meta.TransferSyntaxUID = header.syntax
            if not any(key in data for key in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
                raise InputError(f"{header.file}: no pixels in the file; export it again, with its pixels")
            pixels = np.asarray(data.pixel_array)
    except InputError as error:
        raise InputError(str(error) if str(header.file) in str(error) else f"{header.file}: {error}") from None
    except MemoryError:
        raise InputError(f"{header.file}: not enough memory to read its pixels") from None
    except Exception as error:
        raise InputError(_undecodable(header, error)) from None
    if pixels.size != frames * rows * columns:
        raise InputError(
            f"{header.file}: {pixels.shape} pixels came out, its header says {frames} frames of {rows} x {columns}; "
            "export it again"
        )
    return pixels.reshape(frames, rows, columns)


def fill(out: np.ndarray, frames: list[Frame]) -> np.ndarray:
    """Read each frame's pixels, times slope plus intercept, into out[i]; return `out`, wider where values need it."""
    by_file: dict[Path | Member, list[tuple[int, Frame]]] = {}
    for place, frame in enumerate(frames):
        by_file.setdefault(frame.header.file, []).append((place, frame))
    for places in by_file.values():
        raw = raw_frames(places[0][1].header)
        for place, frame in places:
            values = scaled(raw[frame.index], frame.slope, frame.intercept)
            if not _holds(out.dtype, values):
                # More bits are set than BitsStored promises.
                out = out.astype(values.dtype)
            out[place] = values
    return out


def scaled(raw: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """Return stored * slope + intercept: integers where both are whole numbers, else float32."""
    whole = slope.is_integer() and intercept.is_integer() and max(abs(slope), abs(intercept)) < 2**31
    if raw.dtype.kind in "iu" and whole:
        values = raw.astype(np.int64) * int(slope) + int(intercept)
        return values.astype(np.int32) if _holds(np.dtype(np.int32), values) else values.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # what is infinite is refused with its place
        return (raw.astype(np.float64) * slope + intercept).astype(np.float32)


def volume_dtype(frames: list[Frame]) -> np.dtype:
    """Return int16 or int32 where whole slopes and the bits stored allow it, else float32."""
    low, high = 0.0, 0.0
    for frame in frames:
        data = frame.header.data
        if not (frame.slope.is_integer() and frame.intercept.is_integer()):
            return np.dtype(np.float32)
        bits = text(data, "BitsStored") or text(data, "BitsAllocated") or "16"
        count = int(bits) if bits.isdigit() and 1 <= int(bits) <= 32 else 16
        signed = text(data, "PixelRepresentation") == "1"
        ends = (-(2 ** (count - 1)), 2 ** (count - 1) - 1) if signed else (0, 2**count - 1)
        values = [end * frame.slope + frame.intercept for end in ends]
        low, high = min(low, *values), max(high, *values)
    for kind in (np.int16, np.int32):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return np.dtype(kind)
    return np.dtype(np.float32)


def _holds(dtype: np.dtype, values: np.ndarray) -> bool:
    if dtype.kind == "f":
        return True
    if values.dtype.kind == "f":
        return False
    limits = np.iinfo(dtype)
    return bool(limits.min <= values.min() and values.max() <= limits.max)


def _undecodable(header: Header, error: Any) -> str:
    with quietly():
        name = str(pydicom_module().uid.UID(header.syntax).name)
        compressed = header.syntax not in _PLAIN
    cure = (
        "install a decoder (pip install python-gdcm), decompress the files (gdcmconv --raw), or, "
        "if they are damaged, export them again"
        if compressed
        else "the file is truncated or damaged; export it again"
    )
    return f"{header.file}: its pixels ({name}) cannot be decoded here ({reason(error)}); {cure}"
