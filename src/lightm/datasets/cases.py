"""What a dataset is: cases with their files, channels and labels, and the problems found in them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from lightm.errors import InputError
from lightm.images.io import channel_paths, file_suffix, read_volume, split_path
from lightm.images.volume import Volume, geometry_difference
from lightm.labels import Values, targets_of
from lightm.progress import Progress

Item = TypeVar("Item")
Result = TypeVar("Result")

_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")


@dataclass(frozen=True)
class Case:
    """One case: an image file for each channel, and its label map where there is one."""

    id: str
    images: tuple[Path, ...]
    label: Path | None = None


@dataclass(frozen=True)
class Dataset:
    """Cases for training and for testing, with the names of their channels and labels.

    labels: name to value, ordered by value, background (0) first, without the ignore label. Class index k of a network
    stands for the k-th of them; values need not be consecutive.
    regions, regions_class_order: nnU-Net's region-based labels: name to label values, which may overlap, and the value
    that a label map gets where each is found, later ones in place of earlier ones. Both are empty without regions.
    trust_image_geometry: whether all files of a case are taken to lie where its first image does, whatever their
    headers say.
    """

    name: str
    root: Path
    channels: tuple[str, ...]
    labels: dict[str, int]
    ignore_label: int | None
    file_ending: str
    cases: tuple[Case, ...]
    test_cases: tuple[Case, ...] = ()
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    regions_class_order: tuple[int, ...] = ()
    trust_image_geometry: bool = False

    @property
    def targets(self) -> dict[str, Values]:
        """What is trained, found and scored, name to value: regions, or classes without the background."""
        return targets_of(self.labels, self.regions)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in the order of class indices, background first."""
        return tuple(self.labels)

    @property
    def values(self) -> tuple[int, ...]:
        """The label value of each class index."""
        return tuple(self.labels.values())

    def case(self, case_id: str) -> Case:
        """Return a training or test case by its id; raises InputError where there is none."""
        for case in (*self.cases, *self.test_cases):
            if case.id == case_id:
                return case
        raise InputError(
            f"{self.root}: no case '{case_id}' among {len(self.cases)} training and {len(self.test_cases)} test cases"
        )


def read_case(case: Case, *, trust_image_geometry: bool = False) -> tuple[list[Volume], Volume | None]:
    """Return the images of a case and its label map, if it has one.

    Raises InputError, naming the file, for one that cannot be read or lies elsewhere than the first image.
    """
    images = [read_volume(file) for file in case.images]
    label = read_volume(case.label, kind="label") if case.label is not None else None
    for index, (file, volume) in enumerate(zip((*case.images, case.label), [*images, label], strict=True)):
        if file is None or volume is None or (difference := geometry_difference(volume, images[0])) is None:
            continue
        if not trust_image_geometry or volume.shape != images[0].shape:
            message, cure = elsewhere(case, difference, images[0], volume)
            raise InputError(f"{file}: case {case.id}: {message}; {cure} (`lightm check` lists all such files)")
        moved = images[0].with_data(volume.data)
        if index < len(images):
            images[index] = moved
        else:
            label = moved
    return images, label


