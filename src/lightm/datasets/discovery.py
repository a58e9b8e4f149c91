"""Finding the cases in a folder: nnU-Net's raw layout, the Medical Segmentation Decathlon's, or two folders.

Only listings and dataset.json are read. (Two plain folders say nothing of their labels: there the label maps
are read, to learn the values.) Problems are collected, so that a check can name all and training the first.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lightm.datasets.cases import (
    Case,
    Dataset,
    Problem,
    error,
    files_in,
    join_channels,
    split_channel,
    split_name,
    warning,
)
from lightm.datasets.description import MAX_CLASSES, Description, read_description
from lightm.errors import InputError
from lightm.images.io import SUFFIXES, channel_paths, companions, file_suffix, read_volume, split_path, voxel_bytes
from lightm.images.limits import MemoryGate

_log = logging.getLogger(__name__)


def open_dataset(
    path: Path | str,
    *,
    labels: Path | str | None = None,
    channels: Sequence[str] | None = None,
    trust_image_geometry: bool = False,
) -> Dataset:
    """Open a folder in nnU-Net's raw layout, in that of the Medical Segmentation Decathlon, or of two plain folders.

    path: the folder with dataset.json; or one with the folders images and labels; or, with `labels`, the folder of
    images. Only dataset.json and listings are read; two plain folders without dataset.json have their label maps
    read, to learn the values, which are then named label_1, label_2, ... channels: their names, instead of those found;
    CT and noNorm choose a normalization. trust_image_geometry: as in `Dataset`.

    Raises InputError for a folder that is none of these, a faulty dataset.json, a label without its image or the
    reverse, missing channels, and cases that exist twice. What only voxels tell is found by `check_dataset`.

    >>> data = lightm.open_dataset(lightm.phantoms("xray", folder / "data", cases=2, size=32))
    >>> [case.id for case in data.cases], data.labels
    (['xray_000', 'xray_001'], {'background': 0, 'lung': 1})
    """
    dataset, problems = scan(Path(path), None if labels is None else Path(labels))
    dataset = as_asked(dataset, channels, trust_image_geometry)
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more problems; `lightm check` lists them all)" if len(errors) > 1 else ""
        raise InputError(f"{errors[0]}{more}")
    for problem in problems:
        _warn(str(problem))
    return dataset


def as_asked(dataset: Dataset, channels: Sequence[str] | None, trust_image_geometry: bool) -> Dataset:
    """Return the dataset with other names of its channels; InputError for another number of them."""
    names = tuple(dataset.channels if channels is None else channels)
    if len(names) != len(dataset.channels):
        raise InputError(
            f"channels {','.join(names)}: {dataset.root} has {len(dataset.channels)} ({','.join(dataset.channels)}); "
            "give a name for each"
        )
    return replace(dataset, channels=names, trust_image_geometry=trust_image_geometry)


@lru_cache(1024)
def _warn(text: str) -> None:
    """Log a warning, once: a run opens its data set several times."""
    _log.warning(text)


def scan(path: Path, labels: Path | None = None) -> tuple[Dataset, list[Problem]]:
    """Return the dataset in a folder, with the problems of its files' names.

    Raises InputError where there is no telling what the dataset is: no folder, no dataset.json, a faulty one.
    """
    if path.is_file() and path.name == "dataset.json":
        path = path.parent
    for folder in (path, *([labels] if labels else [])):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; give the folder that holds dataset.json, or images and labels")
    if labels is not None:
        return _two_folders(path, path, labels)
    file = path / "dataset.json"
    plain = (path / "images").is_dir() and (path / "labels").is_dir()
    if file.is_file() and ((path / "imagesTr").is_dir() or not plain):
        description = read_description(file)
        return _decathlon(path, description) if _is_decathlon(path, description) else _nnunet(path, description)
    if plain:
        return _two_folders(path, path / "images", path / "labels")
    if not any(path.iterdir()):
        raise InputError(f"{path}: the folder is empty; put dataset.json, imagesTr and labelsTr into it")
    raise InputError(
        f"{path}: no dataset.json; expected nnU-Net's layout (dataset.json, imagesTr/CASE_0000.nii.gz, "
        "labelsTr/CASE.nii.gz), or two folders, images and labels"
    )


def _is_decathlon(root: Path, description: Description) -> bool:
    """Whether dataset.json lists the files themselves; nnU-Net's may list cases, whose files have channel numbers."""
    if description.listed is None:
        return False
    images = [entry.get("image") for entry in description.listed[0] if isinstance(entry, dict)]
    folder = root / "imagesTr"
    numbered = folder.is_dir() and any(split_name(file)[0].endswith("_0000") for file in files_in(folder))
    return not numbered or any(isinstance(image, str) and (root / image).exists() for image in images[:100])


