"""Checking the cases that were found, and writing them as one new folder."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightm.datasets.cases import Problem, error
from lightm.datasets.convert.sources import Found, Source
from lightm.errors import InputError, LightMError
from lightm.files import atomic_file
from lightm.images.io import file_suffix, read_volume, write_volume
from lightm.images.volume import Volume, geometry_difference
from lightm.progress import Progress

SHOWN = 20  # problems of a message


@dataclass(frozen=True)
class Converted:
    """A new data set: its folder, the numbers of its cases, what was left out and why."""

    folder: Path
    train: int
    test: int
    problems: list[Problem]
    remarks: list[str]


def write_found(
    found: Found,
    out: Path,
    *,
    link: bool,
    trust_image_geometry: bool,
    skip_faulty: bool,
    overwrite: bool,
    progress: Progress | None,
) -> Converted:
    """Write what a finder found to `out`; see `lightm.datasets.convert.convert_dataset`."""
    problems = [*found.problems, *_twins(found)]
    if not skip_faulty:
        _stop_at(problems)
    faulty = {problem.case for problem in problems if problem.severity == "error"}
    sources = [(source, True) for source in found.train] + [(source, False) for source in found.test]
    sources = [(source, train) for source, train in sources if source.case not in faulty]
    ending = _ending([source for source, _ in sources], out)
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        for name in ("imagesTr", "labelsTr", *(["imagesTs"] if found.test else [])):
            (temporary / name).mkdir(parents=True)
        writer = _Writer(temporary, found, ending, link, trust_image_geometry)
        done = []
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            results = pool.map(lambda item: writer.case(*item), sources)
            for number, (item, faults) in enumerate(zip(sources, results, strict=True), 1):
                problems += faults
                if not faults:
                    done.append(item)
                if progress is not None:
                    progress("converting", number, len(sources))
        if not skip_faulty:
            _stop_at(problems)
        count = sum(train for _, train in done)
        if not count:
            raise InputError(f"{out}: no case with a label is left; nothing was written. {_listed(problems)}")
        content: dict[str, Any] = {
            "name": found.name,
            **found.about,
            "channel_names": {str(index): name for index, name in enumerate(found.channels)},
            "labels": found.labels,
            "numTraining": count,
            "file_ending": ending,
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


class _Writer:
    """Checks a case and writes its files; returns the problems that keep it out."""

    def __init__(self, root: Path, found: Found, ending: str, link: bool, trust: bool) -> None:
        self.root, self.found, self.ending, self.link, self.trust = root, found, ending, link, trust

    def case(self, source: Source, train: bool) -> list[Problem]:
        written: list[Path] = []
        try:
            return self._case(source, train, written)
        except InputError as fault:
            problem = error(source.case, source.images[0], str(fault), "fix the file, or leave the case out")
            for path in written:
                path.unlink(missing_ok=True)
            return [problem]

    def _case(self, source: Source, train: bool, written: list[Path]) -> list[Problem]:
        folder, first = self.root / ("imagesTr" if train else "imagesTs"), None
        for channel in range(source.parts or len(source.images)):
            target = folder / f"{source.case}_{channel:04d}{self.ending}"
            written.append(target)
            if source.parts:
                split_channel(source.images[0], channel, source.parts, target)
                volume = read_volume(target)
            else:
                volume = read_volume(source.images[channel])
                self._put(source.images[channel], volume, target)
            if first is not None and (gap := geometry_difference(first, volume)):
                raise InputError(f"{source.images[channel]}: lies elsewhere than {source.images[0]}: {gap}")
            first = first or volume
        if not train or first is None:
            return []
        target = self.root / "labelsTr" / f"{source.case}{self.ending}"
        written.append(target)
        if source.masks:
            write_volume(target, first.with_data(merged(source.masks, first)), kind="label")
        elif source.label is not None:
            self._label(source.label, first, target)
        return []

    def _label(self, path: Path, image: Volume, target: Path) -> None:
        label = read_volume(path, kind="label")
        unknown = sorted(set(np.unique(label.data).tolist()) - set(self.found.labels.values()))
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


def merged(masks: tuple[Path, ...], image: Volume) -> np.ndarray:
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


def split_channel(path: Path, channel: int, channels: int, target: Path) -> None:
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


class _packed:
    """A gzip stream into a file that appears complete or not at all; equal contents give equal bytes."""

    def __init__(self, target: Path) -> None:
        self._file = atomic_file(target)

    def __enter__(self) -> gzip.GzipFile:
        self._stream = gzip.GzipFile(filename="", mode="wb", fileobj=self._file.__enter__(), compresslevel=4, mtime=0)
        return self._stream

    def __exit__(self, *fault: Any) -> None:
        self._stream.close()
        self._file.__exit__(*fault)


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


def _twins(found: Found) -> list[Problem]:
    seen: dict[str, Source] = {}
    twins = []
    for source in (*found.train, *found.test):
        first = seen.setdefault(source.case.lower(), source)  # two such files are one on Windows and macOS
        if first is not source:
            message = f"the case '{source.case}' exists twice, also as {first.images[0]}"
            twins.append(error(source.case, source.images[0], message, "rename one of them"))
    return twins


def _stop_at(problems: list[Problem]) -> None:
    if any(problem.severity == "error" for problem in problems):
        raise InputError(_listed(problems) + "; --skip-faulty leaves such cases out. Nothing was written")


def _listed(problems: list[Problem]) -> str:
    errors = [str(problem) for problem in problems if problem.severity == "error"]
    more = f"\n... and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
    return f"{len(errors)} problem(s):\n" + "\n".join(errors[:SHOWN]) + more


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