def elsewhere(case: Case, difference: str, image: Volume, other: Volume) -> tuple[str, str]:
    """Return what to say of a file of a case that does not lie where its first image does, and the way out."""
    message = f"does not lie where {case.images[0].name} does: {difference}"
    if image.shape != other.shape:
        return message, "resample one onto the other"
    if not any(image.form_codes) or not any(other.form_codes):
        which = case.images[0].name if not any(image.form_codes) else "the file itself"
        message += f"; {which} has no place in space (neither sform nor qform is set)"
        return message, (
            "if both hold the same voxels in the same order, give --trust-image-geometry (look at one first)"
        )
    return message, "resample one onto the other, or, if only a header is wrong, give --trust-image-geometry"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a dataset: where, what, and how to fix it."""

    severity: Literal["error", "warning"]
    case: str | None
    file: Path | None
    message: str
    cure: str

    def __str__(self) -> str:
        where = str(self.file) if self.file is not None else f"case {self.case}" if self.case else "dataset"
        return f"{where}: {self.message}; {self.cure}"


error = partial(Problem, "error")
"""error(case, file, message, cure): a problem that must be solved before training or prediction."""
warning = partial(Problem, "warning")
"""warning(case, file, message, cure): a problem that may be left."""


def files_in(folder: Path) -> list[Path]:
    """Return the files directly in a folder, sorted, without hidden ones."""
    return [file for file in sorted(folder.iterdir()) if not file.name.startswith(".") and file.is_file()]


def on_all_cores(
    work: Callable[[Item], Result], items: Sequence[Item], what: str = "", progress: Progress | None = None
) -> list[Result]:
    """Return work(item) of all items in their order, done in threads on all cores; progress counts `what`."""
    done = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for result in pool.map(work, items):
            done.append(result)
            if progress is not None:
                progress(what, len(done), len(items))
    return done


def split_name(file: Path) -> tuple[str, str]:
    """Return a file's name without and its format's ending, ("scan_0000", ".nii.gz"); no ending for other files."""
    name = split_path(file)[0].name
    suffix = name[len(name) - len(file_suffix(file) or "") :]
    return name.removesuffix(suffix), suffix


def split_channel(name: str) -> tuple[str, int] | None:
    """Return case and channel of a name such as CASE_0001, or None for one without a channel number.

    >>> split_channel("scan_0001")
    ('scan', 1)
    """
    match = _CHANNEL.fullmatch(name)
    return None if match is None else (match["case"], int(match["channel"]))


def join_channels(
    named: Iterable[tuple[str, Path]], channels: Sequence[str], *, owner: str = "dataset.json", bare: bool = False
) -> tuple[list[Case], list[Problem]]:
    """Return the cases of images named CASE_0000, CASE_0001, ..., one for each channel, sorted, and what is wrong.

    named: names without their endings, and the files. owner: what asks for the channels, for messages. bare: a single
    channel needs no number, and a number may belong to the name, as in scan_0017, unless scan_0000 is there too.
    One file that holds as many channels as are wanted, named CASE or CASE_0000, is a case by itself.
    """
    named = list(named)
    wanted = f"{owner} names {len(channels)} channel(s) ({', '.join(channels)})"
    one = bare and len(channels) == 1
    numbered = {name.removesuffix("_0000") for name, _ in named if name.endswith("_0000")}
    found = [split_channel(name) for name, _ in named]
    # In a folder without channel 0 whose numbers are too high, digits belong to the names, as in STS24_0010.
    plain = not numbered and any(parts is not None and parts[1] >= len(channels) for parts in found)
    groups: dict[str, dict[int, Path]] = {}
    problems, whole = [], []
    for name, file in named:
        case_id, channel = split_channel(name) or (name, -1)
        if one and (channel < 0 or case_id not in numbered):
            case_id, channel = name, 0
        elif plain:
            case_id, channel = name, -1
        if (channel < 0 or case_id in numbered) and (several := _channels_in(file, len(channels))):
            whole.append(Case(case_id, several))
        elif channel < 0:
            cure = f"rename it to {name}_0000{split_name(file)[1]}, others to _0001 and so on"
            problems.append(error(name, file, f"the name has no channel number, but {wanted}", cure))
        elif channel >= len(channels):
            message = f"channel {channel} of case '{case_id}', but {wanted}"
            cure = "name the channel in channel_names, or move the file to another folder"
            problems.append(error(case_id, file, message, cure))
        elif (twin := groups.setdefault(case_id, {}).setdefault(channel, file)) is not file:
            message = f"case '{case_id}' is there twice, also as {twin}"
            problems.append(error(case_id, file, message, "keep one of them"))
    cases = whole
    for case_id, files in sorted(groups.items()):
        absent = next((index for index in range(len(channels)) if index not in files), None)
        if absent is None:
            cases.append(Case(case_id, tuple(files[index] for index in range(len(channels)))))
            continue
        first = next(iter(files.values()))
        file = first.with_name(f"{case_id}_{absent:04d}{split_name(first)[1]}")
        message = f"channel {absent} ('{channels[absent]}') of case '{case_id}' is missing"
        problems.append(error(case_id, file, message, "add the file"))
    return sorted(cases, key=lambda case: case.id), problems


def _channels_in(file: Path, count: int) -> tuple[Path, ...]:
    """The channels of a file that holds `count` of them, more than one; else none."""
    if count == 1:
        return ()
    try:
        found = channel_paths(file)
    except (InputError, OSError):  # reported by whoever reads it
        return ()
    return found if len(found) == count else ()
