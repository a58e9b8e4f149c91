"""Prediction of many cases: a model folder and images in, label maps and a record of the run out."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightm import __version__
from lightm.data.cases import Case
from lightm.data.io import file_suffix, read_volume, write_volume
from lightm.data.volume import Volume
from lightm.errors import InputError, LightMError
from lightm.files import write_text
from lightm.infer.inputs import find_cases
from lightm.infer.predictor import Predictor

RECORD = "prediction.json"

Progress = Callable[[str, int, int], None]

# Asked before a case is predicted whether it can be served, then given its label map and the file that holds it.
CaseWriter = Callable[[Case], Callable[[Volume, Path], Path]]


def predict_folder(
    model_dir: Path | str,
    inputs: Path | str,
    out: Path | str,
    *,
    overlap: float = 0.5,
    tta: bool = False,
    cases: Iterable[str] | None = None,
    progress: Progress | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    also: CaseWriter | None = None,
) -> list[Path]:
    """Segment every case in `inputs` and return the label maps written to `out`, sorted by case.

    model_dir: a model folder (`model.safetensors`, `model.json`). inputs: an image file; a folder of CASE_0000.EXT,
    CASE_0001.EXT, ... (CASE.EXT with one channel); a dataset, whose imagesTs is taken; with `cases`, only these
    ids, from imagesTr too; DICOM series, as `find_cases` says, which give CASE.nii.gz.
    overlap, tta, device: as in `Predictor`. progress("predict", done, total) counts cases.
    also(case) may refuse a case, and returns what writes a second file of its label map, such as
    `lightm.export.dicom_seg.seg_writer` does.

    Each CASE + its own file ending appears complete or not at all, in the geometry of its image, and at the end
    prediction.json (model, options, seconds per case, faults, versions). A case that cannot be predicted is left
    out; the others go on, and the call ends with one InputError that lists every fault.

    Raises InputError before anything is written for a wrong model, input, case or option, and where `out` holds
    files and not `overwrite`. With `overwrite` the label maps that prediction.json there lists are removed first.
    Memory: as `Predictor.predict_volumes`, one case at a time.
    """
    model_dir, inputs, out = Path(model_dir), Path(inputs), Path(out)
    _check_out(out, overwrite)
    predictor = Predictor.from_folder(model_dir, device, overlap=overlap, tta=tta)
    found = find_cases(inputs, predictor.plan.channels, cases=cases)
    targets = [out / (case.id + (file_suffix(case.images[0]) or ".nii.gz")) for case in found]
    sources = {image.resolve(): image for case in found for image in case.images}
    for target in targets:
        if target.resolve() in sources:
            raise InputError(f"{target}: the prediction would replace its own image; give another output folder")
    if overwrite:
        _remove_older(out)

    written, done, failed = [], [], []
    for index, (case, target) in enumerate(zip(found, targets, strict=True)):
        if progress is not None:
            progress("predict", index, len(found))
        try:
            done.append(_predict_case(predictor, case, target, also))
        except InputError as error:
            message = str(error) if str(case.images[0].parent) in str(error) else f"{case.images[0]}: {error}"
            failed.append({"case": case.id, "error": message})
        except LightMError as error:
            raise LightMError(f"case '{case.id}': {error}") from error
        else:
            written.append(target)
    if progress is not None:
        progress("predict", len(found), len(found))
    if written:
        _write_record(out, predictor, model_dir, inputs, done, failed)
    if failed:
        lines = "\n".join(f"  case '{fault['case']}': {fault['error']}" for fault in failed)
        if len(found) == 1:
            raise InputError(failed[0]["error"])
        raise InputError(f"{len(failed)} of {len(found)} cases could not be predicted:\n{lines}")
    return written


def _predict_case(predictor: Predictor, case: Case, target: Path, also: CaseWriter | None) -> dict[str, Any]:
    started = time.perf_counter()
    second = None if also is None else also(case)
    images = [read_volume(path) for path in case.images]
    labels = predictor.predict_volumes(images)
    more = [] if second is None else [second(labels, target).name]
    write_volume(target, labels, kind="label")
    return {
        "case": case.id,
        "file": target.name,
        **({"more": more} if more else {}),
        "images": [path.name for path in case.images],
        "shape": list(images[0].shape),
        "spacing_mm": list(images[0].spacing_mm),
        "seconds": round(time.perf_counter() - started, 3),
    }


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: a file; give a folder for the predictions")
    if out.is_dir() and not overwrite and any(not path.name.startswith(".") for path in out.iterdir()):
        raise InputError(f"{out}: the folder already holds files; give another one, or allow overwriting")


def _remove_older(out: Path) -> None:
    """Remove what an earlier run says it wrote here, so that its cases are not taken for those of this run."""
    record = out / RECORD
    if not record.is_file():
        return
    try:
        entries = json.loads(record.read_text(encoding="utf-8"))["cases"]
        names = [str(name) for entry in entries for name in (entry["file"], *entry.get("more", []))]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{record}: not a record of predictions ({error}); empty the folder by hand") from error
    try:
        for name in names:
            if Path(name).name == name:  # a record never reaches outside its folder
                (out / name).unlink(missing_ok=True)
        record.unlink()
    except OSError as error:
        raise LightMError(
            f"{error.filename}: cannot be removed ({error.strerror}); check the folder's rights"
        ) from None


def _write_record(
    out: Path,
    predictor: Predictor,
    model_dir: Path,
    inputs: Path,
    done: list[dict[str, Any]],
    failed: list[dict[str, str]],
) -> None:
    record = {
        "schema_version": 1,
        "model": str(model_dir),
        "inputs": str(inputs),
        "overlap": predictor.overlap,
        "tta": predictor.tta,
        "device": str(predictor.device),
        "cases": done,
        "failed": failed,
        "versions": {
            "lightm": __version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }
    write_text(out / RECORD, json.dumps(record, indent=1) + "\n")
