"""PNG files of one grey channel, through Pillow.

What a file may ask for: 2^26 pixels, and no more bytes than deflate can unpack from its length (1032 to 1); text and
colour profiles as far as Pillow reads them (1 MB each, 64 MB in all).
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from lightm.errors import InputError
from lightm.images.limits import MAX_DEFLATE, PARSE_ERRORS, naming, opened
from lightm.images.volume import Volume

# Below the size at which Pillow warns of a decompression bomb, so the refusal is ours and comes first.
MAX_PIXELS = 2**26
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_FAULTS = (*PARSE_ERRORS, Image.DecompressionBombError, SyntaxError)


def read(path: Path, kind: str) -> Volume:
    """Read one file as (Y, X); a label with a palette gives its indices. Raises InputError naming the file."""
    with naming(path, "PNG", _FAULTS, "copy or export it again"):
        with opened(path) as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow remarks on sizes and transparency, which are checked here
            start = stream.read(29)
            if len(start) < 29 or start[:8] != _SIGNATURE or start[8:16] != b"\0\0\0\rIHDR":
                raise InputError("not a PNG file: the first bytes are no PNG header; check the format")
            width, height, depth, colour = struct.unpack(">IIBB", start[16:26])
            _check_header(width, height, depth, colour, path.stat().st_size)
            stream.seek(0)
            with Image.open(stream, formats=("PNG",)) as picture:
                if picture.size != (width, height):
                    raise InputError("two headers of different sizes; export it again")
                if getattr(picture, "n_frames", 1) > 1:
                    raise InputError("an animation of several pictures; save each picture as a file of its own")
                picture.load()
                data = _grey(picture, kind)
        if colour == 0 and depth in (2, 4):  # Pillow spreads them over 0 to 255; stored values are what is meant
            data = data // np.uint8(255 // (2**depth - 1))
    return Volume.from_spacing(data, (1.0, 1.0))


def voxel_bytes(path: Path) -> int:
    """Return about how much memory the pixels take, from the header alone; 0 for a file that `read` refuses."""
    with open(path, "rb") as stream:
        start = stream.read(24)
    if len(start) < 24:
        return 0
    width, height = struct.unpack(">II", start[16:24])
    return width * height * 4 if width * height <= MAX_PIXELS else 0


def encoder(volume: Volume) -> Callable[[BinaryIO], None]:
    """Return a function that writes the volume as a PNG of 8 bits, or of 16 for uint16."""
    data = volume.data
    if data.ndim != 2:
        raise InputError(f"PNG holds 2D pictures, got shape {volume.shape}; use .nii.gz")
    if data.dtype == np.bool_:
        data = data.astype(np.uint8)
    if data.dtype.kind not in "iu":
        raise InputError(f"PNG holds whole numbers, got {data.dtype}; scale to uint8 or uint16, or use .nii.gz")
    if data.dtype not in (np.uint8, np.uint16):
        if data.min() < 0 or data.max() > 255:
            raise InputError(
                f"values from {data.min()} to {data.max()}; PNG of {data.dtype} holds 0 to 255, "
                "convert to uint16, or use .nii.gz"
            )
        data = data.astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(data))
    return lambda stream: picture.save(stream, format="PNG")


def _check_header(width: int, height: int, depth: int, colour: int, size: int) -> None:
    if width * height > MAX_PIXELS:
        raise InputError(f"{width} x {height} pixels; at most {MAX_PIXELS} are read, scale the picture down")
    if height * ((width * depth * _CHANNELS.get(colour, 1) + 7) // 8) > size * MAX_DEFLATE:
        raise InputError(
            f"the header promises {width} x {height} pixels, which the file is too short to hold (truncated, or a "
            "corrupt header); copy or export it again"
        )
    if depth == 16 and colour != 0:
        raise InputError(
            "colour or transparency of 16 bits a channel, of which 8 would be lost; save it as grey of 16 bits"
        )


def _grey(picture: Image.Image, kind: str) -> np.ndarray:
    if picture.mode == "P" and kind == "image":
        picture = picture.convert("RGB")
    if picture.mode == "1":
        return np.array(picture, dtype=np.uint8)
    if picture.mode in ("L", "P", "I", "I;16", "I;16B"):
        data = np.array(picture)
        return data.astype(data.dtype.newbyteorder("="), copy=False)
    channels = np.array(picture)
    if picture.mode in ("LA", "RGBA"):
        if (channels[..., -1] != 255).any():
            raise InputError(f"a picture with transparency ({picture.mode}); save it as grey without an alpha channel")
        channels = channels[..., :-1]
    elif picture.mode != "RGB":
        raise InputError(f"a picture of mode {picture.mode}; save it as grey, 8 or 16 bits")
    if (channels != channels[..., :1]).any():
        raise InputError(
            "a colour picture; save it as grey, or each channel as a file CASE_0000.png, CASE_0001.png, ..."
        )
    return np.ascontiguousarray(channels[..., 0])
