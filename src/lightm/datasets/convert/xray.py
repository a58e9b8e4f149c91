"""The chest X-rays of Montgomery County and Shenzhen: CXR_png with masks of the lungs.

Montgomery has ManualMask/leftMask and rightMask, files of the picture's name. Shenzhen's masks came later, from
others: mask/NAME_mask.png, for 566 of its 662 pictures. Some copies hold both sets in one CXR_png with one folder of
masks; pictures and masks are paired by name, whatever set they belong to.
"""

from __future__ import annotations

from pathlib import Path

from lightm.datasets.cases import Problem, error, split_name
from lightm.datasets.convert.sources import Found, Source, files_below
from lightm.errors import InputError


def find_montgomery_shenzhen(source: Path, labels: Path | None = None) -> Found:
    """List the pictures in folders CXR_png at or below `source` with their masks; one label, lung 1."""
    found = Found("MontgomeryShenzhen", ("X-ray",), {"background": 0, "lung": 1})
    found.about = {
        "reference": "Jaeger et al., Two public chest X-ray datasets for computer-aided screening of pulmonary "
        "diseases, Quantitative Imaging in Medicine and Surgery 4(6), 2014; Shenzhen masks: Stirenko et al., 2018",
        "licence": "as the distributors state it: the U.S. National Library of Medicine asks for citation",
    }
    pictures: dict[str, Path] = {}
    masks: dict[str, dict[str, Path]] = {"left": {}, "right": {}, "whole": {}}
    for path in files_below(source):
        folder = path.parent.name.lower()
        if folder == "cxr_png":
            twin = pictures.setdefault(split_name(path)[0], path)
            if twin is not path:
                found.problems.append(
                    error(split_name(path)[0], path, f"exists twice, also as {twin}", "remove one of them")
                )
        elif folder in ("leftmask", "rightmask"):
            masks[folder.removesuffix("mask")][split_name(path)[0]] = path
        elif folder in ("mask", "masks"):
            masks["whole"][split_name(path)[0].removesuffix("_mask")] = path
    if not pictures:
        raise InputError(f"{source}: no folder CXR_png with pictures (.png) in it; is this Montgomery or Shenzhen?")
    if not any(masks.values()):
        raise InputError(
            f"{source}: no masks; expected ManualMask/leftMask and ManualMask/rightMask (Montgomery), or "
            "mask/NAME_mask.png (Shenzhen)"
        )
    without = []
    for stem, picture in sorted(pictures.items()):
        sides = [masks[side].get(stem) for side in ("left", "right")]
        given = [path for path in sides if path is not None]
        if len(given) == 1:
            there, gone = ("right", "left") if sides[0] is None else ("left", "right")
            absent = given[0].parent.parent / f"{gone}Mask" / given[0].name
            message = f"has a mask of the {there} lung but none of the {gone}"
            found.problems.append(error(stem, picture, message, f"add {absent}"))
        elif given:
            found.train.append(Source(stem, (picture,), masks=tuple(given)))
        elif stem in masks["whole"]:
            found.train.append(Source(stem, (picture,), masks=(masks["whole"][stem],)))
        else:
            without.append(picture)
    found.remarks += [f"{picture}: has no mask; left out" for picture in without]
    for files in masks.values():
        found.problems += [
            Problem("warning", stem, path, "a mask without a picture in CXR_png", "add the picture, or ignore this")
            for stem, path in sorted(files.items())
            if stem not in pictures
        ]
    return found
