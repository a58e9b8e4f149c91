"""DICOM series as volumes: CT, MR and PET, one slice a file or enhanced multi-frame, and CR/DX projections in 2D.

Needs the extra `lightm-unet[dicom]` (pydicom). A series is named by its folder, by `folder::SeriesInstanceUID` where
the folder holds several, or by one file, which stands for itself alone.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from lightm.errors import InputError
from lightm.images.dicom_files import (
    PROJECTIONS,
    SEPARATOR,
    Header,
    NoSeriesError,
    Series,
    dicom_files,
    find_series,
    is_dicom_file,
    list_series,
    quietly,
    split_source,
    text,
)
from lightm.images.dicom_pixels import (
    MAX_VOXELS,
    check_modality_lut,
    fill,
    raw_frames,
    scaled,
    upright_projection,
    volume_dtype,
)
from lightm.images.dicom_stack import Frame, Stack, stack_series
from lightm.images.limits import check_bytes, check_place
from lightm.images.volume import Volume

__all__ = [
    "SEPARATOR", "NoSeriesError", "Series", "find_series", "is_dicom", "list_series", "read_series", "series_folders",
    "split_source",
]  # fmt: skip


def is_dicom(path: Path | str) -> bool:
    """Return whether a path names DICOM: `folder::UID`, a DICOM file, or a folder with one directly in it."""
    folder, uid = split_source(path)
    if uid is not None:
        return folder.is_dir()
    return bool(dicom_files(folder)) if folder.is_dir() else is_dicom_file(folder)


def series_folders(root: Path | str) -> list[Path]:
    """Return `root` and the folders below it that hold DICOM files directly, sorted; hidden ones are left out."""
    found = []
    for folder, below, _ in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if dicom_files(Path(folder)):
            found.append(Path(folder))
    return found


def read_series(source: Path | str | Series) -> Volume:
    """Read one DICOM series as a volume.

    source: a folder, `folder::SeriesInstanceUID`, a file, or a `Series` from `list_series`. Slices are ordered along
    their normal by ImagePositionPatient, never by name or number:
    affine = diag(-1, -1, 1, 1) [column direction * spacing, row direction * spacing, slice step, first position]
    (DICOM PS3.3 C.7.6.2.1.1, from left-posterior to right-anterior); a single slice gets SpacingBetweenSlices or
    SliceThickness for a step. Voxels are stored * RescaleSlope + RescaleIntercept, int16 or int32 where both are whole
    numbers, else float32; padding values stay as they are. CR and DX give 2D volumes of PixelSpacing or
    ImagerPixelSpacing (1 mm without), MONOCHROME1 turned over.

    Images at one place with equal pixels are taken once, with a warning. Raises InputError, naming folder or file and
    the cure, for: several series, no series, missing or faulty attributes, mixed sizes, spacings or directions, gaps,
    uneven steps, shear (gantry tilt), different images of one place, colour, pixels that cannot be decoded, and where
    pydicom is missing. Cost: headers once, pixels once; memory: the volume and one file.
    """
    series = source if isinstance(source, Series) else find_series(source)
    if series.headers[0].storage in PROJECTIONS:
        return _projection(series)
    return volume_of(stack_series(series))


def volume_of(stack: Stack) -> Volume:
    """Read the pixels of ordered frames into a volume."""
    frames = stack.frames
    shape = (len(frames), *frames[0].size)
    if int(np.prod(shape, dtype=object)) > MAX_VOXELS:
        raise InputError(
            f"{frames[0].header.file.parent}: {shape} is more than {MAX_VOXELS} voxels; resample or split the series"
        )
    dtype = volume_dtype(frames)
    steps = np.linalg.norm(stack.affine[:3, :3], axis=0)
    try:
        check_place(tuple(float(step) for step in steps[::-1]), stack.affine)
        check_bytes(int(np.prod(shape, dtype=object)) * dtype.itemsize, "its voxels")
    except InputError as error:
        file = frames[0].header.file
        raise InputError(f"{file if len(frames) == 1 else file.parent}: {error}") from None
    data = fill(np.empty(shape, dtype=dtype), frames)
    return Volume(data, tuple(float(step) for step in steps[::-1]), stack.affine)


def _projection(series: Series) -> Volume:
    if len(series.headers) > 1:
        names = ", ".join(header.file.name for header in series.headers[:3])
        raise InputError(
            f"{series.folder}: {len(series.headers)} {series.modality} images in one series ({names}, ...), which "
            "are no stack; give each file by itself"
        )
    header = series.headers[0]
    check_modality_lut(header)
    raw = raw_frames(header)
    if raw.shape[0] != 1:
        raise InputError(f"{header.file}: {raw.shape[0]} frames in a projection; give one image")
    spacing = _projection_spacing(header)
    numbers = []
    for keyword, default in (("RescaleSlope", "1"), ("RescaleIntercept", "0")):
        try:
            numbers.append(float(text(header.data, keyword) or default))
        except ValueError:
            raise InputError(f"{header.file}: {keyword} is not a number; export the image again") from None
    still, size = np.zeros(3), (int(raw.shape[1]), int(raw.shape[2]))
    frame = Frame(header, 0, still, np.eye(2, 3), spacing, None, numbers[0], numbers[1], size)
    return Volume.from_spacing(upright_projection(header, scaled(raw[0], frame)), spacing)


def _projection_spacing(header: Header) -> tuple[float, float]:
    for keyword in ("PixelSpacing", "ImagerPixelSpacing"):
        if text(header.data, keyword) is None:
            continue
        try:
            with quietly():
                rows, columns = (float(step) for step in header.data.get(keyword))
        except (TypeError, ValueError):
            rows = columns = 0.0
        if not (0 < rows < np.inf and 0 < columns < np.inf):
            raise InputError(f"{header.file}: {keyword} is not two positive numbers; export the image again")
        try:
            check_place((rows, columns), np.eye(4))
        except InputError as error:
            raise InputError(f"{header.file}: {error}") from None
        return rows, columns
    return 1.0, 1.0
