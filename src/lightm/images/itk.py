"""NRRD, MetaImage, legacy VTK and Analyze or NIfTI pairs, through SimpleITK.

ITK trusts what a header says, to the point of ending the process, so text headers are looked at before it sees them:
the number of axes, the number of voxels, and that the voxels lie in the file itself or in one beside it. Sizes are held
against the length of the files and the machine's memory before the voxels are asked for.
"""

from __future__ import annotations

import locale
import os
import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice, takewhile
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from lightm.errors import InputError
from lightm.files import disk_refusals
from lightm.images.limits import MAX_DEFLATE, MAX_VOXELS, check_bytes, check_place, naming
from lightm.images.volume import Volume, affine_spacing_mm

SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd", ".vtk", ".hdr")
_IO = dict(zip(SUFFIXES, ("Nrrd", "Nrrd", "Meta", "Meta", "VTK", "Nifti"), strict=True))
_BESIDE = {".mhd": (".raw", ".zraw"), ".nhdr": (".raw", ".raw.gz"), ".hdr": (".img",)}
"""Endings of the files with the voxels that are written beside a header."""
_HEADER_BYTES = 1 << 16
_LOCALE = Lock()
_NUMBER = re.compile(rb"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's axes point left, posterior, superior; ours right, anterior, superior
# What a header may say, by the name of its reader in ITK: how many axes, how long they are, where the voxels are.
_AXES = {"Meta": r"^NDims *=(.*)$", "Nrrd": r"^dimension: *(.*)$"}
_SIZES = {"Meta": r"^DimSize *=(.*)$", "Nrrd": r"^sizes: *(.*)$", "VTK": r"^DIMENSIONS (.*)$"}
_META_TYPE = r"^ElementType *= *MET_(U?(CHAR|SHORT|INT|LONG|LONG_LONG)|FLOAT|DOUBLE)(_ARRAY)? *\r?$"
_DATA = {"Meta": r"^ElementDataFile *=(.*)$", "Nrrd": r"^data ?file: *(.*)$"}


def read(path: Path, channel: int | None = None) -> Volume:
    """Read one file as (Z, Y, X) or (Y, X); `channel` of a file that holds several. InputError names it."""
    import SimpleITK

    with naming(path):
        header = _header(path)
        sizes, steps, affine, channels = _geometry(header)
        if channel is None and channels > 1:
            raise InputError(f"it holds {channels} channels; give one by its number, as in {path.name}::0")
        if not 0 <= (channel or 0) < channels:
            raise InputError(f"it holds {channels} channel(s), numbered from 0; there is no channel {channel}")
        needed = prod(sizes) * channels * _itemsize(header)
        check_bytes(needed, "its voxels")
        if _IO[path.suffix.lower()] == "Meta":
            _check_deflated(path, needed)
        with _itk(path.suffix.lower(), "not a readable {} file", "; copy or export it again"):
            image = header.Execute()
        data = SimpleITK.GetArrayFromImage(image)  # (T, Z, Y, X) or (Z, Y, X, C)
        if channels > 1:
            data = data[..., channel] if image.GetNumberOfComponentsPerPixel() > 1 else data[channel]
        return Volume(np.ascontiguousarray(data.reshape(sizes[::-1])), steps, affine)


def channel_count(path: Path) -> int:
    """How many channels a file holds; raises InputError as `read` does."""
    with naming(path):
        return _geometry(_header(path))[3]


def voxel_bytes(path: Path) -> int:
    """How much memory the voxels take, from the header alone; raises InputError as `read` does."""
    with naming(path):
        header = _header(path)
        sizes, _, _, channels = _geometry(header)
        return prod(sizes) * channels * _itemsize(header)


def write(path: Path, suffix: str, volume: Volume) -> None:
    """Write a volume, complete or not at all; where the voxels are a file of their own, before the header.

    Raises InputError for what the format cannot hold: legacy VTK no directions.
    """
    import SimpleITK

    data = volume.data.astype(np.uint8) if volume.data.dtype == np.bool_ else volume.data
    image = SimpleITK.GetImageFromArray(data)
    dims = data.ndim
    affine = _LPS @ volume.affine
    steps = np.array(volume.spacing_mm[::-1])
    directions = affine[:dims, :dims] / steps if dims == 3 else np.eye(2)
    if suffix == ".vtk" and not np.allclose(directions, np.eye(dims), atol=1e-4):
        raise InputError("legacy VTK holds no directions, and this volume's axes are turned; use .nrrd or .mha")
    image.SetSpacing([float(step) for step in steps])
    image.SetOrigin([float(value) for value in affine[:dims, 3]])
    image.SetDirection([float(value) for value in directions.ravel()])
    with disk_refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".lightm-", dir=path.parent) as folder:
            # The header names the file beside it, so both get their names before they are moved.
            made = Path(folder) / (path.name[: -len(suffix)] + suffix)  # ITK adds the ending where it is upper-case
            with _itk(suffix, "cannot be written as {}"):
                SimpleITK.WriteImage(image, str(made), suffix not in (".vtk", ".hdr"))
            for file in sorted(Path(folder).iterdir(), key=lambda file: file == made):
                beside = companions(path)[0].name if suffix == ".hdr" else file.name
                os.replace(file, path if file == made else path.parent / beside)