def _nnunet(root: Path, description: Description) -> tuple[Dataset, list[Problem]]:
    images, labels = root / "imagesTr", root / "labelsTr"
    for folder in (images, labels):
        if not folder.is_dir():
            raise InputError(
                f"{folder}: no such folder; nnU-Net's layout needs imagesTr and labelsTr beside dataset.json"
            )
    ending = description.file_ending or _ending(labels)
    given, unused = _readable(images, ending)
    maps, more = _readable(labels, ending)
    cases, problems = join_channels(given.items(), description.channels)
    paired, orphans = _pair(cases, maps, {problem.case for problem in problems})
    problems = [_milder(problem, ending) for problem in (*problems, *orphans)] + unused + more
    tests: list[Case] = []
    if (root / "imagesTs").is_dir():
        given, unused = _readable(root / "imagesTs", ending)
        tests, more = join_channels(given.items(), description.channels)
        problems += unused + [warning(problem.case, problem.file, problem.message, problem.cure) for problem in more]
    return _dataset(root, description, ending, paired, tests, problems)


def _milder(problem: Problem, ending: str) -> Problem:
    """What is wrong with a file that ends otherwise than the data set does is a warning: it may be no part of it."""
    if problem.file is None or problem.file.name.lower().endswith(ending):
        return problem
    message = f"{problem.message}, and it ends otherwise than {ending}, so it is not used"
    return warning(problem.case, problem.file, message, problem.cure)


def _readable(folder: Path, ending: str) -> tuple[dict[str, Path], list[Problem]]:
    """Return the images in a folder by name without ending, and a warning for each file that is not used.

    Of two files of one name the one that ends in `ending` is taken. Files that belong to others (the voxels of a pair,
    the spacing of a TIFF) are no images by themselves.
    """
    found: dict[str, Path] = {}
    files = sorted(files_in(folder), key=lambda file: (split_name(file)[1].lower() != ending, file.name))
    beside = {name for file in files for name in companions(file)}
    problems = []
    for file in files:
        stem, suffix = split_name(file)
        if suffix and stem not in found:
            found[stem] = file
        elif suffix:
            message = f"is there beside {found[stem].name}, so it is not used"
            problems.append(warning(None, file, message, "keep one of the two in this folder"))
        elif file.name not in beside:
            problems.append(warning(None, file, "not a format that is read, so it is not used", "convert it"))
    return dict(sorted(found.items())), problems


def _decathlon(root: Path, description: Description) -> tuple[Dataset, list[Problem]]:
    problems: list[Problem] = []
    training, tests = (
        _with_channels(existing(cases, problems), description, problems) for cases in listed_cases(root, description)
    )
    ending = description.file_ending or (file_suffix(training[0].images[0]) if training else None) or ".nii.gz"
    return _dataset(root, description, ending, training, tests, problems)


def _with_channels(cases: list[Case], description: Description, problems: list[Problem]) -> list[Case]:
    """Return cases of one file each with the channels in it; one with another number of them adds to `problems`."""
    if len(description.channels) == 1:
        return cases
    found = []
    for case in cases:
        try:
            images = channel_paths(case.images[0])
        except InputError as refusal:
            message, _, cure = str(refusal).removeprefix(f"{case.images[0]}: ").rpartition("; ")
            problems.append(error(case.id, case.images[0], message or cure, cure if message else "export it again"))
            continue
        if len(images) == len(description.channels):
            found.append(Case(case.id, images, case.label))
        else:
            named = ", ".join(description.channels)
            message = f"it holds {len(images)} channel(s), but dataset.json names {len(description.channels)} ({named})"
            problems.append(error(case.id, case.images[0], message, "correct modality in dataset.json, or the file"))
    return found


