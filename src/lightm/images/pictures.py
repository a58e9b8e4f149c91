"""Pictures (PNG, JPEG, BMP) through Pillow and TIFF stacks through tifffile, in grey or in channels.

What a file may ask for: 2^26 pixels (a TIFF stack 2^31 voxels), and no more bytes than deflate can unpack from its
length (1032 to 1); text and colour profiles as far as Pillow reads them (1 MB each, 64 MB in all).
"""

from __future__ import annotations

import json
import logging
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageSequence

from lightm.errors import InputError
from lightm.images.limits import MAX_DEFLATE, MAX_VOXELS, PARSE_ERRORS, check_bytes, naming, opened
from lightm.images.volume import Volume

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}
# Below the size at which Pillow warns of a decompression bomb, so the refusal is ours and comes first.
MAX_PIXELS = 2**26
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_MILLIMETRES = {"mm": 1.0, "millimeter": 1.0, "cm": 10.0, "micron": 1e-3, "um": 1e-3, "\\u00b5m": 1e-3, "µm": 1e-3}
_FAULTS = (*PARSE_ERRORS, Image.DecompressionBombError, SyntaxError, AttributeError, RuntimeError, ZeroDivisionError)


def read(path: Path, suffix: str, kind: str, channel: int | None = None) -> Volume:
    """Read one file as (Y, X), or a TIFF stack as (Z, Y, X).

    channel: of a colour picture, 0 for red; None reads it as grey (ITU-R BT.601). An alpha channel is left out. A label
    with a palette gives its indices; one in colour, or a JPEG, is refused. Raises InputError naming the file.
    """
    with _named(path, suffix):
        if kind == "label" and suffix in (".jpg", ".jpeg"):
            raise InputError("JPEG changes values, so it cannot hold a label map; save labels as PNG")
        data, steps = _read_tiff(path) if FORMATS[suffix] == "TIFF" else (_read_picture(path, suffix, kind), (1.0, 1.0))
        colours = data.shape[-1] if data.ndim > len(steps) else 1
        if channel is not None:
            if not 0 <= channel < colours:
                raise InputError(f"it holds {colours} channel(s), numbered from 0; there is no channel {channel}")
            data = data[..., channel] if data.ndim > len(steps) else data
        elif colours > 1:
            data = _grey(data, kind)
        return Volume.from_spacing(np.ascontiguousarray(data), steps)


def channel_count(path: Path, suffix: str) -> int:
    """How many channels a file holds, without alpha: 1 or 3, or those of a TIFF. Raises InputError as `read` does."""
    with _named(path, suffix):
        if FORMATS[suffix] == "TIFF":
            with _tiff(path) as (_, shape, dims):
                return shape[-1] if len(shape) > dims else 1
        with _picture(path, suffix) as (picture, _):
            return 3 if picture.mode in ("RGB", "RGBA", "CMYK", "YCbCr") else 1


def voxel_bytes(path: Path, suffix: str) -> int:
    """Return about how much memory the pixels take, from the header alone; raises InputError as `read` does."""
    with _named(path, suffix):
        if FORMATS[suffix] == "TIFF":
            with _tiff(path) as (series, shape, _):
                return int(np.prod(shape, dtype=np.int64)) * series.dtype.itemsize
        with _picture(path, suffix) as (picture, _):
            return picture.size[0] * picture.size[1] * 4


def encoder(volume: Volume, suffix: str) -> Callable[[BinaryIO], None]:
    """Return a function that writes the volume as PNG or BMP (8 bits, PNG 16 for uint16), or as TIFF.

    A TIFF stack keeps its spacing, in ImageJ's words. JPEG is not written: it changes values.
    """
    name, data = FORMATS[suffix], volume.data
    if name == "JPEG":
        raise InputError("JPEG changes values and is not written; use .png")
    if data.dtype == np.bool_:
        data = data.astype(np.uint8)
    if name == "TIFF":
        return _tiff_encoder(volume, data)
    if data.ndim != 2:
        raise InputError(f"{name} holds 2D pictures, got shape {volume.shape}; use .nii.gz")
    if data.dtype.kind not in "iu":
        raise InputError(f"{name} holds whole numbers, got {data.dtype}; scale to uint8 or uint16, or use .nii.gz")
    if data.dtype != np.uint8 and (data.dtype != np.uint16 or name == "BMP"):
        if data.min() < 0 or data.max() > 255:
            raise InputError(
                f"values from {data.min()} to {data.max()}; {name} of {data.dtype} holds 0 to 255, "
                "convert to uint16 and PNG, or use .nii.gz"
            )
        data = data.astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(data))
    return lambda stream: picture.save(stream, format=name)


