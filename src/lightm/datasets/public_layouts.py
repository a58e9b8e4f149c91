"""The layouts of public downloads: each finder lists the cases of one, with the problems of their names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightm.datasets.cases import Case, Problem, error, files_in, split_name, warning
from lightm.datasets.description import label_entries, read_description
from lightm.datasets.discovery import existing, listed_cases, scan
from lightm.errors import InputError
from lightm.images.io import file_suffix

_LITS_NAME = re.compile(r"(test-volume|volume|segmentation)-(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Source(Case):
    """A case as it was downloaded; one with neither label map nor masks is for testing.

    images: a file per channel, or one 4D NIfTI file that holds `parts` channels (0: it is none). masks: pictures of
    which any pixel above 0 is label 1, merged.
    """

    masks: tuple[Path, ...] = ()
    parts: int = 0

    @property
    def for_training(self) -> bool:
        """Whether there is a label."""
        return self.label is not None or bool(self.masks)


@dataclass
class Found:
    """A data set as it was downloaded: what dataset.json will say, the cases, problems, and remarks to report."""

    name: str
    channels: tuple[str, ...]
    labels: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def take_labels(self, entries: dict[str, Any]) -> None:
        """Take "labels", and of regions "regions_class_order" too, as dataset.json holds them."""
        self.labels = entries.pop("labels")
        self.about |= entries


def _files_below(folder: Path) -> Iterator[Path]:
    """All readable image files below a folder in the order of their paths, without hidden ones (macOS's `._x`)."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(folder).parts)
        if not hidden and file_suffix(path) is not None and path.is_file():
            yield path


def _lits(source: Path, labels: Path | None = None) -> Found:
    """LiTS: volume-N.nii with segmentation-N.nii, test-volume-N.nii without; .nii or .nii.gz, in any folders."""
    about = {
        "reference": "Bilic et al., The Liver Tumor Segmentation Benchmark (LiTS), Medical Image Analysis 84, 2023",
        "licence": "CC BY-NC-ND 4.0, as the challenge's page states it",
    }
    found = Found("LiTS", ("CT",), {"background": 0, "liver": 1, "tumour": 2}, about)
    volumes: dict[int, Path] = {}
    maps: dict[int, Path] = {}
    tests: dict[int, Path] = {}
    for path in _files_below(source):
        match = _LITS_NAME.fullmatch(split_name(path)[0])
        if match is None:
            found.remarks.append(f"{path}: not named as a file of LiTS; left out")
            continue
        kind, number = match[1].lower(), int(match[2])
        twin = {"volume": volumes, "segmentation": maps, "test-volume": tests}[kind].setdefault(number, path)
        if twin is not path:
            case = f"lits_{'test_' if kind == 'test-volume' else ''}{number:03d}"
            message = f"{kind} {number} exists twice, also as {twin}"
            found.problems.append(error(case, path, message, "remove one of the two"))
    if not volumes:
        raise InputError(f"{source}: no files volume-N.nii or volume-N.nii.gz in it or its folders; is this LiTS?")
    for number, path in sorted(volumes.items()):
        case = f"lits_{number:03d}"
        if number in maps:
            found.sources.append(Source(case, (path,), maps[number]))
        else:
            cure = "add it (all batches belong together)"
            found.problems.append(error(case, path, f"has no segmentation-{number}.nii", cure))
    found.problems += [
        error(f"lits_{number:03d}", path, f"has no volume-{number}.nii", "add it, or remove this file")
        for number, path in sorted(maps.items())
        if number not in volumes
    ]
    found.sources += [Source(f"lits_test_{number:03d}", (path,)) for number, path in sorted(tests.items())]
    return found


def _montgomery_shenzhen(source: Path, labels: Path | None = None) -> Found:
    """The chest X-rays of Montgomery County and Shenzhen: CXR_png with masks of the lungs.

    Montgomery has ManualMask/leftMask and rightMask, files of the picture's name. Shenzhen's masks came later, from
    others: mask/NAME_mask.png, for 566 of its 662 pictures. Some copies hold both sets in one CXR_png with one folder
    of masks; pictures and masks are paired by name, whatever set they belong to.
    """
    about = {
        "reference": "Jaeger et al., Two public chest X-ray datasets for computer-aided screening of pulmonary "
        "diseases, Quantitative Imaging in Medicine and Surgery 4(6), 2014; Shenzhen masks: Stirenko et al., 2018",
        "licence": "as the distributors state it: the U.S. National Library of Medicine asks for citation",
    }
    found = Found("MontgomeryShenzhen", ("X-ray",), {"background": 0, "lung": 1}, about)
    pictures: dict[str, Path] = {}
    masks: dict[str, dict[str, Path]] = {"left": {}, "right": {}, "whole": {}}
    for path in _files_below(source):
        folder, stem = path.parent.name.lower(), split_name(path)[0]
        if folder == "cxr_png":
            twin = pictures.setdefault(stem, path)
            if twin is not path:
                found.problems.append(error(stem, path, f"exists twice, also as {twin}", "remove one of them"))
        elif folder in ("leftmask", "rightmask"):
            masks[folder.removesuffix("mask")][stem] = path
        elif folder in ("mask", "masks"):
            masks["whole"][stem.removesuffix("_mask")] = path
    if not pictures:
        raise InputError(f"{source}: no folder CXR_png with pictures (.png) in it; is this Montgomery or Shenzhen?")
    if not any(masks.values()):
        raise InputError(
            f"{source}: no masks; expected ManualMask/leftMask and ManualMask/rightMask (Montgomery), or "
            "mask/NAME_mask.png (Shenzhen)"
        )
    for stem, picture in sorted(pictures.items()):
        given = {side: masks[side][stem] for side in ("left", "right") if stem in masks[side]}
        if len(given) == 1:
            ((there, mask),) = given.items()
            gone = "left" if there == "right" else "right"
            message = f"has a mask of the {there} lung but none of the {gone}"
            absent = mask.parent.parent / f"{gone}Mask" / mask.name
            found.problems.append(error(stem, picture, message, f"add {absent}"))
        elif given or stem in masks["whole"]:
            found.sources.append(Source(stem, (picture,), masks=tuple(given.values()) or (masks["whole"][stem],)))
        else:
            found.remarks.append(f"{picture}: has no mask; left out")
    found.problems += [
        warning(stem, path, "a mask without a picture in CXR_png", "add the picture, or ignore this")
        for files in masks.values()
        for stem, path in sorted(files.items())
        if stem not in pictures
    ]
    return found


def _msd(source: Path, labels: Path | None = None) -> Found:
    """A task of the Medical Segmentation Decathlon: what its dataset.json lists; 4D images have a part per modality."""
    description = read_description(source / "dataset.json")
    if description.listed is None:
        raise InputError(f'{description.file}: lists no "training" cases, as the Decathlon does; is it of this layout?')
    about = {
        "reference": "Antonelli et al., The Medical Segmentation Decathlon, Nature Communications 13, 2022",
        "licence": "CC BY-SA 4.0, as the Decathlon's page states it",
    }
    found = Found(source.resolve().name, description.channels, {}, about)
    found.take_labels(label_entries(description))
    parts = len(description.channels) if len(description.channels) > 1 else 0
    training, tests = listed_cases(source, description)
    found.sources = [
        Source(case.id, case.images, case.label, parts=parts) for case in existing(training + tests, found.problems)
    ]
    named = {file.resolve() for case in training + tests for file in (*case.images, case.label) if file is not None}
    found.remarks = [
        f"{path}: not listed in dataset.json; left out"
        for folder in ("imagesTr", "labelsTr", "imagesTs")
        for path in (files_in(source / folder) if (source / folder).is_dir() else [])
        if file_suffix(path) and path.resolve() not in named
    ]
    return found


def _folder(source: Path, labels: Path | None = None) -> Found:
    """Two folders of images and label maps, paired by name: CASE or CASE_0000, CASE_0001, ... with CASE."""
    if labels is None and not ((source / "images").is_dir() and (source / "labels").is_dir()):
        raise InputError(f"{source}: expected the folders images and labels in it; or give the labels with --labels")
    data, problems = scan(
        source / "images" if labels is None else source, source / "labels" if labels is None else labels
    )
    found = Found(source.resolve().name, data.channels, {}, problems=problems)
    found.take_labels(label_entries(data))
    found.sources = [Source(case.id, case.images, case.label) for case in data.cases]
    return found


FINDERS = {"lits": _lits, "montgomery-shenzhen": _montgomery_shenzhen, "msd": _msd, "folder": _folder}
"""By the name of the layout. A new layout is a function from the source folder to `Found`."""
