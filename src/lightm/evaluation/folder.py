"""Evaluation of a folder of predictions against a folder of labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from lightm.datasets.description import read_description
from lightm.errors import InputError, did_you_mean
from lightm.evaluation.evaluation import CaseRow, Evaluation, summarize
from lightm.evaluation.metrics import case_metrics, resolve_tolerances
from lightm.images.io import SUFFIXES, file_suffix, read_volume
from lightm.images.pictures import FORMATS as PICTURES
from lightm.images.volume import geometry_difference
from lightm.options import Names, Options, PathText
from lightm.progress import Progress


class EvaluateOptions(Options):
    """The options of `lightm.evaluate` and of `lightm evaluate`.

    >>> lightm.EvaluateOptions(cases="case_1,case_2").cases
    ['case_1', 'case_2']
    """

    labels_map: dict[str, Any] | None = Field(
        None, description="Classes, {liver: 1}; default: those of the labels' dataset.json."
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
    prediction. `labels_map` gives class names and values (background, value 0, is left out); without it they are read
    from the `dataset.json` in `labels` or the folder above it, which also says which value to ignore. `out`: folder for
    `metrics.json` and `metrics.csv`. Metrics are those of `case_metrics`; intervals are bootstraps over cases.

    Raises `InputError` naming the files for a case without prediction or label, for shapes or affines that differ, and
    for values that are no class. Holds one case in memory at a time.
    """
    chosen = EvaluateOptions.of(options, more, "evaluate")
    predictions, labels = Path(predictions), Path(labels)
    classes, ignore = _class_values(labels, chosen.labels_map, chosen.ignore_label)
    tolerances = resolve_tolerances(chosen.nsd_tolerance_mm, classes)
    if chosen.bootstrap < 0:
        raise InputError(f"bootstrap is {chosen.bootstrap}: expected a number of resamples, or 0 for no intervals")
    pairs = _pair_files(predictions, labels, chosen.cases)
    rows: list[CaseRow] = []
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
    if chosen.out is not None:
        evaluation.to_csv(Path(chosen.out) / "metrics.csv")
        evaluation.to_json(Path(chosen.out) / "metrics.json")
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
        raise InputError("no case to evaluate: the list of cases is empty")
    if missing := [case for case in wanted if case not in predicted]:
        subset = '; to score the predicted ones only, pass cases="predicted"' if cases is None else ""
        near = did_you_mean(missing[0], predicted) if cases is not None else ""
        raise InputError(f"{predictions}: no prediction for {_list(missing)}{near}{subset}")
    if missing := [case for case in wanted if case not in labelled]:
        near = f"{did_you_mean(missing[0], labelled)} (predicted: {predicted[missing[0]]})"
        raise InputError(f"{labels}: no label for {_list(missing)}{near}; add it, or name the cases to evaluate")
    return {case: (predicted[case], labelled[case]) for case in wanted}


def _class_values(
    labels: Path, labels_map: Mapping[str, int] | None, ignore_label: int | None
) -> tuple[dict[str, int], int | None]:
    """Return foreground classes sorted by value and the value to ignore."""
    given: Mapping[str, Any] | None = labels_map
    if given is None:
        path = next((p for p in (labels / "dataset.json", labels.parent / "dataset.json") if p.is_file()), None)
        if path is None:
            remedy = "give labels_map, for example {'liver': 1}"
            raise InputError(f"{labels}: no dataset.json in it or in the folder above to name the classes; {remedy}")
        description = read_description(path)
        given = description.labels
        if ignore_label is None:
            ignore_label = description.ignore_label
    classes: dict[str, int] = {}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise InputError(f"labels_map: label '{name}' is {value!r}, expected a whole number")
        if name == "ignore" and ignore_label is None:
            ignore_label = int(value)
        elif int(value) != 0 and int(value) != ignore_label:
            classes[name] = int(value)
    if not classes:
        raise InputError("labels_map: names no class besides background")
    if len(set(classes.values())) < len(classes):
        raise InputError(f"labels_map: two classes have the same value: {classes}")
    return dict(sorted(classes.items(), key=lambda item: item[1])), ignore_label


def _check_values(
    case: str, data: np.ndarray[Any, Any], path: Path, classes: dict[str, int], ignore: int | None, what: str
) -> None:
    known = {0, *classes.values()} | ({ignore} if ignore is not None else set())
    if unknown := [int(v) for v in np.unique(data) if int(v) not in known]:
        named = ", ".join(f"{name}={value}" for name, value in classes.items())
        raise InputError(
            f"case {case}: {what} {path} holds {_list([str(v) for v in unknown])}, which is no class "
            f"(background=0, {named}); correct the file, or add the value to the classes"
        )


def _list(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
