"""The plan: how a dataset is resampled, normalised and cut into patches; a YAML file to read and edit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from lightm.config_io import load_yaml, save_yaml, validated
from lightm.datasets.cases import Dataset
from lightm.datasets.intensities import KEPT, intensity_problems
from lightm.device import memory_bytes, resolve_device
from lightm.errors import InputError
from lightm.images.limits import MAX_VOXELS
from lightm.labels import Values, check_regions, targets_of
from lightm.preparation.fingerprint import ChannelIntensities, Fingerprint, rounded, take_fingerprint
from lightm.progress import Progress

_log = logging.getLogger(__name__)

# Three poolings by 2 halve a patch to whole voxels only where 8 divides it.
MULTIPLE = 8
_CAP_VOXELS = {2: 512**2, 3: 128**3}
_BATCH = {2: (8, 12), 3: (2, 2)}
# What training a LightM-UNet of 32 channels keeps for each voxel of a batch (an estimate, on the safe side),
# and the part of the machine's memory that is meant for it.
_BYTES_PER_VOXEL = 12_000
_MEMORY_PART = 0.6
_UNKNOWN_BYTES = 8 * 10**9  # where the system does not say what it has
_ANISOTROPY = 3.0

_SCHEMES: dict[str, Any] = dict(zip(KEPT, ("none", *KEPT[1:]), strict=True))

_HEADING = """\
How LightM prepares this dataset. Edit freely; unknown keys are refused.
Axis order is (z, y, x) in 3D and (y, x) in 2D, in the orientation nearest to right-anterior-superior.
spacing_mm     images are resampled to it        patch_size     voxels of a training patch, multiples of 8
normalization  per channel; "ct": clip to clip_low..clip_high, minus mean, over std; "zscore": per case; "none": values
               as they are; "rescale_to_0_1": per case; "rgb_to_0_1": over 255
