"""From the layouts of public downloads to nnU-Net's raw layout, which everything else here reads.

A finder per layout (lits, xray, msd, folder) lists the cases and the problems of names; `write` checks every case
and writes it. A new layout is a function from the source folder to `Found`, and an entry in FINDERS.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lightm.datasets.convert.lits import find_lits
from lightm.datasets.convert.msd import find_folder, find_msd
from lightm.datasets.convert.sources import Found
from lightm.datasets.convert.write import Converted, Progress, write_found
from lightm.datasets.convert.xray import find_montgomery_shenzhen
from lightm.errors import InputError, did_you_mean

FINDERS: dict[str, Callable[[Path, Path | None], Found]] = {
    "lits": find_lits,
    "montgomery-shenzhen": find_montgomery_shenzhen,
    "msd": find_msd,
    "folder": find_folder,
}

__all__ = ["FINDERS", "Converted", "convert_dataset"]


def convert_dataset(
    kind: str,
    source: Path | str,
    out: Path | str,
    *,
    labels: Path | str | None = None,
    link: bool = False,
    trust_image_geometry: bool = False,
    skip_faulty: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Convert a public data set as it is downloaded and unpacked to nnU-Net's raw layout in `out`.

    kind: "lits" (volume-N.nii and segmentation-N.nii, in any number of folders), "montgomery-shenzhen" (CXR_png
    with ManualMask/leftMask and rightMask, or with mask/NAME_mask.png; either set or both), "msd" (dataset.json,
    imagesTr, labelsTr; several modalities in one 4D file are parted), "folder" (`source`/images and
    `source`/labels, or images in `source` and label maps in `labels`, paired by name).

    Files of the right format are copied byte for byte, or linked symbolically with `link`; .nii files beside .nii.gz
    are packed. Nothing is resampled and no voxel changes: only masks become label maps (0 and 1), and RGB pictures of
    equal channels grey ones. `trust_image_geometry` gives a label map of the image's shape the image's place in
    space where the two disagree, which is otherwise an error. Every case is read whole and checked. Any error ends
    the conversion with all problems named and nothing written, unless `skip_faulty` leaves those cases out.
    `out` must not exist, or be a data set that `overwrite` allows to replace; it appears complete or not at all.

    Raises InputError for what is wrong with the data or the call, LightMError when writing fails. Cost: every file
    read twice and written once, memory of one case a core.
    """
    if kind not in FINDERS:
        raise InputError(f"unknown layout '{kind}'{did_you_mean(kind, FINDERS)} Known: {', '.join(FINDERS)}.")
    source, out = Path(source), Path(out)
    if labels is not None and kind != "folder":
        raise InputError(f"--labels belongs to the layout 'folder'; '{kind}' knows where its labels are")
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; give the folder that the download was unpacked to")
    _check_target(source.resolve(), out.resolve(), out, overwrite)
    found = FINDERS[kind](source, None if labels is None else Path(labels))
    return write_found(
        found,
        out,
        link=link,
        trust_image_geometry=trust_image_geometry,
        skip_faulty=skip_faulty,
        overwrite=overwrite,
        progress=progress,
    )


def _check_target(source: Path, target: Path, out: Path, overwrite: bool) -> None:
    if target == source or source.is_relative_to(target):
        raise InputError(f"{out}: is or holds the folder to convert from; give another folder")
    if target.is_relative_to(source):
        raise InputError(f"{out}: lies inside the folder to convert from; give a folder outside of it")
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir() or out.is_symlink():
        raise InputError(f"{out}: exists and is no folder; give another one")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{out}: exists already; give another folder, or replace it with --overwrite")
    if not (out / "dataset.json").is_file():
        raise InputError(f"{out}: holds no dataset.json, so it is no data set to replace; give another folder")