def listed_cases(root: Path, description: Description) -> tuple[list[Case], list[Case]]:
    """Return the cases for training and for testing that dataset.json lists as the Decathlon does.

    Raises InputError for entries that are no paths, or lie outside of `root`.
    """
    file, (training, test) = description.file, description.listed or ([], [])
    cases = []
    for entry in training:
        if not isinstance(entry, dict) or not {"image", "label"} <= set(entry):
            raise InputError(f'{file}: "training" holds {str(entry)[:80]!r}; expected {{"image": ..., "label": ...}}')
        image, label = (_inside(root, entry[key], file) for key in ("image", "label"))
        cases.append(Case(split_name(image)[0], (image,), label))
    given = [entry["image"] if isinstance(entry, dict) and "image" in entry else entry for entry in test]
    images = [_inside(root, name, file) for name in given]
    return cases, [Case(split_name(image)[0], (image,)) for image in images]


def existing(cases: list[Case], problems: list[Problem]) -> list[Case]:
    """Return the listed cases whose files exist; the others add to `problems`."""
    found = []
    for case in cases:
        files = {"image": case.images[0], **({} if case.label is None else {"label": case.label})}
        absent = {what: file for what, file in files.items() if not file.is_file()}
        for what, file in absent.items():
            message = f"the {what} listed in dataset.json does not exist"
            problems.append(error(case.id, file, message, "add it, or take the entry out of dataset.json"))
        if not absent:
            found.append(case)
    return found


def _two_folders(root: Path, images: Path, labels: Path) -> tuple[Dataset, list[Problem]]:
    ending, label_ending = _ending(images), _ending(labels)
    given, maps = _stems(images, ending), _stems(labels, label_ending)
    numbered = [split_channel(stem) for stem in given]
    if given and all(numbered) and not set(given) & set(maps):
        count = 1 + max(found[1] for found in numbered if found)
        channels = tuple(f"channel_{index}" for index in range(count)) if count > 1 else ("image",)
        cases, problems = join_channels(given.items(), channels)
    else:
        channels, problems = ("image",), []
        cases = [Case(stem, (file,)) for stem, file in sorted(given.items())]
    paired, orphans = _pair(cases, maps, {problem.case for problem in problems})
    problems = [*_mixed(images, ending), *_mixed(labels, label_ending), *problems, *orphans]
    beside = next((file for file in (root / "dataset.json", labels.parent / "dataset.json") if file.is_file()), None)
    if beside is not None:
        description = read_description(beside)
        if len(description.channels) != len(channels):
            raise InputError(
                f"{beside}: names {len(description.channels)} channels, but {images} holds {len(channels)}"
            )
    else:
        names = _values_found([case.label for case in paired if case.label is not None])
        description = Description(labels, channels, names, None, ending, None, None)
    return _dataset(root, description, ending, paired, [], problems)


def _pair(cases: list[Case], maps: dict[str, Path], reported: set[str | None]) -> tuple[list[Case], list[Problem]]:
    problems = [
        error(case.id, case.images[0], "an image without a label", "add its label, or move the image to another folder")
        for case in cases
        if case.id not in maps
    ]
    known = {case.id for case in cases} | reported
    problems += [
        error(stem, file, "a label without an image", "add its image, or move the label to another folder")
        for stem, file in sorted(maps.items())
        if stem not in known
    ]
    return [Case(case.id, case.images, maps[case.id]) for case in cases if case.id in maps], problems


def _dataset(
    root: Path, description: Description, ending: str, cases: list[Case], tests: list[Case], problems: list[Problem]
) -> tuple[Dataset, list[Problem]]:
    if not cases and not problems:
        raise InputError(
            f"{root}: no cases: no file ends in {ending}; check the folders and file_ending in dataset.json"
        )
    promised = description.cases_promised
    if promised is not None and promised != len(cases) and not problems:
        message = f"numTraining says {promised}, found {len(cases)} cases"
        problems.append(warning(None, description.file, message, "add the missing cases, or correct the number"))
    twins = doubled([*cases, *tests])
    again = doubled(cases)
    problems += again
    problems += [warning(p.case, p.file, p.message, "rename it; it is not predicted") for p in twins if p not in again]
    tests = [case for case in tests if not any(p.file == case.images[0] for p in twins)]
    dataset = Dataset(
        root.resolve().name,
        root,
        description.channels,
        description.labels,
        description.ignore_label,
        ending,
        tuple(sorted(cases, key=lambda case: case.id)),
        tuple(sorted(tests, key=lambda case: case.id)),
        description.regions,
        description.regions_class_order,
    )
    return dataset, problems


