"""The Medical Segmentation Decathlon, and two folders of images and labels."""

from __future__ import annotations

from pathlib import Path

from lightm.datasets.cases import error, split_name
from lightm.datasets.convert.sources import Found, Source
from lightm.datasets.description import read_description
from lightm.datasets.discovery import scan
from lightm.errors import InputError
from lightm.images.io import file_suffix


def find_msd(source: Path, labels: Path | None = None) -> Found:
    """List the cases that the dataset.json of a task of the Decathlon names; 4D images have a part per modality."""
    description = read_description(source / "dataset.json")
    if description.listed is None:
        raise InputError(f'{description.file}: lists no "training" cases, as the Decathlon does; is it of this layout?')
    found = Found(source.resolve().name, description.channels, dict(description.labels))
    if description.ignore_label is not None:
        found.labels["ignore"] = description.ignore_label
    found.about = {
        "reference": "Antonelli et al., The Medical Segmentation Decathlon, Nature Communications 13, 2022",
        "licence": "CC BY-SA 4.0, as the Decathlon's page states it",
    }
    parts = len(description.channels) if len(description.channels) > 1 else 0
    named: set[Path] = set()
    for part, entries in zip(("training", "test"), description.listed, strict=True):
        for entry in entries:
            keys = ("image", "label") if part == "training" else ("image",)
            given = entry if isinstance(entry, dict) else {"image": entry}
            files = []
            for key in keys:
                if not isinstance(given.get(key), str):
                    raise InputError(f'{description.file}: "{part}" holds {entry!r}; expected a path for "{key}"')
                path = source / given[key]
                if not path.resolve().is_relative_to(source.resolve()):
                    raise InputError(f"{description.file}: lists {given[key]}, which lies outside; move it inside")
                files.append(path)
            case = split_name(files[0])[0]
            named.update(path.resolve() for path in files)
            missing = [path for path in files if not path.is_file()]
            for path in missing:
                found.problems.append(
                    error(case, path, "listed in dataset.json, but does not exist", "add it, or remove the entry")
                )
            if not missing and part == "training":
                found.train.append(Source(case, (files[0],), files[1], parts=parts))
            elif not missing:
                found.test.append(Source(case, (files[0],), parts=parts))
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        for path in sorted((source / folder).glob("*")) if (source / folder).is_dir() else []:
            if file_suffix(path) and not path.name.startswith(".") and path.resolve() not in named:
                found.remarks.append(f"{path}: not listed in dataset.json; left out")
    return found


def find_folder(source: Path, labels: Path | None = None) -> Found:
    """List images and labels of two folders, paired by name: CASE or CASE_0000, CASE_0001, ... with CASE."""
    if labels is None and not ((source / "images").is_dir() and (source / "labels").is_dir()):
        raise InputError(f"{source}: expected the folders images and labels in it; or give the labels with --labels")
    data, problems = scan(
        source / "images" if labels is None else source, source / "labels" if labels is None else labels
    )
    found = Found(source.resolve().name, data.channels, dict(data.labels), problems=problems)
    if data.ignore_label is not None:
        found.labels["ignore"] = data.ignore_label
    found.train = [Source(case.id, case.images, case.label) for case in data.cases]
    return found
