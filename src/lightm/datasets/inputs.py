"""Which cases there are to predict: from files, folders of images, datasets and lists, by names alone."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import NamedTuple

from lightm.datasets.cases import Case, files_in, join_channels, split_channel, split_name
from lightm.errors import InputError, did_you_mean
from lightm.images import dicom
from lightm.images.io import SUFFIXES, file_suffix, split_path

_log = logging.getLogger(__name__)
_DATASET_FOLDERS = ("imagesTs", "imagesTr", "images")
# What no file name may hold on some system; a case's name becomes the name of its label map.
_BAD_NAME = re.compile(r'[<>:"/\\|?*\x00-\x1f]|^\.|^\s|[\s.]$')


def find_cases(
    inputs: Path | Sequence[Path], channels: Sequence[str], *, cases: Iterable[str] | None = None
) -> list[Case]:
    """Return the cases in `inputs`, sorted by id, each with one file per channel; reads no voxel.

    inputs: one of these, or several: an image file; a folder of CASE_0000.EXT, CASE_0001.EXT, ... (with one channel
    CASE.EXT will do); a dataset, a folder with imagesTs, imagesTr or images: its imagesTs (or images) is taken, or,
    with `cases`, the named cases from any of them; DICOM: a file, a zip archive, `folder::SeriesInstanceUID`, a folder
    of DICOM files, or a folder whose subfolders or archives, at any depth, hold them (images directly in it come
    first). Every series is a case, named by its folder or archive, and by its UID too where that holds several; with
    several channels the folders are named CASE_0000, CASE_0001, ... and hold one series each; a list in UTF-8 whose
    lines with one path hold any of the former. Blank lines and those that start with `#` are ignored, relative paths
    start at the folder of the list. .txt: one case per line, its channels' files separated by tabs, blanks around a
    path do not count. .csv: a header `case,channel0,channel1,...`, then one case per line.

    Raises InputError, naming file (of a list, the line) and case, for a path that does not exist, no image, a missing
    or surplus channel, a case that is there twice, a name without channel number, a case that is not there, or a list
    that is empty or cannot be read.
    """
    several = [inputs] if isinstance(inputs, (str, Path)) else list(inputs)
    if not several:
        raise InputError("no input; give an image, a folder of images, a dataset or a list")
    if cases is not None:
        cases = {cases} if isinstance(cases, str) else set(cases)
    found: dict[str, tuple[str, Case]] = {}
    for path in map(Path, several):
        for where, case in _listed(path, channels, cases) if _is_list(path) else _given(path, channels, cases):
            if case.id in found:
                raise InputError(
                    f"{where}: case '{case.id}' is there twice, also from {found[case.id][0]}; take one out, or name "
                    "them apart in a CSV list with the columns case,channel0"
                )
            found[case.id] = (where, case)
    for name in sorted(cases or ()):
        if name not in found:
            where = ", ".join(map(str, several))
            raise InputError(f"{where}: no case '{name}' among {len(found)} cases{did_you_mean(name, sorted(found))}")
    return [found[name][1] for name in sorted(found if cases is None else cases)]


def _given(inputs: Path, channels: Sequence[str], cases: Set[str] | None) -> Iterator[tuple[str, Case]]:
    """Yield the cases of one input that is no list, and where they are from."""
    if file_suffix(inputs) is None and (dicom.SEPARATOR in inputs.name or inputs.is_file()):
        if not dicom.is_dicom(inputs):
            raise InputError(
                f"{inputs}: not a format that can be read; expected {', '.join(SUFFIXES)}, DICOM (files, a folder or a "
                "zip archive), or a list of paths (.txt, .csv)"
            )
        if dicom.is_archive(inputs):
            found = _dicom_cases(inputs, [series.source for series in dicom.list_series(inputs)], channels, cases)
        else:
            found = _dicom_single(inputs, channels)
    elif split_path(inputs)[0].is_file():
        found = _single(inputs, channels)
    elif inputs.is_dir():
        found = _from_folders(inputs, channels, cases)
    else:
        raise InputError(f"{inputs}: no such file or folder; give an image, a folder of images, a dataset or a list")
    for case in found:
        yield str(inputs), case


class _Entry(NamedTuple):
    """One line of a list. where: file and line, for messages; case: its name, or None for that of the file."""

    where: str
    case: str | None
    paths: tuple[Path, ...]


def _is_list(path: Path) -> bool:
    return path.suffix.lower() in (".txt", ".csv") and not path.is_dir()


def _listed(path: Path, channels: Sequence[str], cases: Set[str] | None) -> Iterator[tuple[str, Case]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror or error}); check the path") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a list of paths in UTF-8 ({error.reason}); save it as UTF-8 text") from None
    lines = [
        (f"{path}, line {number}", line)
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and line.lstrip()[0] != "#"
    ]
    if not lines:
        raise InputError(f"{path}: an empty list; write one image path per line")
    for entry in _from_csv(path, lines) if path.suffix.lower() == ".csv" else _from_text(path, lines):
        try:
            yield from ((entry.where, case) for case in _entry_cases(entry, channels, cases))
        except InputError as error:
            raise InputError(f"{entry.where}: {error}") from None


def _from_text(path: Path, lines: list[tuple[str, str]]) -> list[_Entry]:
    entries = []
    for where, line in lines:
        fields = [field.strip() for field in line.strip().split("\t")]
        if not all(fields):
            raise InputError(f"{where}: an empty path between tabs; one tab separates the channels of a case")
        entries.append(_Entry(where, None, tuple(path.parent / field for field in fields)))
    return entries


def _from_csv(path: Path, lines: list[tuple[str, str]]) -> list[_Entry]:
    rows = []
    for where, line in lines:
        try:
            rows.append((where, [cell.strip() for cell in next(csv.reader([line], strict=True))]))
        except csv.Error as error:
            raise InputError(f"{where}: not a line of CSV ({error})") from None
    where, header = rows.pop(0)
    expected = ["case", *(f"channel{i}" for i in range(max(1, len(header) - 1)))]
    if header != expected:
        raise InputError(
            f"{where}: header '{','.join(header)}', expected '{','.join(expected)}': one column for the name of the "
            "case and one for each channel"
        )
    if not rows:
        raise InputError(f"{path}: a header and no case; write one case per line")
    for where, cells in rows:
        if len(cells) != len(header):
            raise InputError(f"{where}: {len(cells)} columns, the header has {len(header)} ({','.join(header)})")
        if not all(cells):
            raise InputError(f"{where}: column '{header[cells.index('')]}' is empty")
        if _BAD_NAME.search(cells[0]):
            raise InputError(f"{where}: case '{cells[0]}' cannot be the name of a file; use letters, digits, _ and -")
    return [_Entry(where, cells[0], tuple(path.parent / cell for cell in cells[1:])) for where, cells in rows]


def _entry_cases(entry: _Entry, channels: Sequence[str], cases: Set[str] | None) -> list[Case]:
    first = entry.paths[0]
    for file in entry.paths:
        if _is_list(file):
            raise InputError(f"{file}: a list in a list; name its images here")
        if not split_path(file)[0].exists() and not dicom.is_dicom(file):
            comma = "; channels are separated by tabs" if "," in str(file) and len(entry.paths) == 1 else ""
            raise InputError(f"{file}: no such file or folder{comma}")
    if len(entry.paths) == 1 and entry.case is None:
        return [case for _, case in _given(first, channels, cases)]
    if len(entry.paths) != len(channels):
        raise InputError(
            f"{len(entry.paths)} file(s), but the model takes {len(channels)} ({', '.join(channels)}), in that order"
        )
    for file in entry.paths:
        if file_suffix(file) is None and not dicom.is_dicom(file):
            raise InputError(f"{file}: not a format that can be read; expected {', '.join(SUFFIXES)}, or DICOM")
    stem = split_name(first)[0] if file_suffix(first) else first.name.replace(dicom.SEPARATOR, "_")
    return [Case(entry.case or stem.removesuffix("_0000"), entry.paths)]


def _from_folders(inputs: Path, channels: Sequence[str], wanted: Set[str] | None) -> list[Case]:
    folders = [inputs / name for name in _DATASET_FOLDERS if (inputs / name).is_dir()]
    if folders and wanted is None:
        folders = [folder for folder in folders if folder.name != "imagesTr"][:1]
        if not folders:
            raise InputError(
                f"{inputs}: a dataset without imagesTs; name the cases to predict, or give {inputs / 'imagesTr'} itself"
            )
    folders = folders or [inputs]
    files = sorted(file for folder in folders for file in files_in(folder) if file_suffix(file))
    if files:
        return _joined([(split_name(file)[0], file) for file in files], channels, wanted)
    if series := [path for folder in folders for path in _dicom_sources(folder)]:
        return _dicom_cases(folders[0], series, channels, wanted)
    raise InputError(f"{folders[0]}: no image; expected files that end in {', '.join(SUFFIXES)}, or DICOM")


def _single(file: Path, channels: Sequence[str]) -> list[Case]:
    stem, suffix = split_name(file)
    if len(channels) == 1:
        return [Case(stem.removesuffix("_0000"), (file,))]
    if (found := split_channel(stem)) is None:
        return _joined([(stem, file)], channels)
    named = [(split_name(other)[0], other) for other in sorted(file.parent.glob("*" + suffix))]
    return _joined([(name, other) for name, other in named if (split_channel(name) or "")[:1] == found[:1]], channels)


def _joined(named: list[tuple[str, Path]], channels: Sequence[str], wanted: Set[str] | None = None) -> list[Case]:
    """Return the cases of named images; raises InputError for the first problem of those that are wanted."""
    cases, problems = join_channels(named, channels, owner="the model", bare=True)
    for problem in problems:
        if wanted is None or problem.case in wanted:
            raise InputError(str(problem))
    return cases


def _dicom_sources(root: Path) -> list[Path]:
    """Return every image series below a folder; folders that hold other objects only (DICOMDIR, reports) give none."""
    found: list[Path] = []
    refusals = []
    for folder in dicom.series_folders(root):
        try:
            found += [series.source for series in dicom.list_series(folder)]
        except dicom.NoSeriesError as error:
            refusals.append(error)
    if refusals and not found:
        raise refusals[0]
    for refusal in refusals:
        _log.warning("%s; it is not used", refusal)
    return found


def _dicom_cases(root: Path, sources: list[Path], channels: Sequence[str], wanted: Set[str] | None) -> list[Case]:
    named: dict[str, Path] = {}
    by_folder: dict[Path, list[Path]] = {}
    for source in sources:
        by_folder.setdefault(dicom.split_source(source)[0], []).append(source)
    for folder, members in by_folder.items():
        stem = "_".join(folder.relative_to(root).parts) or folder.resolve().name or "dicom"
        stem = stem[: -len(".zip")] if folder.is_file() and stem.lower().endswith(".zip") else stem
        if len(members) > 1 and len(channels) > 1:
            raise InputError(
                f"{folder}: {len(members)} series in one folder, and the model needs {len(channels)} channels "
                f"({', '.join(channels)}); put each channel's series into a folder CASE_0000, CASE_0001, ..."
            )
        for source in members:
            name = stem if len(members) == 1 else f"{stem}_{dicom.split_source(source)[1]}"
            if name in named:
                raise InputError(f"{folder}: case '{name}' is there twice, also as {named[name]}; rename the folder")
            named[name] = source
    if len(channels) == 1:
        return [Case(name, (named[name],)) for name in sorted(named)]
    return _joined(list(named.items()), channels, wanted)


def _dicom_single(source: Path, channels: Sequence[str]) -> list[Case]:
    if len(channels) > 1:
        raise InputError(
            f"{source}: one DICOM series, but the model needs {len(channels)} channels ({', '.join(channels)}); put "
            "their series into folders CASE_0000, CASE_0001, ... and give the folder that holds these"
        )
    series = dicom.find_series(source)
    name = source.stem if source.is_file() else series.folder.resolve().name or "dicom"
    name = name[: -len(".zip")] if series.folder.is_file() and name.lower().endswith(".zip") else name
    return [Case(name, (source,))]
