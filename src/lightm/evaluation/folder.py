"""Evaluation of a folder of predictions against a folder of labels."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from lightm.datasets.description import read_description
from lightm.errors import InputError, did_you_mean
from lightm.evaluation.evaluation import CaseRow, Evaluation, summarize
from lightm.evaluation.lesions import LesionRow, case_lesions, summarize_lesions, write_lesions
from lightm.evaluation.metrics import case_metrics, resolve_tolerances
from lightm.images.io import SUFFIXES, file_suffix, read_volume
from lightm.images.pictures import FORMATS as PICTURES
from lightm.images.volume import geometry_difference
from lightm.labels import Values, each_value
from lightm.options import Names, Options, PathText
from lightm.progress import Progress

_log = logging.getLogger(__name__)
_MOST_VALUES = 256


class EvaluateOptions(Options):
    """The options of `lightm.evaluate` and of `lightm evaluate`.

    >>> lightm.EvaluateOptions(cases="case_1,case_2").cases
    ['case_1', 'case_2']
    """

    labels_map: dict[str, Any] | None = Field(
        None,
        description="Classes, {liver: 1}, or regions, {whole: [1, 2]}; default: the labels' dataset.json, else the "
        "values found.",
    )
    ignore_label: int | None = Field(None, description="Label value of voxels that do not count.")
    out: PathText | None = Field(
        None, description="Folder for metrics.json and metrics.csv.", json_schema_extra={"flags": ["-o"]}
    )
    cases: Literal["predicted"] | Names | None = Field(
        None, description="Cases to score, c1,c2, or predicted; default: every label.", union_mode="left_to_right"
    )
    nsd_tolerance_mm: float | dict[str, float] = Field(
        1.0, description="Tolerance of the surface Dice in mm.", json_schema_extra={"flags": ["--tolerance"]}
    )
    trust_image_geometry: bool = Field(False, description="Take labels to lie where the predictions do.")
    bootstrap: int = Field(1000, le=100_000, description="Resamples of the confidence intervals; 0: no intervals.")
    seed: int = Field(0, ge=0, description="Seed of the resampling.")
    lesions: bool = Field(False, description="Score every lesion by itself too: found, missed, false, DSC by size.")
    lesion_iou: float = Field(0.1, gt=0, le=1, description="IoU with a true lesion from which a predicted one is it.")
    dataset: PathText | None = Field(None, description="Where a run's data set is now, if it was moved.")


def evaluate_folder(
    predictions: Path | str,
    labels: Path | str,
    *,
    options: EvaluateOptions | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **more: Any,
) -> Evaluation:
    """Measure every class in every case of a folder of predictions, and summarise over cases.

    `labels` holds one label file per case, `predictions` one file of the same name (its suffix may differ). Options, as
    an object or their fields as `more`: `cases` names the cases to score; `None` means every label, "predicted" every
    prediction. `labels_map` gives class names and values (background, value 0, is left out), or several values of a
    region; without it they are read from the `dataset.json` in `labels` or the folder above it, which also says which
    value to ignore, and of whose regions, if it has any, each is scored; where there is none every value that a label
    map holds is a class (one more reading of all files). `out`: folder for `metrics.json`, `metrics.csv` and, with
    `lesions`, `lesions.csv`. Metrics are those of `case_metrics`, of lesions those of `case_lesions`; intervals are
    bootstraps over cases.

    Raises `InputError` naming the files for a case without prediction or label, for shapes or affines that differ, and
    for values that are no class. Holds one case in memory at a time.
    """
    chosen = EvaluateOptions.of(options, more, "evaluate")
    predictions, labels = Path(predictions), Path(labels)
    if chosen.dataset is not None:
        raise InputError("dataset: only where a run is scored, whose data set was moved; leave it out here")
    if chosen.bootstrap < 0:
        raise InputError(f"bootstrap is {chosen.bootstrap}: expected a number of resamples, or 0 for no intervals")
    pairs = _pair_files(predictions, labels, chosen.cases)
    classes, ignore = _class_values(labels, chosen.labels_map, chosen.ignore_label, pairs)
    tolerances = resolve_tolerances(chosen.nsd_tolerance_mm, classes)
    rows: list[CaseRow] = []
    lesions: list[LesionRow] | None = [] if chosen.lesions else None
    dims: dict[int, Path] = {}
    for done, (case, (pred_path, label_path)) in enumerate(pairs.items()):
        if progress is not None:
            progress("evaluating", done, len(pairs))
        pred, label = read_volume(pred_path, kind="label"), read_volume(label_path, kind="label")
        difference = geometry_difference(pred, label)
        if difference and chosen.trust_image_geometry and pred.shape == label.shape:
            label = pred.with_data(label.data)
        elif difference:
            raise InputError(
                f"case {case}: prediction {pred_path} and label {label_path} do not cover the same voxels: "
                f"{difference}; write the prediction in the label's own geometry, as `lightm predict` does"
            )
        _check_values(case, pred.data, pred_path, classes, None, "prediction")
        _check_values(case, label.data, label_path, classes, ignore, "label")
        dims.setdefault(label.data.ndim, label_path)
        metrics = case_metrics(
            pred.data, label.data, label.spacing_mm, classes, ignore_label=ignore, nsd_tolerance_mm=tolerances
        )
        rows += [CaseRow(case=case, class_name=name, **m.model_dump()) for name, m in metrics.items()]
        if lesions is not None:
            lesions += case_lesions(
                case, pred.data, label.data, label.spacing_mm, classes, ignore_label=ignore, min_iou=chosen.lesion_iou
            )
    if progress is not None:
        progress("evaluating", len(pairs), len(pairs))
    if len(dims) > 1:
        raise InputError(f"2D and 3D labels in one folder: {dims[2]} and {dims[3]}; evaluate them separately")
    pictures = 2 in dims and all(label.suffix.lower() in PICTURES for _, label in pairs.values())
    evaluation = summarize(
        rows,
        classes,
        spatial_dims=2 if 2 in dims else 3,
        distance_unit="px" if pictures else "mm",
        nsd_tolerance_mm=tolerances,
        bootstrap=chosen.bootstrap,
        seed=chosen.seed,
    )
    if lesions is not None:
        found = summarize_lesions(lesions, list(classes), len(pairs), chosen.lesion_iou)
        evaluation = evaluation.model_copy(update={"lesions": found})
    if chosen.out is not None:
        evaluation.to_csv(Path(chosen.out) / "metrics.csv")
        evaluation.to_json(Path(chosen.out) / "metrics.json")
        if lesions is not None:
            write_lesions(lesions, Path(chosen.out) / "lesions.csv")
    return evaluation


def case_files(folder: Path) -> dict[str, Path]:
    """Return the image files of a folder by case name (the file's name without suffix), sorted."""
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        suffix = file_suffix(path)
        if suffix is None or path.name.startswith(".") or not path.is_file():
            continue
        case = path.name[: -len(suffix)]
        if case in found:
            raise InputError(f"case {case} twice: {found[case]} and {path}; keep one of them")
        found[case] = path
    return found


def _pair_files(
    predictions: Path, labels: Path, cases: Iterable[str] | Literal["predicted"] | None
) -> dict[str, tuple[Path, Path]]:
    predicted, labelled = case_files(predictions), case_files(labels)
    if not labelled:
        inner = next((n for n in ("labelsTr", "labelsTs", "labels") if (labels / n).is_dir()), None)
        hint = f"; did you mean {labels / inner}?" if inner else f"; expected files ending in {SUFFIXES}"
        raise InputError(f"{labels}: holds no label file{hint}")
    if not predicted:
        raise InputError(f"{predictions}: holds no prediction; write some with `lightm predict`")
    every = {*labelled, *predicted} if cases is None else predicted if cases == "predicted" else cases
    wanted = sorted(set(every))
    if not wanted:
        raise InputError("no case to score: the list of cases is empty (--cases)")
    if missing := [case for case in wanted if case not in predicted]:
        subset = "; to score the predicted ones only, use --cases predicted" if cases is None else ""
        near = did_you_mean(missing[0], predicted) if cases is not None else ""
        raise InputError(f"{predictions}: no prediction for {_list(missing)}{near}{subset}")
    if missing := [case for case in wanted if case not in labelled]:
        near = f"{did_you_mean(missing[0], labelled)} (predicted: {predicted[missing[0]]})"
        raise InputError(f"{labels}: no label for {_list(missing)}{near}; add it, or name the cases to score (--cases)")
    return {case: (predicted[case], labelled[case]) for case in wanted}


def _class_values(
    labels: Path,
    labels_map: Mapping[str, Any] | None,
    ignore_label: int | None,
    pairs: Mapping[str, tuple[Path, Path]],
) -> tuple[dict[str, Values], int | None]:
    """Return foreground classes sorted by value, or regions, and the value to ignore."""
    given: Mapping[str, Any] | None = labels_map
    if given is None:
        path = next((p for p in (labels / "dataset.json", labels.parent / "dataset.json") if p.is_file()), None)
        if path is None:
            return _found_values(labels, ignore_label, pairs), ignore_label
        description = read_description(path)
        given = description.targets
        if ignore_label is None:
            ignore_label = description.ignore_label
    classes: dict[str, Values] = {}
    for name, value in given.items():
        if isinstance(value, (list, tuple)) and value and all(type(one) is int for one in value):
            classes[name] = tuple(value)
            continue
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise InputError(f"--labels-map: label '{name}' is {value!r}, expected a whole number")
        if name == "ignore" and ignore_label is None:
            ignore_label = int(value)
        elif int(value) != 0 and int(value) != ignore_label:
            classes[name] = int(value)
    if not classes:
        raise InputError("--labels-map: names no class besides background")
    if len({frozenset(each_value(value)) for value in classes.values()}) < len(classes):
        raise InputError(f"--labels-map: two classes have the same value: {classes}")
    if any(0 in each_value(value) or ignore_label in each_value(value) for value in classes.values()):
        raise InputError(f"--labels-map: a region holds the background or the ignore label: {classes}")
    if any(not isinstance(value, int) for value in classes.values()):
        return classes, ignore_label
    return dict(sorted(classes.items(), key=lambda item: each_value(item[1]))), ignore_label


def _found_values(labels: Path, ignore_label: int | None, pairs: Mapping[str, tuple[Path, Path]]) -> dict[str, Values]:
    """Every value of the label maps as a class of that name."""
    found: set[int] = set()
    for path in (path for pair in pairs.values() for path in pair):
        found.update(int(value) for value in np.unique(read_volume(path, kind="label").data))
        if len(found) > _MOST_VALUES:
            raise InputError(f"{path}: holds more than {_MOST_VALUES} values, with those before it; is it a label map?")
    classes = sorted(found - {0, ignore_label})
    if not classes:
        raise InputError(f"{labels}: no label map and no prediction holds anything but background; nothing to score")
    _log.info("%s: no dataset.json names the classes; every value is one: %s", labels, _list(list(map(str, classes))))
    return {str(value): value for value in classes}


def _check_values(
    case: str, data: np.ndarray[Any, Any], path: Path, classes: Mapping[str, Values], ignore: int | None, what: str
) -> None:
    known = {0, *(one for value in classes.values() for one in each_value(value))} | (
        {ignore} if ignore is not None else set()
    )
    if unknown := [int(v) for v in np.unique(data) if int(v) not in known]:
        named = ", ".join(f"{name}={value}" for name, value in classes.items())
        raise InputError(
            f"case {case}: {what} {path} holds {_list([str(v) for v in unknown])}, which is no class "
            f"(background=0, {named}); correct the file, or name the value (--labels-map)"
        )


def _list(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
