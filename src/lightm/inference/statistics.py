"""Volumes, intensities and places of the classes in a label map: a table with one row per case and class."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from lightm.errors import InputError
from lightm.files import write_text
from lightm.images.lazy import LazyVolume
from lightm.images.volume import Volume
from lightm.labels import Values, mask_of

_SCHEMA_VERSION = 1


class ClassStatistics(BaseModel):
    """One class in one case, or one region; everything but voxels and volume is None where no voxel has it.

    value: of a region a list. voxels: their number (in 2D pixels). volume_ml: None in 2D. mean, sd, median, min, max:
    of the intensities of the first channel under the class, as stored in the file; sd divides by the number of voxels.
    centroid_mm: (x, y, z) in the file's own frame, right-anterior-superior as in NIfTI; (x, y) in 2D, in pixels where
    the file has no spacing. touches_border: a voxel lies in the first or last layer of an axis (of more than one
    voxel), so that the structure may go on outside of the image.
    """

    model_config = ConfigDict(extra="forbid")

    class_name: str
    value: int | list[int]
    voxels: int
    volume_ml: float | None = None
    mean: float | None = None
    sd: float | None = None
    median: float | None = None
    min: float | None = None
    max: float | None = None
    centroid_mm: list[float] | None = None
    touches_border: bool | None = None


def class_statistics(
    labels: Volume, image: Volume | LazyVolume, classes: Mapping[str, Values]
) -> list[ClassStatistics]:
    """Return the statistics of every class in `classes` (name to label value, or values of a region), in that order.

    labels, image: (Z, Y, X) or (Y, X), of one shape. Goes slice by slice, in float64; memory: the intensities of one
    class in the image's own type, twice. Raises InputError for different shapes.
    """
    source = LazyVolume.of(image) if isinstance(image, Volume) else image
    if labels.shape != source.geometry.shape:
        raise InputError(f"label map of shape {labels.shape} on an image of shape {source.geometry.shape}")
    return [_one(labels, source, name, value) for name, value in classes.items()]


def _one(labels: Volume, image: LazyVolume, name: str, values: Values) -> ClassStatistics:
    value = values if isinstance(values, int) else list(values)
    flat = labels.data.ndim == 2
    data = labels.data[None] if flat else labels.data
    rest = tuple(slice(0, size) for size in labels.shape[-2:])
    under: list[np.ndarray] = []
    # Voxels of the class along each axis: they hold the centroid and the border.
    counts = [np.zeros(size, dtype=np.int64) for size in data.shape]
    for z, plane in enumerate(data):
        mask = mask_of(plane, values)
        rows = np.count_nonzero(mask, axis=1)
        counts[0][z] = rows.sum()
        if counts[0][z]:
            counts[1] += rows
            counts[2] += np.count_nonzero(mask, axis=0)
            under.append(image.read(rest if flat else (slice(z, z + 1), *rest)).reshape(mask.shape)[mask])
    voxels = int(counts[0].sum())
    volume_ml = None if flat else voxels * float(np.prod(labels.spacing_mm)) / 1000
    if not voxels:
        return ClassStatistics(class_name=name, value=value, voxels=0, volume_ml=volume_ml)
    mean = sum(float(part.sum(dtype=np.float64)) for part in under) / voxels
    variance = sum(float(np.square(part - np.float64(mean)).sum()) for part in under) / voxels
    everything = np.concatenate(under)
    index = [float(count @ np.arange(len(count)) / voxels) for count in reversed(counts)]  # x, y, z
    place = labels.affine @ np.array([*index, 1.0])
    return ClassStatistics(
        class_name=name,
        value=value,
        voxels=voxels,
        volume_ml=volume_ml,
        mean=mean,
        sd=variance**0.5,
        median=float(np.median(everything)),
        min=float(everything.min()),
        max=float(everything.max()),
        centroid_mm=[float(part) for part in place[: labels.data.ndim]],
        touches_border=any(len(count) > 1 and bool(count[0] or count[-1]) for count in counts),
    )


def write_statistics(folder: Path, cases: Iterable[tuple[str, list[ClassStatistics]]]) -> None:
    """Write statistics.csv and statistics.json, each complete or not at all; raises LightMError where the disk refuses.

    The CSV has one row per case and class, empty cells for None, and six significant digits; the JSON everything.
    """
    cases = list(cases)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    fields = [name for name in ClassStatistics.model_fields if name not in ("class_name", "centroid_mm")]
    before = fields.index("touches_border")
    names = [*fields[:before], *(f"centroid_{axis}_mm" for axis in "xyz"), *fields[before:]]
    rows.writerow(["case", "class", *names])
    for case, found in cases:
        for one in found:
            values = one.model_dump()
            values |= {f"centroid_{axis}_mm": place for axis, place in zip("xyz", one.centroid_mm or [], strict=False)}
            rows.writerow([case, one.class_name, *(_cell(values.get(name)) for name in names)])
    write_text(folder / "statistics.csv", text.getvalue())
    content = {
        "schema_version": _SCHEMA_VERSION,
        "cases": [{"case": case, "classes": [one.model_dump() for one in found]} for case, found in cases],
    }
    write_text(folder / "statistics.json", json.dumps(content, indent=1) + "\n")


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
