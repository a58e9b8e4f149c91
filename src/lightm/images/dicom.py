"""DICOM series as volumes: CT, MR and PET, one slice per file or enhanced multi-frame, and CR/DX projections in 2D.

Needs the extra `lightm-unet[dicom]` (pydicom). A series is named by its folder or zip archive, by
`folder::SeriesInstanceUID` where that holds several, or by one file, which stands for itself alone. Slices are ordered
by their place; whatever keeps them from being one even stack is an error, and a tilted one is resampled if asked for.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from lightm.errors import InputError
from lightm.images.archives import is_archive
from lightm.images.dicom_files import (
    PROJECTIONS,
    SEPARATOR,
    SLICES,
    Frame,
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
)  # fmt: skip
from lightm.images.dicom_pixels import (
    check_modality_lut,
    check_pixels,
    fill,
    raw_frames,
    scaled,
    volume_dtype,
)  # fmt: skip
from lightm.images.limits import MAX_VOXELS, check_bytes, check_place, naming
from lightm.images.volume import Volume, affine_spacing_mm

__all__ = [
    "SEPARATOR", "NoSeriesError", "Series", "TiltError", "find_series", "is_archive", "is_dicom", "list_series",
    "read_series", "series_folders", "split_source",
]  # fmt: skip

_log = logging.getLogger("lightm.images")

# Headers round positions to a hundredth of a millimetre or so; below this two slices lie at one place.
_SAME_PLACE_MM = 0.01
_STEP_SHARE = 0.1  # of a step, by which single steps may differ
_GRID_SHARE = 0.25  # of a step, by which a slice may lie off an even grid
_DRIFT_PIXELS = 0.5  # in the plane, from the first slice to the last
_MAX_TILT_DEGREES = 45.0  # gantries tilt by 30 at most
# What tells apart several images of one place, in the order in which it is looked for.
_TELLING = (
    "TemporalPositionIdentifier", "TriggerTime", "EchoTime", "EchoNumbers", "DiffusionBValue", "ImageType",
    "AcquisitionNumber", "AcquisitionTime", "ContentTime", "KVP", "ConvolutionKernel", "InstanceNumber",
)  # fmt: skip


class TiltError(InputError):
    """A series whose slices are sheared against each other, as those of a tilted gantry are."""


def is_dicom(path: Path | str) -> bool:
    """Return whether a path names DICOM: `folder::UID`, a DICOM file, a zip archive, or a folder with one in it."""
    folder, uid = split_source(path)
    if uid is not None:
        return folder.is_dir() or is_archive(folder)
    return bool(dicom_files(folder)) if folder.is_dir() else is_archive(folder) or is_dicom_file(folder)


def series_folders(root: Path | str) -> list[Path]:
    """Return the folders from `root` on that hold DICOM files directly, and the zip archives; sorted, none hidden."""
    found = []
    for folder, below, files in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if dicom_files(Path(folder)):
            found.append(Path(folder))
        archives = (Path(folder, name) for name in sorted(files) if not name.startswith("."))
        found += [archive for archive in archives if is_archive(archive)]
    return found


def read_series(source: Path | str | Series, *, correct_gantry_tilt: bool = False) -> Volume:
    """Read one DICOM series as a volume.

    source: a folder or zip archive, `folder::SeriesInstanceUID`, a file, or a `Series` from `list_series`. Slices are
    ordered along their normal by ImagePositionPatient, never by name or number: affine = diag(-1, -1, 1, 1) [column
    direction * spacing, row direction * spacing, slice step, first position] (DICOM PS3.3 C.7.6.2.1.1, from
    left-posterior to right-anterior); a single slice gets SpacingBetweenSlices or SliceThickness for a step. Voxels are
    stored * RescaleSlope + RescaleIntercept, int16 or int32 where both are whole numbers, else float32; padding values
    stay as they are. CR and DX give 2D volumes of PixelSpacing or ImagerPixelSpacing (1 mm without), MONOCHROME1 turned
    over.

    correct_gantry_tilt: bring the slices of a tilted gantry onto a straight grid: each is shifted in its own plane,
    with linear interpolation, to lie straight above the first; the grid is as wide as all of them need, and what no
    slice covers has the lowest value of the series.

    Images at one place with equal pixels are taken once, with a warning. Raises InputError, naming folder or file and
    the remedy, for: several series, no series, missing or faulty attributes, mixed sizes, spacings or directions, gaps,
    uneven steps, a tilted gantry unless corrected (`TiltError`), different images of one place, colour, pixels that
    cannot be decoded, and where pydicom is missing. Cost: headers once, pixels once; memory: the volume and one file.
    """
    series = source if isinstance(source, Series) else find_series(source)
    if series.headers[0].storage in PROJECTIONS:
        return _projection(series)
    stack = stack_series(series, tilted=correct_gantry_tilt)
    frames, shape, voxels = stack.frames, stack.shape, prod(stack.shape)
    where = frames[0].header.file if len(frames) == 1 else series.folder
    if voxels > MAX_VOXELS:
        raise InputError(f"{where}: {shape} is more than {MAX_VOXELS} voxels; resample or split the series")
    dtype = volume_dtype(frames)
    with naming(where):
        check_place(stack.spacing_mm, stack.affine)
        check_bytes(voxels * dtype.itemsize, "its voxels")
        data = fill(np.empty(shape, dtype=dtype), frames)
        if stack.shear is not None:
            return _straightened(data, stack, where)
    return Volume(data, stack.spacing_mm, stack.affine)


def _straightened(data: np.ndarray, stack: Stack, where: Any) -> Volume:
    """Return sheared slices on a grid whose third axis is their normal."""
    frame, shear = stack.frames[0], np.asarray(stack.shear)
    # Pixels by which each slice lies further along rows and columns than the first.
    steps = np.array([shear @ frame.orientation[1 - axis] / frame.spacing_mm[axis] for axis in (0, 1)])
    shifts = np.arange(len(data))[:, None] * steps
    low = np.floor(shifts.min(0)).astype(int)
    rows, columns = (int(size) for size in np.array(data.shape[1:]) + np.ceil(shifts.max(0)).astype(int) - low)
    voxels = len(data) * rows * columns
    if voxels > MAX_VOXELS:
        raise InputError(f"the straight grid would have {len(data)} x {rows} x {columns} voxels; at most {MAX_VOXELS}")
    check_bytes(voxels * data.dtype.itemsize, "its voxels on a straight grid")
    outside = data.min()
    result = np.empty((len(data), rows, columns), data.dtype)
    for plane, target, shift in zip(data, result, shifts - low, strict=True):
        slab = ndimage.affine_transform(
            plane.astype(np.float64), np.ones(2), -shift, (rows, columns), order=1, cval=float(outside)
        )
        target[...] = np.rint(slab) if data.dtype.kind in "iu" else slab
    affine = np.array(stack.affine)
    lps = np.diag([-1.0, -1.0, 1.0])
    affine[:3, 2] -= lps @ shear
    affine[:3, 3] += affine[:3, 0] * low[1] + affine[:3, 1] * low[0]
    angle = np.degrees(np.arctan2(np.linalg.norm(shear), np.linalg.norm(affine[:3, 2])))
    _log.info(
        "%s: a gantry tilt of %.3g degrees was corrected: the scan and its label map lie on a straight grid of "
        "%d x %d x %d voxels (x, y, z)", where, angle, columns, rows, len(data),
    )  # fmt: skip
    return Volume(result, affine_spacing_mm(affine, 3), affine)


def _projection(series: Series) -> Volume:
    if len(series.headers) > 1:
        names = ", ".join(header.file.name for header in series.headers[:3])
        raise InputError(
            f"{series.folder}: {len(series.headers)} {series.modality} images in one series ({names}, ...), which "
            "are no stack; give each file by itself"
        )
    header = series.headers[0]
    check_modality_lut(header, [header.data])
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
    values = scaled(raw[0], *numbers)
    if text(header.data, "PhotometricInterpretation") == "MONOCHROME1":  # there large is dark
        values = (values.max() + values.min() - values).astype(values.dtype)
    return Volume.from_spacing(values, spacing)


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
        with naming(header.file):
            check_place((rows, columns), np.eye(4))
        return rows, columns
    return 1.0, 1.0


@dataclass(frozen=True, eq=False)
class Stack:
    """Frames ordered along their normal on an even grid. affine: voxel (x, y, z, 1) to millimetres (RAS).

    dropped: frames left out because another at the same place has the same pixels, each with that other's index.
    shear: what each slice is shifted in its plane against the one before, (3,) millimetres in LPS; None for none.
    """

    frames: list[Frame]
    affine: np.ndarray
    dropped: list[tuple[Frame, int]]
    shear: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Slices, rows and columns."""
        return (len(self.frames), *self.frames[0].size)

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Between slices, rows and columns."""
        return affine_spacing_mm(self.affine, 3)


def stack_series(series: Series, *, tilted: bool = False) -> Stack:
    """Order the frames of a series by their place; reads pixels only where two lie at the same place.

    tilted: whether slices may be sheared. Raises InputError, naming folder and files, for missing or faulty geometry,
    mixed sizes, spacings or directions, gaps, uneven steps, and several different images of one place; `TiltError` for
    sheared slices (gantry tilt) that may not be.
    """
    where = series.folder
    frames = [frame for header in series.headers for frame in file_frames(header)]
    _check_alike(where, frames)
    normal = frames[0].normal
    heights = np.array([frame.position @ normal for frame in frames])
    order = np.argsort(heights, kind="stable")
    kept: list[Frame] = []
    dropped: list[tuple[Frame, int]] = []
    last = -np.inf
    for i in order:
        if heights[i] - last > _SAME_PLACE_MM:
            kept.append(frames[i])
            last = heights[i]
        else:
            _check_same(where, kept[-1], frames[i])
            dropped.append((frames[i], len(kept) - 1))
    if dropped:
        _log.warning(
            "%s: %d image(s) are there twice with equal pixels, such as %s; each is taken once",
            where, len(dropped), dropped[0][0],
        )  # fmt: skip
    first, affine = kept[0], np.eye(4)
    affine[:3, 0] = first.orientation[0] * first.spacing_mm[1]
    affine[:3, 1] = first.orientation[1] * first.spacing_mm[0]
    affine[:3, 2], shear = _check_even(where, kept, tilted)
    affine[:3, 3] = first.position
    # DICOM counts millimetres to the left and to the back, NIfTI to the right and to the front.
    return Stack(kept, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine + 0.0, dropped, shear)


def file_frames(header: Header) -> list[Frame]:
    """Return the frames of one file with their geometry; raises InputError naming the file and the attribute."""
    count, rows, columns = check_pixels(header)
    if header.storage in SLICES:
        if count != 1:
            raise InputError(f"{header.file}: {count} frames in a single-frame image; convert it to an enhanced one")
        return [_frame(header, 0, [header.data], (rows, columns))]
    try:
        with quietly():
            shared = list(header.data.get("SharedFunctionalGroupsSequence") or [])[:1]
            each = list(header.data.get("PerFrameFunctionalGroupsSequence") or [])
    except Exception:
        each = []
    if len(each) != count:
        raise InputError(
            f"{header.file}: {count} frames, but {len(each)} descriptions of their places "
            "(PerFrameFunctionalGroupsSequence); export the file again"
        )
    return [_frame(header, i, _groups(groups, shared), (rows, columns)) for i, groups in enumerate(each)]


def _groups(own: Any, shared: list[Any]) -> list[Any]:
    """Return the items that describe a frame: its own before the shared ones."""
    names = (
        "PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence",
        "PixelValueTransformationSequence",
    )  # fmt: skip
    return [group[name].value[0] for name in names for group in (own, *shared) if group.get(name)]


def _frame(header: Header, index: int, groups: list[Any], size: tuple[int, int]) -> Frame:
    position = _numbers(header, groups, "ImagePositionPatient", 3)
    orientation = _numbers(header, groups, "ImageOrientationPatient", 6).reshape(2, 3)
    lengths = np.linalg.norm(orientation, axis=1)
    if np.abs(lengths - 1).max() > 1e-2 or abs(orientation[0] @ orientation[1]) > 1e-3:
        raise InputError(
            f"{header.file}: ImageOrientationPatient {orientation.ravel().tolist()} is no pair of perpendicular "
            "directions of length 1; export the series again"
        )
    spacing = _numbers(header, groups, "PixelSpacing", 2)
    if spacing.min() <= 0:
        raise InputError(f"{header.file}: PixelSpacing {spacing.tolist()} must be positive; export the series again")
    check_modality_lut(header, groups)
    thickness = [_optional(header, groups, key, 0.0) for key in ("SpacingBetweenSlices", "SliceThickness")]
    return Frame(
        header,
        index,
        position,
        orientation / lengths[:, None],
        (float(spacing[0]), float(spacing[1])),
        next((abs(value) for value in thickness if value), None),
        _optional(header, groups, "RescaleSlope", 1.0),
        _optional(header, groups, "RescaleIntercept", 0.0),
        size,
    )


def _numbers(header: Header, groups: list[Any], keyword: str, count: int) -> np.ndarray:
    value: Any = None
    try:
        with quietly():
            value = next((group.get(keyword) for group in groups if group.get(keyword) is not None), None)
            numbers = np.array([float(part) for part in value], dtype=np.float64)
    except Exception:
        numbers = np.empty(0)
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise InputError(
            f"{header.file}: {keyword} is {'missing' if value in (None, '') else f'not {count} numbers ({value})'}, so "
            "the image has no place in the patient; export the original series, or move the file out of the folder"
        )
    return numbers


def _optional(header: Header, groups: list[Any], keyword: str, default: float) -> float:
    found = next((value for group in groups if (value := text(group, keyword)) is not None), None)
    try:
        number = default if found is None else float(found)
    except ValueError:
        number = np.nan
    if not np.isfinite(number) or (keyword == "RescaleSlope" and number == 0):
        raise InputError(f"{header.file}: {keyword} is {found}, which scales no image; export the series again")
    return number


def _check_alike(where: Path, frames: list[Frame]) -> None:
    _check_one(where, frames, [frame.size for frame in frames], "sizes (rows, columns)")
    directions: list[np.ndarray] = []
    for frame in frames:
        if not any(np.abs(frame.orientation - known).max() < 1e-3 for known in directions):
            directions.append(frame.orientation)
    nearest = [
        min(directions, key=lambda known: float(np.abs(frame.orientation - known).max())).ravel() for frame in frames
    ]
    rounded = [tuple(round(float(value), 3) + 0.0 for value in direction) for direction in nearest]
    if len(directions) > 1:
        _check_one(where, frames, rounded, "directions (ImageOrientationPatient), such as a scout image has")
    spacings = [tuple(round(step, 4) for step in frame.spacing_mm) for frame in frames]
    _check_one(where, frames, spacings, "pixel spacings")


def _check_one(where: Path, frames: list[Frame], kinds: Sequence[Any], what: str) -> None:
    counts = Counter(kinds)
    if len(counts) == 1:
        return
    example = dict(zip(reversed(kinds), reversed(frames), strict=True))
    lines = "\n".join(f"  {count} of {kind}, such as {example[kind]}" for kind, count in counts.most_common())
    raise InputError(
        f"{where}: the series mixes images of {len(counts)} {what}:\n{lines}\n"
        "keep the images of one stack in the folder and move the others out"
    )


def _check_same(where: Path, first: Frame, second: Frame) -> None:
    pixels = [scaled(raw_frames(frame.header)[frame.index], frame.slope, frame.intercept) for frame in (first, second)]
    apart = float(np.linalg.norm(first.position - second.position))
    if np.array_equal(pixels[0], pixels[1]) and apart <= max(_SAME_PLACE_MM, 0.1 * min(first.spacing_mm)):
        return
    telling = ""
    for keyword in _TELLING:
        values = [text(frame.header.data, keyword) for frame in (first, second)]
        if first.header is not second.header and values[0] != values[1]:
            telling = f"; they differ in {keyword} ({values[0]} and {values[1]})"
            break
    raise InputError(
        f"{where}: {first} and {second} lie in the same plane with different pixels{telling}: time points, echoes or "
        "reconstructions in one series; keep the images of one stack in the folder and move the others out"
    )


def _check_even(where: Path, frames: list[Frame], tilted: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the step from slice to slice, and its shear if any; raises InputError for no even, upright stack."""
    first, normal = frames[0], frames[0].normal
    if len(frames) == 1:
        if first.thickness_mm is None:
            _log.warning("%s: one slice without SliceThickness; 1 mm is assumed", where)
        return normal * (first.thickness_mm or 1.0), None
    positions = np.array([frame.position for frame in frames])
    heights = positions @ normal
    steps = np.diff(heights)
    typical = float(np.median(steps))
    odd = np.flatnonzero(np.abs(steps - typical) > max(_STEP_SHARE * typical, 2 * _SAME_PLACE_MM))
    if odd.size:
        i = int(odd[np.argmax(steps[odd])])
        missing = round(float(steps[i]) / typical) - 1
        between = f"between {frames[i]} and {frames[i + 1]} ({steps[i]:.4g} mm; the usual step is {typical:.4g} mm)"
        what = f"about {missing} slice(s) are missing" if missing > 0 else "the slices are spaced unevenly"
        more = f", and at {odd.size - 1} other place(s)" if odd.size > 1 else ""
        raise InputError(
            f"{where}: {what} {between}{more}; export the whole series again, or resample it to even slices"
        )
    step = (positions[-1] - positions[0]) / (len(frames) - 1)
    off = positions - (positions[0] + np.arange(len(frames))[:, None] * step)
    along = np.abs(off @ normal).max()
    if along > _GRID_SHARE * typical:
        raise InputError(
            f"{where}: slices lie up to {along:.3g} mm off an even grid of {typical:.4g} mm; resample the series "
            "to even slices"
        )
    pixel = min(first.spacing_mm)
    sideways = off - np.outer(off @ normal, normal)
    if np.linalg.norm(sideways, axis=1).max() > _DRIFT_PIXELS * pixel:
        i = int(np.argmax(np.linalg.norm(sideways, axis=1)))
        raise InputError(
            f"{where}: {frames[i]} is shifted in its plane by {np.linalg.norm(sideways[i]):.3g} mm against the others; "
            "keep the images of one stack in the folder and move the others out"
        )
    shear = step - (step @ normal) * normal
    if np.linalg.norm(shear) * (len(frames) - 1) <= _DRIFT_PIXELS * pixel:
        return np.asarray(step), None
    angle = np.degrees(np.arctan2(np.linalg.norm(shear), step @ normal))
    if not tilted or angle > _MAX_TILT_DEGREES:
        cure = (
            "predict with --correct-gantry-tilt (correct_gantry_tilt=True in Python), which resamples them onto a "
            "straight grid"
            if angle <= _MAX_TILT_DEGREES
            else f"no gantry tilts by more than {_MAX_TILT_DEGREES:g} degrees: export it again"
        )
        raise TiltError(
            f"{where}: the slices are sheared by {angle:.3g} degrees (gantry tilt), so that the axes of the scan are "
            f"not perpendicular; {cure}"
        )
    return np.asarray(step), shear