def companions(path: Path) -> tuple[Path, ...]:
    """The files with voxels that may lie beside a header file, by name; SCAN.HDR has SCAN.IMG."""
    endings = _BESIDE.get(path.suffix.lower(), ())
    return tuple(path.with_name(path.stem + (end.upper() if path.suffix == ".HDR" else end)) for end in endings)


def _header(path: Path) -> Any:
    """ITK's reader of this file with the header read; InputError for a hostile or a truncated one."""
    import SimpleITK

    SimpleITK.ProcessObject_SetGlobalWarningDisplay(False)
    kind = _IO[path.suffix.lower()]
    beside = [file for file in companions(path) if file.is_file()]
    if kind != "Nifti":
        beside = _look_at(path, kind)
    elif not beside:
        raise InputError(f"its voxels are missing: {companions(path)[0].name} must lie beside it")
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO(f"{kind}ImageIO")
    reader.SetFileName(str(path))
    with _itk(path.suffix.lower(), "not a readable {} file", "; copy or export it again"):
        reader.ReadImageInformation()
    voxels = prod(reader.GetSize()) * reader.GetNumberOfComponents()
    if voxels > MAX_VOXELS:
        raise InputError(f"its header gives {voxels} voxels; at most {MAX_VOXELS} are read")
    # ITK fills what a pair or a VTK file lacks with zeros; the others' voxels may be compressed.
    needed = voxels * _itemsize(reader) / (1 if kind in ("Nifti", "VTK") else MAX_DEFLATE)
    held = (
        _vtk_bytes(path, voxels, _itemsize(reader))
        if kind == "VTK"
        else sum(_length(file) for file in beside or [path])
    )
    if needed > held:
        raise InputError(
            f"its header promises {voxels} voxels of {_itemsize(reader)} bytes, which the file is too short to hold "
            "(truncated, or a corrupt header); copy or export it again"
        )
    return reader


def _look_at(path: Path, kind: str) -> list[Path]:
    """Check the text header of a file, and return the files beside it that hold its voxels."""
    with open(path, "rb") as stream:
        text = stream.read(_HEADER_BYTES).decode("latin-1")
    if kind == "Nrrd":
        text = re.split(r"\r?\n\r?\n", text)[0]
    elif kind == "Meta":
        end = re.search(_DATA[kind], text, re.M)
        text = text[: end.end()] if end else text

    def said(patterns: dict[str, str]) -> str | None:
        found = re.findall(patterns.get(kind, "(?!)"), text, re.M)
        if len(found) > 1:
            raise InputError(f"its header says '{found[0].strip()}' and '{found[1].strip()}' of one thing")
        return found[0].strip() if found else None

    axes, sizes, data = said(_AXES), said(_SIZES), said(_DATA)
    if sizes is None or (kind in _AXES and axes is None):
        raise InputError("its header gives no sizes; the file is damaged or of another format")
    lengths = sizes.split()
    if not all(re.fullmatch(r"[1-9]\d{0,9}", length) for length in lengths) or not 2 <= len(lengths) <= 5:
        raise InputError(f"its header gives the sizes '{sizes[:60]}'; expected two to five whole numbers")
    if axes is not None and axes != str(len(lengths)):
        raise InputError(f"its header gives {axes[:20]} axes and the sizes '{sizes[:60]}'")
    if (voxels := prod(int(length) for length in lengths)) > MAX_VOXELS:
        raise InputError(f"its header gives {voxels} voxels; at most {MAX_VOXELS} are read")
    if kind == "Meta" and data is None:
        raise InputError("its header names no voxels (ElementDataFile is missing)")
    if kind == "Meta" and not re.search(_META_TYPE, text, re.M):
        raise InputError("its header gives no type of number (ElementType); voxels must be real numbers")
    if data is None or data.upper() == "LOCAL":
        return []
    if data != Path(data.replace("\\", "/")).name or data in ("", ".", "..", "LIST"):
        raise InputError(f"its voxels lie in '{data[:80]}'; only a file beside it is read")
    if not (file := path.with_name(data)).is_file():
        raise InputError(f"its voxels are missing: {data} must lie beside it")
    return [file]


