"""Finding the cases in a folder: nnU-Net's raw layout, the Medical Segmentation Decathlon's, or two folders.

Only listings and dataset.json are read. (Two plain folders say nothing of their labels: there the label maps
are read, to learn the values.) Problems are collected, so that a check can name all and training the first.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lightm.datasets.cases import Case, Dataset, Problem, error, join_channels, split_channel, split_name, warning
from lightm.datasets.description import MAX_CLASSES, Description, read_description
from lightm.errors import InputError
from lightm.images.io import SUFFIXES, file_suffix, read_volume, voxel_bytes
from lightm.images.limits import MemoryGate


def scan(path: Path, labels: Path | None = None) -> tuple[Dataset, list[Problem]]:
    """Return the dataset in a folder, with the problems of its files' names.

    Raises InputError where there is no telling what the dataset is: no folder, no dataset.json, a faulty one.
    """
    path = Path(path)
    if path.is_file() and path.name == "dataset.json":
        path = path.parent
    for folder in (path, *([labels] if labels else [])):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; give the folder that holds dataset.json, or images and labels")
    if labels is not None:
        return _two_folders(path, path, Path(labels))
    file = path / "dataset.json"
    plain = (path / "images").is_dir() and (path / "labels").is_dir()
    if file.is_file() and ((path / "imagesTr").is_dir() or not plain):
        description = read_description(file)
        return _listed(path, description) if description.listed else _nnunet(path, description)
    if plain:
        return _two_folders(path, path / "images", path / "labels")
    if not any(path.iterdir()):
        raise InputError(f"{path}: the folder is empty; put dataset.json, imagesTr and labelsTr into it")
    raise InputError(
        f"{path}: no dataset.json; expected nnU-Net's layout (dataset.json, imagesTr/CASE_0000.nii.gz, "
        "labelsTr/CASE.nii.gz), or two folders, images and labels"
    )


def _nnunet(root: Path, description: Description) -> tuple[Dataset, list[Problem]]:
    for folder in (root / "imagesTr", root / "labelsTr"):
        if not folder.is_dir():
            raise InputError(
                f"{folder}: no such folder; nnU-Net's layout needs imagesTr and labelsTr beside dataset.json"
            )
    ending = description.file_ending or _ending(root / "labelsTr")
    cases, problems = join_channels(_stems(root / "imagesTr", ending).items(), description.channels)
    incomplete = {problem.case for problem in problems}
    paired, orphans = _pair(cases, _stems(root / "labelsTr", ending), incomplete)
    problems += orphans + _foreign(root / "imagesTr", ending) + _foreign(root / "labelsTr", ending)
    tests: list[Case] = []
    if (root / "imagesTs").is_dir():
        tests, faults = join_channels(_stems(root / "imagesTs", ending).items(), description.channels)
        problems += faults
    return _dataset(root, description, ending, paired, tests, problems)


def _listed(root: Path, description: Description) -> tuple[Dataset, list[Problem]]:
    if len(description.channels) > 1:
        raise InputError(
            f"{description.file}: {len(description.channels)} modalities in one 4D file; save each as "
            "a file of its own, CASE_0000.nii.gz, CASE_0001.nii.gz, ... (nnUNetv2_convert_MSD_dataset does)"
        )
    training, test = description.listed or ([], [])
    cases, tests, problems = [], [], []

    def exists(file: Path, what: str) -> bool:
        if not file.is_file():
            message = f"the {what} listed in dataset.json does not exist"
            problems.append(error(split_name(file)[0], file, message, "add it, or remove the entry"))
        return file.is_file()

    for entry in training:
        if not isinstance(entry, dict) or not {"image", "label"} <= set(entry):
            raise InputError(
                f'{description.file}: "training" holds {str(entry)[:80]!r}; expected {{"image": ..., "label": ...}}'
            )
        image, label = (_inside(root, entry[key], description.file) for key in ("image", "label"))
        if all([exists(image, "image"), exists(label, "label")]):
            cases.append(Case(split_name(image)[0], (image,), label))
    for entry in test:
        name = entry["image"] if isinstance(entry, dict) and "image" in entry else entry
        image = _inside(root, name, description.file)
        if exists(image, "image"):
            tests.append(Case(split_name(image)[0], (image,)))
    ending = description.file_ending or (file_suffix(cases[0].images[0]) if cases else None) or ".nii.gz"
    return _dataset(root, description, ending, cases, tests, problems)


def _two_folders(root: Path, images: Path, labels: Path) -> tuple[Dataset, list[Problem]]:
    ending = _ending(images)
    given, maps = _stems(images, ending), _stems(labels, _ending(labels))
    numbered = [split_channel(stem) for stem in given]
    if given and all(numbered) and not set(given) & set(maps):
        count = 1 + max(found[1] for found in numbered if found)
        channels = tuple(f"channel_{index}" for index in range(count)) if count > 1 else ("image",)
        cases, problems = join_channels(given.items(), channels)
    else:
        channels, problems = ("image",), []
        cases = [Case(stem, (file,)) for stem, file in sorted(given.items())]
    paired, orphans = _pair(cases, maps, {problem.case for problem in problems})
    foreign = [*_mixed(images, ending), *_mixed(labels, _ending(labels))]
    problems = foreign + problems + orphans
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
    paired, problems = [], []
    for case in cases:
        if case.id in maps:
            paired.append(Case(case.id, case.images, maps[case.id]))
        else:
            problems.append(
                error(case.id, case.images[0], "an image without a label", "add its label, or remove the image")
            )
    known = {case.id for case in cases} | reported
    for stem, file in sorted(maps.items()):
        if stem not in known:
            problems.append(error(stem, file, "a label without an image", "add its image, or remove the label"))
    return paired, problems


def _dataset(
    root: Path,
    description: Description,
    ending: str,
    cases: list[Case],
    tests: list[Case],
    problems: list[Problem],
) -> tuple[Dataset, list[Problem]]:
    if not cases and not problems:
        raise InputError(
            f"{root}: no cases: no file ends in {ending}; check the folders and file_ending in dataset.json"
        )
    promised = description.cases_promised
    if promised is not None and promised != len(cases) and not problems:
        message = f"numTraining says {promised}, found {len(cases)} cases"
        problems.append(warning(None, description.file, message, "add the missing cases, or correct the number"))
    seen: dict[str, Case] = {}
    for case in (*cases, *tests):
        twin = seen.setdefault(case.id.lower(), case)  # two such files are one on Windows and macOS
        if twin is not case:
            problems.append(
                error(case.id, case.images[0], f"the case exists twice, also as {twin.images[0]}", "rename one of them")
            )
    dataset = Dataset(
        root.resolve().name,
        root,
        description.channels,
        description.labels,
        description.ignore_label,
        ending,
        tuple(sorted(cases, key=lambda case: case.id)),
        tuple(sorted(tests, key=lambda case: case.id)),
    )
    return dataset, problems


@lru_cache(1 << 16)
def _values_in(file: Path, size: int, changed_ns: int) -> frozenset[int]:
    """The values in a label map, which is read once as long as it stays the same."""
    try:
        label = read_volume(file, kind="label").data
    except InputError:
        return frozenset()  # reported by whoever reads the case
    here = sorted(set().union(*(np.unique(part).tolist() for part in label)))
    # No label map by itself: left out, so that its values are reported as unknown, in this file.
    return frozenset() if here[0] < 0 or len(here) > MAX_CLASSES else frozenset(here)


def _values_found(files: list[Path]) -> dict[str, int]:
    def values(file: Path) -> frozenset[int]:
        state = file.stat()
        with gate.hold(voxel_bytes(file)):
            return _values_in(file, state.st_size, state.st_mtime_ns)

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
    return {
        file.name[: -len(ending)]: file
        for file in sorted(folder.iterdir())
        if file.name.endswith(ending) and not file.name.startswith(".") and file.is_file()
    }


def _foreign(folder: Path, ending: str) -> list[Problem]:
    """Images of another format would be left out in silence: say so."""
    message = f"ends otherwise than file_ending {ending} in dataset.json, so it is not used"
    cure = f"convert it to {ending}, or remove it"
    return [warning(None, file, message, cure) for file in _others(folder, ending)]


def _mixed(folder: Path, ending: str) -> list[Problem]:
    """Files of two plain folders that are not of the format of most: an error where they could be images."""
    message = f"files of several formats in one folder, most end in {ending}"
    return [
        error(None, file, message, f"convert it to {ending}, or remove it")
        if file_suffix(file)
        else warning(None, file, "not a format that is read, so it is not used", "convert or remove it")
        for file in _others(folder, ending)
    ]


def _others(folder: Path, ending: str) -> list[Path]:
    return [
        file
        for file in sorted(folder.iterdir())
        if not file.name.startswith(".") and file.is_file() and not file.name.endswith(ending)
    ]


def _ending(folder: Path) -> str:
    """Return the only format of a folder's files, or that of more than half of them; the rest are foreign."""
    found = Counter(
        suffix for file in folder.iterdir() if not file.name.startswith(".") if (suffix := file_suffix(file))
    )
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
        inside = "\0" not in entry and path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):  # a name that is too long, a loop of links
        inside = False
    if not inside:
        raise InputError(f"{file}: lists {entry[:200]!r}, which lies outside the dataset; move it inside")
    return path