fingerprint    what was measured; a record, changing it changes nothing"""


class ChannelNormalization(BaseModel):
    """How one channel's intensities become what a network sees.

    ct: clipped to clip_low..clip_high, minus mean, over std. zscore: minus the case's mean, over its standard
    deviation. none: as they are. rescale_to_0_1: from the case's smallest to its largest value. rgb_to_0_1: over 255.
    """

    model_config = ConfigDict(extra="forbid")

    scheme: Literal["ct", "zscore", "none", "rescale_to_0_1", "rgb_to_0_1"]
    clip_low: float | None = None
    clip_high: float | None = None
    mean: float | None = None
    std: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _complete(self) -> ChannelNormalization:
        missing = [key for key in ("clip_low", "clip_high", "mean", "std") if getattr(self, key) is None]
        if self.scheme == "ct" and missing:
            raise ValueError(f"scheme 'ct' needs {', '.join(missing)}")
        if self.scheme == "ct" and float(self.clip_low or 0) >= float(self.clip_high or 0):
            raise ValueError("clip_low must be below clip_high")
        return self


class Plan(BaseModel):
    """How a dataset is prepared; see the fields' order in the YAML, and `make_plan` for how they are chosen.

    >>> data = lightm.phantoms("xray", folder / "data", cases=2, size=32)
    >>> plan = lightm.plan(data)
    >>> plan.model_copy(update={"patch_size": [16, 16]}).save(folder / "plan.yaml")
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    dataset: str
    spatial_dims: Literal[2, 3]
    channels: list[str] = Field(min_length=1)
    labels: dict[str, int]
    regions: dict[str, list[int]] = {}
    regions_class_order: list[int] = []
    ignore_label: int | None = None
    file_ending: str
    spacing_mm: list[float]
    patch_size: list[int]
    batch_size: int = Field(ge=1)
    normalization: list[ChannelNormalization]
    fingerprint: Fingerprint

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        dims = self.spatial_dims
        for key in ("spacing_mm", "patch_size"):
            if len(getattr(self, key)) != dims:
                raise ValueError(f"{key} needs {dims} numbers in {dims}D, got {getattr(self, key)}")
        if len(self.normalization) != len(self.channels):
            raise ValueError(f"normalization needs one entry per channel, {len(self.channels)}")
        if not all(np.isfinite(self.spacing_mm)) or min(self.spacing_mm) <= 0:
            raise ValueError(f"spacing_mm must be positive, got {self.spacing_mm}")
        for axis, size in zip("ZYX"[-dims:], self.patch_size, strict=True):
            if size < MULTIPLE or size % MULTIPLE:
                below = max(MULTIPLE, size // MULTIPLE * MULTIPLE)
                advice = f"{below} or {below + MULTIPLE}" if size > MULTIPLE else str(MULTIPLE)
                raise ValueError(
                    f"patch size {tuple(self.patch_size)}: {axis}={size} is not a multiple of {MULTIPLE} "
                    f"(three poolings); use {advice}"
                )
        values = list(self.labels.values())
        if values != sorted(set(values)) or len(values) < 2 or values[0] != 0:
            raise ValueError(f"labels need the background, 0, first and then rising values, got {self.labels}")
        if self.regions or self.regions_class_order:
            check_regions(self.regions, self.regions_class_order)
            if (held := {value for region in self.regions.values() for value in region}) != set(values[1:]):
                raise ValueError(f"regions hold the values {sorted(held)}, labels {values[1:]}; both must be the same")
        return self

    @model_serializer(mode="wrap")
    def _short(self, full: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave regions out where there are none, so that such plans are as they always were."""
        content: dict[str, Any] = full(self)
        if not self.regions:
            content.pop("regions", None)
            content.pop("regions_class_order", None)
        return content

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in the order of class indices, background first."""
        return tuple(self.labels)

    @property
    def values(self) -> tuple[int, ...]:
        """The label value of each class index."""
        return tuple(self.labels.values())

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what each output channel of the network stands for: regions, or classes, background first."""
        return tuple(self.regions) or self.classes

    @property
    def targets(self) -> dict[str, Values]:
        """What is trained, found and scored, name to value: regions, or classes without the background."""
        return targets_of(self.labels, self.regions)

    @property
    def label_regions(self) -> tuple[tuple[int, ...], ...]:
        """The class indices of each region; empty without regions."""
        index = {value: k for k, value in enumerate(self.values)}
        return tuple(tuple(index[value] for value in values) for values in self.regions.values())

    def save(self, path: Path | str) -> None:
        """Write the plan as YAML with a heading that explains it; atomic."""
        save_yaml(path, self, _HEADING)


def load_plan(path: Path | str) -> Plan:
    """Read a plan; raises InputError with the file's name, the faulty key and, for an unknown key, the nearest."""
    return load_yaml(path, Plan)


def make_plan(
    dataset: Dataset,
    *,
    patch_size: Sequence[int] | None = None,
    batch_size: int | None = None,
    spacing_mm: Sequence[float] | None = None,
    memory_gb: float | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Plan:
    """Look at all training cases and choose spacing, patch, batch and normalisation.

    Spacing: the median; along an axis three times coarser than the others its 10th percentile, so that the few
    finer scans are not thrown away. Patch: the median shape at that spacing, rounded up to multiples of 8 and
    shortened along its longest axes to at most 128^3 voxels in 3D and 512^2 in 2D, or what the memory holds.
    Batch: 2 in 3D, 8 to 12 in 2D. Normalisation: channels named CT are clipped to the foreground's percentiles
    0.5 and 99.5 and scaled by its mean and standard deviation; noNorm, rescale_to_0_1 and rgb_to_0_1 are what nnU-Net
    has under these names; all others are z-scored, each case by itself. What is odd about intensities is logged.

    memory_gb: for training; by default 0.6 of what `device` has, a GPU's own memory or the machine's. Arguments that
    are given are taken as they are.
    Raises InputError for unusable arguments and as `take_fingerprint` does.
    Cost: every file read twice (voxels, hash); memory of one case per core.
    """
    fingerprint, facts = take_fingerprint(dataset, progress=progress)
    for problem in intensity_problems(dataset, [found.intensities for found in facts]):
        if problem.severity == "error":
            raise InputError(str(problem))
        _log.warning("%s", problem)
    dims = len(fingerprint.shape_median)
    for name, given in (("spacing_mm", spacing_mm), ("patch_size", patch_size)):
        if given is not None and len(given) != dims:
            raise InputError(f"{name} {tuple(given)}: {dataset.name} is {dims}D, so {dims} numbers are needed")
    spacings = np.array([found.spacing_mm for found in facts])
    spacing = rounded(_choose_spacing(spacings) if spacing_mm is None else list(spacing_mm))
    if min(spacing) <= 0:
        raise InputError(f"spacing_mm {tuple(spacing)}: positive millimetres are needed")
    shapes = np.array([found.shape for found in facts]) * spacings / np.array(spacing)
    if float(shapes.prod(axis=1).max()) > MAX_VOXELS:
        largest = tuple(shapes[shapes.prod(axis=1).argmax()].round().astype(np.int64).tolist())
        raise InputError(
            f"at a spacing of {tuple(spacing)} mm the largest image has shape {largest}; at most {MAX_VOXELS} voxels "
            "can be handled; choose a coarser spacing (--spacing-mm)"
        )
    median = np.maximum(np.median(shapes, axis=0).round(), 1).astype(int).tolist()
    budget = _voxel_budget(dims, memory_gb, device)
    patch = [int(size) for size in patch_size] if patch_size is not None else _choose_patch(median, budget)
    fewest, most = _BATCH[dims]
    batch = int(np.clip(most * _CAP_VOXELS[dims] // max(1, int(np.prod(patch))), fewest, most))
    content = {
        "dataset": dataset.name,
        "spatial_dims": dims,
        "channels": list(dataset.channels),
        "labels": dict(dataset.labels),
        "regions": {name: list(values) for name, values in dataset.regions.items()},
        "regions_class_order": list(dataset.regions_class_order),
        "ignore_label": dataset.ignore_label,
        "file_ending": dataset.file_ending,
        "spacing_mm": spacing,
        "patch_size": patch,
        "batch_size": batch if batch_size is None else batch_size,
        "normalization": list(map(_choose_normalization, dataset.channels, fingerprint.intensities)),
        "fingerprint": fingerprint,
    }
    return validated(Plan, content, f"plan of {dataset.name}")


def _choose_spacing(spacings: np.ndarray) -> list[float]:
    target = np.median(spacings, axis=0)
    coarsest = int(target.argmax())
    others = np.delete(target, coarsest)
    if len(target) == 3 and target[coarsest] > _ANISOTROPY * others.max():
        target[coarsest] = max(np.percentile(spacings[:, coarsest], 10), others.max())
    return [float(step) for step in target]


def _choose_patch(median_shape: Sequence[int], budget: int) -> list[int]:
    most = max(MULTIPLE, budget // MULTIPLE * MULTIPLE)
    patch = [min(-(-size // MULTIPLE) * MULTIPLE, most) for size in median_shape]
    while prod(patch) > budget and max(patch) > MULTIPLE:
        patch[int(np.argmax(patch))] -= MULTIPLE
    return patch


def _voxel_budget(dims: int, memory_gb: float | None, device: torch.device | str) -> int:
    """Voxels of one patch such that the smallest batch of them fits the memory."""
    if memory_gb is not None and memory_gb <= 0:
        raise InputError(f"memory_gb {memory_gb}: a positive number of gigabytes is needed")
    there = memory_gb and memory_gb * 1e9
    if there is None:
        there = (memory_bytes(resolve_device(device)) or _UNKNOWN_BYTES) * _MEMORY_PART
    return min(_CAP_VOXELS[dims], int(there / (_BYTES_PER_VOXEL * _BATCH[dims][0])))


def _choose_normalization(name: str, found: ChannelIntensities) -> ChannelNormalization:
    kind = name.strip().lower()
    if kind != "ct":
        return ChannelNormalization(scheme=_SCHEMES.get(kind, "zscore"))
    return ChannelNormalization(scheme="ct", clip_low=found.low, clip_high=found.high, mean=found.mean, std=found.std)