@contextmanager
def _named(path: Path, suffix: str) -> Iterator[None]:
    """Name the file in every InputError of the block, and make one of whatever a decoder raises."""
    with naming(path, FORMATS[suffix], _FAULTS, "copy or export it again"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # decoders remark on sizes and transparency, which are checked here
        yield


@contextmanager
def _picture(path: Path, suffix: str) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
    """Open a picture with its header checked; with it PNG's bits per channel and kind of colour, else (8, -1)."""
    name = FORMATS[suffix]
    with opened(path) as stream:
        depth, colour, size = 8, -1, None
        if name == "PNG":
            start = stream.read(29)
            if len(start) < 29 or start[:8] != _SIGNATURE or start[8:16] != b"\0\0\0\rIHDR":
                raise InputError("not a PNG file: the first bytes are no PNG header; check the format")
            width, height, depth, colour = struct.unpack(">IIBB", start[16:26])
            size = (width, height)
            _check_header(width, height, depth, _CHANNELS.get(colour, 1), path.stat().st_size)
            if depth == 16 and colour != 0:
                raise InputError(
                    "colour or transparency of 16 bits a channel, of which 8 would be lost; save it as grey of 16 bits"
                )
            stream.seek(0)
        with Image.open(stream, formats=(name,)) as picture:
            if size is not None and picture.size != size:
                raise InputError("two headers of different sizes; export it again")
            if name != "PNG":
                _check_header(picture.width, picture.height, 1, 8 if name == "JPEG" else 1, path.stat().st_size)
            if getattr(picture, "n_frames", 1) > 1:
                raise InputError("an animation of several pictures; save each picture as a file of its own")
            yield picture, (depth, colour)


def _read_picture(path: Path, suffix: str, kind: str) -> np.ndarray:
    """Pixels as (Y, X) or (Y, X, 3), without alpha."""
    with _picture(path, suffix) as (picture, (depth, colour)):
        picture.load()
        if picture.mode in ("1", "L", "I", "I;16", "I;16B") or (picture.mode == "P" and kind == "label"):
            data = np.array(picture, dtype=np.uint8) if picture.mode == "1" else np.array(picture)
            data = data.astype(data.dtype.newbyteorder("="), copy=False)
            # Pillow spreads 2 and 4 bits over 0 to 255; stored values are what is meant
            return data // np.uint8(255 // (2**depth - 1)) if colour == 0 and depth in (2, 4) else data
        if picture.mode not in ("RGB", "RGBA", "LA", "P", "CMYK", "YCbCr", "PA"):
            raise InputError(f"a picture of mode {picture.mode}; save it as grey or RGB of 8 bits")
        return np.array(picture.convert("L" if picture.mode == "LA" else "RGB"))


def _check_header(width: int, height: int, depth: int, channels: int, size: int) -> None:
    if width * height > MAX_PIXELS:
        raise InputError(f"{width} x {height} pixels; at most {MAX_PIXELS} are read, scale the picture down")
    if height * ((width * depth * channels + 7) // 8) > size * MAX_DEFLATE:
        raise InputError(
            f"the header promises {width} x {height} pixels, which the file is too short to hold (truncated, or a "
            "corrupt header); copy or export it again"
        )


def _grey(data: np.ndarray, kind: str) -> np.ndarray:
    """One channel of (..., C): the common one of equal channels, else the luminance of three."""
    if (data == data[..., :1]).all():
        return data[..., 0]
    if kind == "label":
        raise InputError("a label map in colour; save the class of each pixel as a grey value")
    if data.shape[-1] != 3:
        raise InputError(f"it holds {data.shape[-1]} channels; give one by its number, as in FILE::0")
    grey = data @ np.array([0.299, 0.587, 0.114])
    return grey.astype(np.float32) if data.dtype.kind == "f" else np.rint(grey).astype(data.dtype)


@contextmanager
def _tiff(path: Path) -> Iterator[tuple[Any, tuple[int, ...], int]]:
    """Open a TIFF: its one series, its shape as ([Z,] Y, X[, C]), and the number of axes in space."""
    import tifffile

    with opened(path) as stream, _heard("tifffile") as said, tifffile.TiffFile(stream) as file:
        if len(file.pages) > 2**16:
            raise InputError(f"{len(file.pages)} pages; at most {2**16} are read")
        if lost := [words for words in said if "page offset" in words]:
            raise InputError(f"its last pages are missing (truncated: {lost[0]}); copy or export it again")
        series = file.series
        if len(series) != 1:
            raise InputError(f"{len(series)} pictures of different kinds; save one picture, or one stack of slices")
        found = series[0]
        if found.dtype is None or found.dtype.kind not in "biuf":
            raise InputError(f"voxels must be real numbers, got {found.dtype}")
        colours = [size for axis, size in zip(found.axes, found.shape, strict=True) if axis in "SC" and size > 1]
        space = [size for axis, size in zip(found.axes, found.shape, strict=True) if axis not in "SC" and size > 1]
        if len(space) < 2:  # a row or column of pixels
            space = list(found.shape[-2:]) if not colours else [found.keyframe.imagelength, found.keyframe.imagewidth]
        if colours and found.axes[-1] == "S":  # without alpha
            colours = [3] if colours[0] == 4 else [] if colours[0] == 2 else colours
        if len(space) > 3 or len(colours) > 1:
            raise InputError(f"axes {found.axes} of lengths {found.shape}; one picture or one stack of slices is read")
        voxels = int(np.prod(found.shape, dtype=object))
        if voxels > MAX_VOXELS:
            raise InputError(f"{voxels} voxels; at most {MAX_VOXELS} are read")
        held = path.stat().st_size * (MAX_DEFLATE if found.keyframe.compression > 1 else 1)
        if voxels * found.dtype.itemsize > held and found.dtype != np.bool_:
            raise InputError(
                f"the header promises {voxels} voxels, which the file is too short to hold (truncated, or a corrupt "
                "header); copy or export it again"
            )
        yield found, (*space, *colours), len(space)


@contextmanager
def _heard(name: str) -> Iterator[list[str]]:
    """What a library logs of a damaged file, as a list instead of on the screen."""
    logger, said = logging.getLogger(name), []

    def hear(record: logging.LogRecord) -> bool:
        said.append(record.getMessage())
        return False

    logger.addFilter(hear)
    try:
        yield said
    finally:
        logger.removeFilter(hear)


def _read_tiff(path: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    """Voxels as (Y, X) or (Z, Y, X), with channels behind where there are several, and their spacing in mm."""
    with _tiff(path) as (series, shape, dims):
        check_bytes(int(np.prod(shape, dtype=np.int64)) * series.dtype.itemsize, "its voxels")
        try:
            data = series.asarray()
        except (ValueError, ImportError) as error:
            if "imagecodecs" not in str(error):
                raise
            with Image.open(path, formats=("TIFF",)) as pages:  # a compression that Pillow knows, such as LZW
                data = np.stack([np.array(page) for page in ImageSequence.Iterator(pages)])
            if data.size != int(np.prod(series.shape, dtype=np.int64)):
                raise InputError(f"compressed in a way that cannot be read ({error}); save it with deflate") from None
        colour = next((at for at, axis in enumerate(series.axes) if axis in "SC" and series.shape[at] > 1), None)
        data = data.reshape(series.shape)
        if colour is not None:
            data = np.moveaxis(data, colour, -1)
            data = data[..., : shape[-1]] if len(shape) > dims else data[..., 0]
        data = data.reshape(shape)
        return data.astype(data.dtype.newbyteorder("="), copy=False), _tiff_steps(path, series, dims)


def _tiff_steps(path: Path, series: Any, dims: int) -> tuple[float, ...]:
    """Spacing of a stack: nnU-Net's JSON file beside it, else ImageJ's words, else 1 mm. Pictures have none."""
    if dims == 2:
        return (1.0, 1.0)
    stem = path.name[: len(path.name) - len(path.suffix)]
    for name in (stem, stem[:-5] if stem[-5:-4] == "_" and stem[-4:].isdigit() else stem):
        if (beside := path.with_name(f"{name}.json")).is_file():
            try:
                steps = [float(step) for step in json.loads(beside.read_text(encoding="utf-8"))["spacing"]]
            except (OSError, ValueError, TypeError, KeyError):
                raise InputError(f'{beside.name} beside it holds no "spacing" of three numbers (z, y, x)') from None
            if len(steps) != 3 or not all(np.isfinite(step) and step > 0 for step in steps):
                raise InputError(f"{beside.name} beside it gives the spacing {steps}; expected three lengths (z, y, x)")
            return tuple(steps)
    said = series.parent.imagej_metadata or {} if series.parent is not None else {}
    unit = _MILLIMETRES.get(str(said.get("unit", "")))
    if unit is None:
        return (1.0, 1.0, 1.0)
    tags = series.keyframe.tags
    steps = [float(said.get("spacing", 1.0))]
    for tag in ("YResolution", "XResolution"):
        counted, per = tags[tag].value if tag in tags else (1, 1)
        steps.append(per / counted)
    return tuple(step * unit for step in steps)


def _tiff_encoder(volume: Volume, data: np.ndarray) -> Callable[[BinaryIO], None]:
    import tifffile

    if data.dtype not in (np.uint8, np.uint16, np.float32):
        if data.dtype.kind in "iu" and data.min() >= 0 and data.max() <= 65535:
            data = data.astype(np.uint16)
        elif data.dtype.kind == "f":
            data = data.astype(np.float32)
        else:
            raise InputError(f"values from {data.min()} to {data.max()}; a TIFF here holds 0 to 65535, use .nii.gz")
    steps = volume.spacing_mm
    if data.ndim == 3 and not np.allclose(volume.affine[:3, :3], np.diag(steps[::-1]), atol=1e-4 * min(steps)):
        raise InputError("a TIFF holds no directions, and this volume's axes are turned; use .nii.gz")
    place = {"axes": "YX" if data.ndim == 2 else "ZYX", "unit": "mm"} | (
        {"spacing": steps[0]} if data.ndim == 3 else {}
    )

    def encode(stream: BinaryIO) -> None:
        tifffile.imwrite(
            stream,
            np.ascontiguousarray(data),
            imagej=True,
            photometric="minisblack",
            metadata=place,
            resolution=(1 / steps[-1], 1 / steps[-2]),
        )

    return encode
