"""LiTS: volume-N.nii with segmentation-N.nii, test-volume-N.nii without; .nii or .nii.gz, in any folders."""

from __future__ import annotations

import re
from pathlib import Path

from lightm.datasets.cases import error, split_name
from lightm.datasets.convert.sources import Found, Source, files_below
from lightm.errors import InputError

_NAME = re.compile(r"(test-volume|volume|segmentation)-(\d+)", re.IGNORECASE)


def find_lits(source: Path, labels: Path | None = None) -> Found:
    """List the cases of LiTS below `source`: lits_000, ... and lits_test_000, ...; labels liver 1, tumour 2."""
    found = Found("LiTS", ("CT",), {"background": 0, "liver": 1, "tumour": 2})
    found.about = {
        "reference": "Bilic et al., The Liver Tumor Segmentation Benchmark (LiTS), Medical Image Analysis 84, 2023",
        "licence": "CC BY-NC-ND 4.0, as the challenge's page states it",
    }
    kinds: dict[str, dict[int, Path]] = {"volume": {}, "segmentation": {}, "test-volume": {}}
    for path in files_below(source):
        match = _NAME.fullmatch(split_name(path)[0])
        if match is None:
            found.remarks.append(f"{path}: not named as a file of LiTS; left out")
            continue
        kind, number = match[1].lower(), int(match[2])
        twin = kinds[kind].setdefault(number, path)
        if twin is not path:
            case = _case(kind, number)
            found.problems.append(
                error(case, path, f"{kind} {number} exists twice, also as {twin}", "remove one of the two")
            )
    volumes, maps = kinds["volume"], kinds["segmentation"]
    if not volumes:
        raise InputError(f"{source}: no files volume-N.nii or volume-N.nii.gz in it or its folders; is this LiTS?")
    for number, path in sorted(volumes.items()):
        case = _case("volume", number)
        if number in maps:
            found.train.append(Source(case, (path,), maps[number]))
        else:
            found.problems.append(
                error(case, path, f"has no segmentation-{number}.nii", "add it (all batches belong together)")
            )
    for number, path in sorted(maps.items()):
        if number not in volumes:
            found.problems.append(
                error(_case("volume", number), path, f"has no volume-{number}.nii", "add it, or remove this file")
            )
    found.test = [
        Source(_case("test-volume", number), (path,)) for number, path in sorted(kinds["test-volume"].items())
    ]
    return found


def _case(kind: str, number: int) -> str:
    return f"lits_test_{number:03d}" if kind == "test-volume" else f"lits_{number:03d}"
