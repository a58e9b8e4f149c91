"""Phantoms: made-up images with exact labels, so that everything can be tried and tested without patient data.

`make_phantoms` writes a dataset in the nnU-Net raw layout; `liver_case`, `vessels_case`, `xray_case` and `brain_case`
(of four channels) make one image and its label in memory.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np

from lightm.datasets.phantoms import brain, liver, vessels, xray
from lightm.datasets.phantoms.brain import brain_case
from lightm.datasets.phantoms.liver import liver_case
from lightm.datasets.phantoms.vessels import vessels_case
from lightm.datasets.phantoms.xray import xray_case
from lightm.errors import InputError, LightMError, did_you_mean
from lightm.images.io import write_volume
from lightm.images.volume import Volume
from lightm.memory import available_bytes
from lightm.progress import Progress

__all__ = [
    "KINDS",
    "MIN_SIZE",
    "brain_case",
    "liver_case",
    "make_phantoms",
    "phantom_case",
    "vessels_case",
    "xray_case",
]

MIN_SIZE = 24
"""Voxels across the body below which the shapes no longer show."""

_LEAST_BYTES_PER_VOXEL = 8  # the image in float32, and a copy with noise

_TUMOUR_BLOCK = 5
"""Of so many liver cases in a row exactly one has no tumour, so that even a small dataset holds both."""


class _Kind(NamedTuple):
    code: int
    name: str
    channels: dict[str, str]
    labels: dict[str, Any]
    file_ending: str
    regions_class_order: list[int] | None = None


_KINDS = {
    "liver": _Kind(1, "LiverPhantoms", liver.CHANNELS, liver.LABELS, ".nii.gz"),
    "vessels": _Kind(2, "VesselPhantoms", vessels.CHANNELS, vessels.LABELS, ".nii.gz"),
    "xray": _Kind(3, "XrayPhantoms", xray.CHANNELS, xray.LABELS, ".png"),
    "brain": _Kind(4, "BrainPhantoms", brain.CHANNELS, brain.LABELS, ".nii.gz", brain.REGIONS_CLASS_ORDER),
}

KINDS = tuple(_KINDS)
"""The kinds of phantom there are."""


def make_phantoms(
    kind: str, out: Path | str, *, cases: int, size: int, seed: int, progress: Progress | None = None
) -> Path:
    """Write a dataset of `cases` synthetic images and labels in the nnU-Net raw layout and return its folder.

    kind: "liver" (abdominal CT: 1 liver, 2 tumour), "vessels" (chest CT: 1 artery, 2 vein, 3 airway), "xray"
    (2D radiograph: 1 lung) or "brain" (MR of four sequences in one 4D file, with the overlapping regions whole tumour,
    tumour core and enhancing tumour). size: typical voxels across the body, at least 24; the CT kinds vary around it. A
    case depends on kind, seed, size and its own number alone, so 10 cases are the first 10 of 20.
    progress: called as progress("phantoms", done, cases).

    The folder appears only when it is complete. Raises InputError for a wrong argument or an output folder that
    holds something, LightMError when the disk cannot be written. Cost: about 0.1 s per liver of size 64, 0.4 s per
    chest CT of size 96 and 0.1 s per radiograph of size 256 on one core.
    """
    out, spec = Path(out), _spec(kind)
    if cases < 1:
        raise InputError(f"got {cases} cases: expected at least 1")
    if size < MIN_SIZE:
        raise InputError(f"got size {size}: expected at least {MIN_SIZE} voxels, below which the shapes do not show")
    needed, there = _LEAST_BYTES_PER_VOXEL * size ** (2 if kind == "xray" else 3), available_bytes()
    if there is not None and needed > there:
        raise InputError(
            f"got size {size}: one case needs {needed / 1e9:.3g} GB of memory at least, and {there / 1e9:.3g} GB are "
            "there; choose a smaller size"
        )
    if seed < 0:
        raise InputError(f"got seed {seed}: expected 0 or a positive whole number")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: give the name of a new folder")
    if out.is_dir() and any(out.iterdir()):
        what = "already holds a dataset" if (out / "dataset.json").exists() else "is not empty"
        raise InputError(f"{out} {what}: give the name of a new folder, or remove this one first")
    description = {
        "name": spec.name,
        "description": f"Synthetic: computed shapes, no patient data (lightm phantom {kind}).",
        "channel_names": spec.channels,
        "labels": spec.labels,
        "numTraining": cases,
        "file_ending": spec.file_ending,
        **({} if spec.regions_class_order is None else {"regions_class_order": spec.regions_class_order}),
        "synthetic": True,
        "phantom": {"kind": kind, "size": size, "seed": seed},
    }
    work = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        shutil.rmtree(work, ignore_errors=True)
        for folder in ("imagesTr", "labelsTr"):
            (work / folder).mkdir(parents=True)
        for index in range(cases):
            images, label = _case(kind, index, size, seed)
            name = f"{kind}_{index:03d}"
            if len(images) == 1:
                write_volume(work / "imagesTr" / f"{name}_0000{spec.file_ending}", images[0])
            else:
                _write_4d(work / "imagesTr" / f"{name}{spec.file_ending}", images)
            write_volume(work / "labelsTr" / f"{name}{spec.file_ending}", label)
            if progress is not None:
                progress("phantoms", index + 1, cases)
        (work / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        if out.is_dir():
            out.rmdir()  # empty, as checked; not every platform renames over a folder
        work.rename(out)
    except OSError as error:
        raise LightMError(
            f"phantoms could not be written to {out}: {error}; give a folder that can be written"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def phantom_case(kind: str, index: int, *, size: int, seed: int) -> tuple[Volume, Volume]:
    """Return image (of several channels the first) and label of case `index` of a dataset, as `make_phantoms` writes
    it.

    Arguments as there. Raises InputError for an unknown kind.
    """
    images, label = _case(kind, index, size, seed)
    return images[0], label


def _case(kind: str, index: int, size: int, seed: int) -> tuple[list[Volume], Volume]:
    spec = _spec(kind)
    rng = np.random.default_rng([spec.code, seed, size, index, 0])
    if kind == "liver":
        block, place = divmod(index, _TUMOUR_BLOCK)
        draw = np.random.default_rng([spec.code, seed, size, block, 1])
        counts = draw.integers(1, liver.MAX_TUMOURS + 1, _TUMOUR_BLOCK)
        counts[draw.integers(_TUMOUR_BLOCK)] = 0
        image, label = liver_case(size, rng, tumours=int(counts[place]))
    elif kind == "brain":
        return brain_case(size, rng)
    else:
        image, label = vessels_case(size, rng) if kind == "vessels" else xray_case(size, rng)
    return [image], label


def _write_4d(path: Path, images: list[Volume]) -> None:
    """Write channels of one geometry as one NIfTI file (x, y, z, channel); equal ones give equal bytes."""
    voxels = np.stack([image.data.T for image in images], axis=-1)
    file = nibabel.Nifti1Image(voxels, images[0].affine, dtype=voxels.dtype)
    file.header.set_xyzt_units("mm")
    with path.open("wb") as stream, gzip.GzipFile(filename="", mode="wb", fileobj=stream, mtime=0) as packed:
        file.to_stream(packed)


def _spec(kind: str) -> _Kind:
    if kind not in _KINDS:
        raise InputError(f"unknown kind of phantom '{kind}': expected {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
    return _KINDS[kind]