def _check_deflated(path: Path, needed: int) -> None:
    """Unpack the voxels of a compressed MetaImage once; InputError where they end early: ITK then hangs."""
    with open(path, "rb") as stream:
        head = stream.read(_HEADER_BYTES)
    data = re.search(rb"^ElementDataFile *=(.*)\n?", head, re.M)
    if data is None or not re.search(rb"^CompressedData *= *[Tt1]", head[: data.end()], re.M):
        return
    local = data[1].strip().upper() == b"LOCAL"
    decoder, got = zlib.decompressobj(47), 0  # zlib or gzip, as ITK tells them
    with open(path if local else path.with_name(data[1].strip().decode("latin-1")), "rb") as stream:
        stream.seek(data.end() if local else 0)
        try:
            while not decoder.eof and got <= needed and (block := decoder.unconsumed_tail or stream.read(1 << 16)):
                got += len(decoder.decompress(block, 1 << 20))
        except zlib.error as error:
            raise InputError(f"its voxels cannot be unpacked ({error}); copy or export it again") from None
    if got < needed or not (decoder.eof or got > needed):
        raise InputError(f"its voxels unpack to {got} bytes of {needed} (truncated); copy or export it again")


def _length(file: Path) -> int:
    return file.stat().st_size


def _vtk_bytes(path: Path, voxels: int, itemsize: int) -> int:
    """How many bytes of voxels a legacy VTK file holds; text that is no number counts as its end."""
    with open(path, "rb") as stream:
        head = stream.read(_HEADER_BYTES)
        values = re.search(rb"^(SCALARS.*\n(LOOKUP_TABLE.*\n)?|(COLOR_SCALARS|VECTORS|TENSORS).*\n)", head, re.M)
        if values is None:
            return 0
        if not re.match(rb".*\n.*\n *ASCII", head):
            return _length(path) - values.end()
        stream.seek(values.end())
        found = takewhile(_NUMBER.fullmatch, (word for line in stream for word in line.split()))
        return sum(itemsize for _ in islice(found, voxels))


def _geometry(reader: Any) -> tuple[tuple[int, ...], tuple[float, ...], np.ndarray, int]:
    """Sizes in the file's order, spacing in array order, affine, and the number of channels of a header."""
    sizes, components = tuple(reader.GetSize()), reader.GetNumberOfComponents()
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes = sizes[:-1]
    if len(sizes) > 4 or (len(sizes) == 4 and components > 1) or len(sizes) < 2:
        raise InputError(f"one scan of two or three axes is needed, got shape {sizes} with {components} components")
    channels = components * (sizes[3] if len(sizes) == 4 else 1)
    dims, axes = min(len(sizes), 3), reader.GetDimension()
    affine = np.eye(4)
    steps = np.array(reader.GetSpacing()[:dims])
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused
        affine[:dims, :dims] = np.array(reader.GetDirection()).reshape(axes, axes)[:dims, :dims] * steps
        affine[:dims, 3] = reader.GetOrigin()[:dims]
        affine = np.diag([*steps, 1.0, 1.0]) if dims == 2 else _LPS @ affine  # a picture has no place in the patient
        spacing = affine_spacing_mm(affine, dims)
        check_place(spacing, affine)
    return sizes[:dims], spacing, affine, channels


def _itemsize(reader: Any) -> int:
    import SimpleITK

    name = SimpleITK.GetPixelIDValueAsString(reader.GetPixelID())
    bits = re.search(r"(\d+)-bit (?:un)?(?:signed integer|float)", name)
    if bits is None:
        raise InputError(f"voxels must be real numbers, got {name}; save one channel as its own file")
    return int(bits[1]) // 8


@contextmanager
def _itk(suffix: str, failed: str, remedy: str = "") -> Iterator[None]:
    """Let ITK read or write a format: its errors become InputError, and the process keeps its locale.

    VTK's reader and writer set the locale of the whole process to "C", and with it the text encoding that Python's
    `open` assumes in every other library; one thread at a time goes there. failed: with a place for the format.
    """
    with _kept_locale() if suffix == ".vtk" else nullcontext():
        try:
            yield
        except RuntimeError as error:
            raise InputError(f"{failed.format(suffix)} ({_reason(error)}){remedy}") from None


@contextmanager
def _kept_locale() -> Iterator[None]:
    with _LOCALE:
        before = locale.setlocale(locale.LC_ALL)
        try:
            yield
        finally:
            locale.setlocale(locale.LC_ALL, before)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^.*?ERROR: *|\w+\(0x[0-9a-f]+\): *", "", lines[-1] if lines else "")[:160] or "no reason given"
