"""From the layouts of public downloads to nnU-Net's raw layout, which everything else here reads."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightm.datasets.cases import Problem, error, on_all_cores
from lightm.datasets.discovery import doubled
from lightm.datasets.public_layouts import FINDERS, Found, Source
from lightm.errors import InputError, LightMError, did_you_mean
from lightm.files import atomic_file
from lightm.images.io import file_suffix, read_volume, write_volume
from lightm.images.volume import Volume, geometry_difference
from lightm.labels import each_value
from lightm.progress import Progress

_SHOWN = 20  # problems of a message


@dataclass(frozen=True)
class Converted:
    """A new data set: its folder, the numbers of its cases, what was left out and why."""

    folder: Path
    train: int
    test: int
    problems: list[Problem]
    remarks: list[str]


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
    read twice and written once, memory of one case per core.
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
    problems = [*found.problems, *doubled(found.sources)]
    if not skip_faulty:
        _stop_at(problems)
    faulty = {problem.case for problem in problems if problem.severity == "error"}
    sources = [source for source in found.sources if source.id not in faulty]
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}.tmp")
    writer = _Writer(temporary, found, _ending(sources, out), link, trust_image_geometry)
    tests = any(not source.for_training for source in found.sources)
    try:
        for name in ("imagesTr", "labelsTr", *(["imagesTs"] if tests else [])):
            (temporary / name).mkdir(parents=True)
        written = on_all_cores(writer.write, sources, "converting", progress)
        problems += [problem for faults in written for problem in faults]
        done = [case for case, faults in zip(sources, written, strict=True) if not faults]
        if not skip_faulty:
            _stop_at(problems)
        count = sum(case.for_training for case in done)
        if not count:
            raise InputError(f"{out}: no case with a label is left; nothing was written. {_listed(problems)}")
        content: dict[str, Any] = {
            "name": found.name,
            **found.about,
            "channel_names": {str(index): name for index, name in enumerate(found.channels)},
            "labels": found.labels,
            "numTraining": count,
            "file_ending": writer.ending,
        }
        (temporary / "dataset.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8", newline="\n")
        _put_in_place(temporary, out, overwrite)
    except OSError as fault:
        raise LightMError(
            f"{out}: cannot be written ({fault.strerror or fault}); check the folder's rights and the free space"
        ) from fault
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Converted(out, count, len(done) - count, problems, found.remarks)


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


@dataclass(frozen=True)
class _Writer:
    """Checks a case and writes its files below `root`."""

    root: Path
    found: Found
    ending: str
    link: bool
    trust: bool

    def write(self, source: Source) -> list[Problem]:
        """Write a case; returns the problems that keep it out, of which no file is left then."""
        written: list[Path] = []
        try:
            self._write(source, written)
        except InputError as fault:
            for path in written:
                path.unlink(missing_ok=True)
            return [error(source.id, source.images[0], str(fault), "fix the file, or leave the case out")]
        return []

    def _write(self, source: Source, written: list[Path]) -> None:
        folder = self.root / ("imagesTr" if source.for_training else "imagesTs")
        volumes: list[Volume] = []
        for channel in range(source.parts or len(source.images)):
            written.append(folder / f"{source.id}_{channel:04d}{self.ending}")
            if source.parts:
                _write_part(source.images[0], channel, source.parts, written[-1])
                volume = read_volume(written[-1])
            else:
                volume = read_volume(source.images[channel])
                self._put(source.images[channel], volume, written[-1])
            volumes = volumes or [volume]
            if gap := geometry_difference(volumes[0], volume):
                raise InputError(f"{source.images[channel]}: lies elsewhere than {source.images[0]}: {gap}")
        if not source.for_training:
            return
        written.append(self.root / "labelsTr" / f"{source.id}{self.ending}")
        if source.masks:
            write_volume(written[-1], volumes[0].with_data(_merged(source.masks, volumes[0])), kind="label")
        elif source.label is not None:
            self._write_label(source.label, volumes[0], written[-1])

    def _write_label(self, path: Path, image: Volume, target: Path) -> None:
        label = read_volume(path, kind="label")
        unknown = sorted(
            set(np.unique(label.data).tolist())
            - {one for value in self.found.labels.values() for one in each_value(value)}
        )
        if unknown:
            known = ", ".join(f"{name} {value}" for name, value in self.found.labels.items())
            raise InputError(f"{path}: holds the value {unknown[0]}, which is no label ({known})")
        gap = geometry_difference(image, label)
        if gap and self.trust and image.shape == label.shape:
            write_volume(target, image.with_data(label.data), kind="label")
        elif gap:
            cure = "; --trust-image-geometry takes the image's" if image.shape == label.shape else ""
            raise InputError(f"{path}: does not fit its image: {gap}{cure}")
        else:
            self._put(path, label, target)

    def _put(self, path: Path, volume: Volume, target: Path) -> None:
        """Copy or link a file; write it anew only where its format is another one."""
        suffix = file_suffix(path)
        if suffix == self.ending and (suffix != ".png" or _is_grey(path)):
            if self.link:
                target.symlink_to(path.resolve())
            else:
                shutil.copyfile(path, target)
        elif suffix == ".nii" and self.ending == ".nii.gz":
            with path.open("rb") as plain, _packed(target) as stream:
                shutil.copyfileobj(plain, stream, 1 << 20)
        else:
            write_volume(target, volume)


def _merged(masks: tuple[Path, ...], image: Volume) -> np.ndarray:
    """Return 1 where any of the masks is above 0; InputError, naming the file, for what is no mask of the image."""
    label = np.zeros(image.shape, np.uint8)
    for path in masks:
        mask = read_volume(path).data
        if mask.shape != image.shape:
            raise InputError(f"{path}: the mask has shape {mask.shape}, its picture {image.shape} (y, x)")
        values = np.unique(mask)
        if len(values) > 2 or (len(values) == 2 and values[0] != 0):
            raise InputError(
                f"{path}: a mask holds 0 and one other value, found {len(values)} values from {values[0]} to "
                f"{values[-1]}; threshold it (a resampled mask holds values between)"
            )
        label[mask > 0] = 1
    return label


def _write_part(path: Path, channel: int, channels: int, target: Path) -> None:
    """Write one channel of a 4D NIfTI-1 file as a 3D .nii.gz: the same header but for its axes, the same bytes.

    Raises InputError for another format or another number of channels.
    """
    try:
        with gzip.open(path, "rb") if file_suffix(path) == ".nii.gz" else path.open("rb") as stream:
            start = stream.read(352)
            order = next((o for o in "<>" if len(start) == 352 and struct.unpack_from(o + "i", start)[0] == 348), None)
            if order is None or start[344:348] != b"n+1\0":
                raise InputError(f"{path}: not a NIfTI-1 file (.nii or .nii.gz)")
            dims = struct.unpack_from(order + "8h", start, 40)
            if dims[0] < 4 or dims[4] != channels or any(size > 1 for size in dims[5 : dims[0] + 1]):
                raise InputError(
                    f"{path}: has shape {dims[1 : dims[0] + 1]} (x, y, z, ...), but dataset.json names {channels} "
                    "modalities, the fourth axis"
                )
            offset = int(struct.unpack_from(order + "f", start, 108)[0])
            bits = struct.unpack_from(order + "h", start, 72)[0]
            size = dims[1] * dims[2] * dims[3] * bits // 8
            header = bytearray(start + stream.read(offset - 352))
            struct.pack_into(order + "8h", header, 40, 3, *dims[1:4], 1, 1, 1, 1)
            for _ in range(channel):
                stream.seek(size, os.SEEK_CUR)
            data = stream.read(size)
    except (OSError, EOFError) as fault:
        raise InputError(f"{path}: cannot be read ({fault}); copy or download it again") from None
    if len(data) != size:
        raise InputError(f"{path}: the file ends too early (truncated); copy or download it again")
    with _packed(target) as stream:
        stream.write(header + data)


@contextlib.contextmanager
def _packed(target: Path) -> Iterator[gzip.GzipFile]:
    """A gzip stream into a file that appears complete or not at all; equal contents give equal bytes."""
    with (
        atomic_file(target) as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=4, mtime=0) as stream,
    ):
        yield stream


def _is_grey(path: Path) -> bool:
    from PIL import Image

    with Image.open(path) as picture:
        return picture.mode in ("1", "L", "I", "I;16", "I;16B")


def _ending(sources: list[Source], out: Path) -> str:
    """The one format of all files: as they are where they agree, else packed NIfTI."""
    files = [path for source in sources for path in (*source.images, source.label, *source.masks) if path is not None]
    found = {file_suffix(path) for path in files}
    if not files:
        raise InputError(f"{out}: no case without a problem is left; nothing was written")
    if found == {".png"}:
        return ".png"
    if ".png" in found or None in found:
        raise InputError(f"{out}: pictures (.png) and NIfTI files in one data set; convert them to one format first")
    return ".nii" if found == {".nii"} and not any(source.parts for source in sources) else ".nii.gz"


def _stop_at(problems: list[Problem]) -> None:
    if any(problem.severity == "error" for problem in problems):
        raise InputError(_listed(problems) + "; --skip-faulty leaves such cases out. Nothing was written")


def _listed(problems: list[Problem]) -> str:
    errors = [str(problem) for problem in problems if problem.severity == "error"]
    more = f"\n... and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
    return f"{len(errors)} problem(s):\n" + "\n".join(errors[:_SHOWN]) + more


def _put_in_place(temporary: Path, out: Path, overwrite: bool) -> None:
    """Rename the finished folder; an old one is moved aside first and deleted last."""
    aside = None
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise InputError(f"{out}: appeared while the data were converted; give another folder")
        aside = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}.old")
        os.replace(out, aside)
    elif out.is_dir():
        out.rmdir()
    try:
        os.replace(temporary, out)
    except OSError:
        if aside is not None:
            os.replace(aside, out)
        raise
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)