def doubled(cases: Sequence[Case]) -> list[Problem]:
    """Return a problem for each case whose id is there before: in any case, as file names on Windows and macOS."""
    seen: dict[str, Case] = {}
    return [
        error(case.id, case.images[0], f"the case exists twice, also as {twin.images[0]}", "rename one of them")
        for case in cases
        if (twin := seen.setdefault(case.id.lower(), case)) is not case
    ]


@lru_cache(1 << 16)
def _values_in_version(file: Path, size: int, changed_ns: int) -> frozenset[int]:
    """The values in a label map, which is read once as long as it stays the same."""
    try:
        label = read_volume(file, kind="label").data
    except InputError:
        return frozenset()  # reported by whoever reads the case
    here = sorted(set().union(*(np.unique(part).tolist() for part in label)))
    # No label map by itself: left out, so that its values are reported as unknown, in this file.
    return frozenset() if here[0] < 0 or len(here) > MAX_CLASSES else frozenset(here)


def values_in(file: Path) -> frozenset[int]:
    """Return the values in a label map, none for one that cannot be read; read once as long as it stays the same."""
    state = split_path(file)[0].stat()
    return _values_in_version(file, state.st_size, state.st_mtime_ns)


def _values_found(files: list[Path]) -> dict[str, int]:
    def values(file: Path) -> frozenset[int]:
        with gate.hold(voxel_bytes(file)):
            return values_in(file)

    gate = MemoryGate()
    with ThreadPoolExecutor(4) as pool:
        found = sorted(set().union({0}, *pool.map(values, files)))
    if len(found) > MAX_CLASSES:
        raise InputError(
            f"{files[0].parent}: {len(found)} label values from {found[0]} to {found[-1]}; "
            f"at most {MAX_CLASSES}, from 0 on, are possible. Are these label maps?"
        )
    return {"background": 0, **{f"label_{value}": value for value in found if value != 0}}


def _stems(folder: Path, ending: str) -> dict[str, Path]:
    return {split_name(file)[0]: file for file in files_in(folder) if file.name.lower().endswith(ending)}


def _others(folder: Path, ending: str) -> list[Path]:
    files = files_in(folder)
    beside = {name for file in files for name in companions(file)}
    return [file for file in files if not file.name.lower().endswith(ending) and file.name not in beside]


def _mixed(folder: Path, ending: str) -> list[Problem]:
    """Files of two plain folders that are not of the format of most: an error where they could be images."""
    message = f"files of several formats in one folder, most end in {ending}"
    return [
        error(None, file, message, f"convert it to {ending}, or remove it")
        if file_suffix(file)
        else warning(None, file, "not a format that is read, so it is not used", "convert or remove it")
        for file in _others(folder, ending)
    ]


def _ending(folder: Path) -> str:
    """Return the only format of a folder's files, or that of more than half of them."""
    found = Counter(suffix for file in files_in(folder) if (suffix := file_suffix(file)))
    if not found:
        raise InputError(f"{folder}: no images; expected files that end in {', '.join(SUFFIXES)}")
    ending, count = found.most_common(1)[0]
    if 2 * count <= found.total():
        raise InputError(f"{folder}: files of several formats ({', '.join(sorted(found))}); convert them to one")
    return ending


def _inside(root: Path, entry: Any, file: Path) -> Path:
    if not isinstance(entry, str):
        raise InputError(f"{file}: lists {str(entry)[:80]!r}; expected the path of a file")
    path = root / entry
    try:
        # By name alone: the files may be links to where another program keeps them.
        inside = "\0" not in entry and Path(os.path.abspath(path)).is_relative_to(Path(os.path.abspath(root)))
        path.is_file()
    except (OSError, RuntimeError, ValueError):  # a name that is too long, a loop of links
        inside = False
    if not inside:
        raise InputError(f"{file}: lists {entry[:200]!r}, which lies outside the dataset; move it inside")
    return path
