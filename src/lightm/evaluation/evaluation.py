"""The result of an evaluation: rows per case and class, their summary with intervals, JSON, CSV and table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from lightm.config_io import load_json
from lightm.evaluation.lesions import LesionSummary
from lightm.evaluation.metrics import STATUSES, ClassMetrics, Status
from lightm.files import write_text
from lightm.labels import Values

if TYPE_CHECKING:
    from rich.table import Table

METRICS = ("dsc", "iou", "hd95_mm", "nsd")
DIGITS = {"dsc": 3, "iou": 3, "hd95_mm": 2, "nsd": 3}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class CaseRow(ClassMetrics):
    """The metrics of one class in one case."""

    case: str
    class_name: str


class Statistic(_Strict):
    """Centre and spread of one metric over the `n` cases in which it is defined.

    `low` and `high` bound the 95% bootstrap interval of the mean (percentile method, cases resampled); they are `None`
    for fewer than two cases, and so is `sd` (with n - 1 in the denominator).
    """

    n: int
    mean: float | None
    median: float | None
    sd: float | None
    low: float | None
    high: float | None


class ClassSummary(_Strict):
    """All metrics of one class over all cases, and in how many cases it had which status.

    HD95 is undefined in missed and spurious cases, and all four in absent ones: see each statistic's `n`.
    """

    class_name: str
    counts: dict[Status, int]
    dsc: Statistic
    iou: Statistic
    hd95_mm: Statistic
    nsd: Statistic


class Overall(_Strict):
    """The mean over classes of the class means (for IoU: mIoU); `n` counts the classes that have one."""

    dsc: Statistic
    iou: Statistic
    hd95_mm: Statistic
    nsd: Statistic


class Evaluation(_Strict):
    """Every number of one evaluation; written as `metrics.json` and `metrics.csv`.

    labels: name to label value, or to the values of a region.
    """

    schema_version: Literal[1] = 1
    spatial_dims: Literal[2, 3]
    distance_unit: Literal["mm", "px"] = "mm"
    labels: dict[str, int | list[int]]
    nsd_tolerance_mm: dict[str, float]
    bootstrap: int
    seed: int
    rows: list[CaseRow]
    classes: list[ClassSummary]
    overall: Overall
    lesions: list[LesionSummary] | None = None  # where they were asked for

    @property
    def cases(self) -> list[str]:
        """The cases in the order of the rows."""
        return list(dict.fromkeys(row.case for row in self.rows))

    def case_dsc(self) -> dict[str, float]:
        """Return each case's mean DSC over the classes defined in it; a case with none is left out."""
        values: dict[str, list[float]] = {}
        for row in self.rows:
            if row.dsc is not None:
                values.setdefault(row.case, []).append(row.dsc)
        return {case: float(np.mean(dsc)) for case, dsc in values.items()}

    def to_json(self, path: Path) -> None:
        """Write everything as JSON, atomically."""
        write_text(path, self.model_dump_json(indent=2) + "\n")

    def to_csv(self, path: Path) -> None:
        """Write one row per case and class; an undefined value is an empty cell."""
        names = ["case", "class", *ClassMetrics.model_fields]
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            values = {**row.model_dump(), "class": row.class_name}
            writer.writerow({key: "" if values[key] is None else values[key] for key in names})
        write_text(path, text.getvalue())


def load_evaluation(path: Path) -> Evaluation:
    """Read a `metrics.json`; raises `InputError` naming the file when it is missing or is something else."""
    return load_json(path, Evaluation, "a LightM evaluation", "write it again with `lightm evaluate`")


def summarize(
    rows: Sequence[CaseRow],
    labels: Mapping[str, Values],
    *,
    spatial_dims: Literal[2, 3],
    distance_unit: Literal["mm", "px"],
    nsd_tolerance_mm: dict[str, float],
    bootstrap: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Summarise rows per class and over classes; every interval comes from the same resampled cases.

    `bootstrap`: resamples; 0 leaves the intervals out. Equal seeds give equal intervals.
    """
    cases = list(dict.fromkeys(row.case for row in rows))
    weights = bootstrap_weights(len(cases), bootstrap, seed)
    at = {(row.case, row.class_name): row for row in rows}
    statistics: dict[str, list[Statistic]] = {}
    overall: dict[str, Statistic] = {}
    for metric in METRICS:
        values = [[as_number(getattr(at[case, name], metric)) for name in labels] for case in cases]
        table = np.array(values, dtype=np.float64).reshape(len(cases), len(labels))
        draws = resampled_means(table, weights)
        statistics[metric] = [statistic_of(table[:, k], draws[:, k]) for k in range(len(labels))]
        means = np.array([as_number(s.mean) for s in statistics[metric]])
        overall[metric] = statistic_of(means, row_means(draws), several=len(cases) > 1)
    classes = []
    for k, name in enumerate(labels):
        found = [row.status for row in rows if row.class_name == name]
        counts = {status: found.count(status) for status in STATUSES}
        classes.append(ClassSummary(class_name=name, counts=counts, **{m: statistics[m][k] for m in METRICS}))
    return Evaluation(
        spatial_dims=spatial_dims,
        distance_unit=distance_unit,
        labels={name: value if isinstance(value, int) else list(value) for name, value in labels.items()},
        nsd_tolerance_mm=nsd_tolerance_mm,
        bootstrap=bootstrap,
        seed=seed,
        rows=list(rows),
        classes=classes,
        overall=Overall(**overall),
    )


def format_table(evaluation: Evaluation) -> Table:
    """Return the per-class summary as a Rich table for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    unit = evaluation.distance_unit
    table = Table(
        title=f"{len(evaluation.cases)} cases: mean [95% interval] per class",
        caption="absent: neither in label nor in prediction. HD95 is taken over the present cases.",
    )
    table.add_column("class")
    for heading in ("DSC", "IoU", f"HD95 ({unit})", "NSD", *STATUSES):
        table.add_column(heading, justify="right")

    def cells(summary: ClassSummary | Overall) -> list[str]:
        return [escape(format_statistic(getattr(summary, m), DIGITS[m])) for m in METRICS]

    for summary in evaluation.classes:
        table.add_row(escape(summary.class_name), *cells(summary), *(str(summary.counts[s]) for s in STATUSES))
    if len(evaluation.classes) > 1:
        table.add_section()
        table.add_row("mean over classes", *cells(evaluation.overall), *[""] * len(STATUSES))
    return table


def format_lesions(evaluation: Evaluation) -> Table:
    """Return the lesions per class as a Rich table for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    summaries = evaluation.lesions or []
    unit = "ml" if evaluation.spatial_dims == 3 else "px"
    found = f"found: IoU of at least {summaries[0].min_iou:g} with a predicted lesion." if summaries else ""
    table = Table(title="lesions", caption=f"{found} DSC by size: of the smallest, middle and largest third ({unit}).")
    table.add_column("class")
    for heading in ("lesions", "found", "false", "sensitivity", "F1", "false per case", "DSC found", "DSC by size"):
        table.add_column(heading, justify="right")
    for one in summaries:
        values = (one.sensitivity, one.f1, one.false_per_case, one.dsc_found)
        sizes = "\n".join(f"{group.low:.3g} to {group.high:.3g}: {group.dsc:.3f}" for group in one.sizes)
        counts = [str(count) for count in (one.lesions, one.found, one.false)]
        table.add_row(escape(one.class_name), *counts, *("–" if v is None else f"{v:.3f}" for v in values), sizes)
    return table


def format_statistic(statistic: Statistic, digits: int = 3) -> str:
    """Return `mean [low, high]`, without the interval where there is none, or a dash."""
    if statistic.mean is None:
        return "–"
    known = statistic.low is not None and statistic.high is not None
    interval = f" [{statistic.low:.{digits}f}, {statistic.high:.{digits}f}]" if known else ""
    return f"{statistic.mean:.{digits}f}{interval}"


def as_number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def bootstrap_weights(cases: int, draws: int, seed: int) -> NDArray[np.float64]:
    """Return (draws, cases): how often each case occurs in each resample."""
    if not cases or not draws:
        return np.zeros((0, cases))
    picked = np.random.default_rng(seed).integers(0, cases, (draws, cases))
    weights = np.zeros((draws, cases))
    np.add.at(weights, (np.arange(draws)[:, None], picked), 1.0)
    return weights


def resampled_means(table: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (draws, columns): each column's mean over the defined values of each resample, or NaN."""
    defined = np.isfinite(table)
    total = weights @ np.where(defined, table, 0.0)
    count = weights @ defined.astype(np.float64)
    return np.where(count > 0, total / np.maximum(count, 1.0), np.nan)


def row_means(table: NDArray[np.float64]) -> NDArray[np.float64]:
    defined = np.isfinite(table)
    count = defined.sum(axis=1)
    total = np.where(defined, table, 0.0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def statistic_of(values: NDArray[np.float64], draws: NDArray[np.float64], *, several: bool | None = None) -> Statistic:
    values, draws = values[np.isfinite(values)], draws[np.isfinite(draws)]
    low = high = None
    # One case resampled is always itself: an interval of width zero would claim a certainty nobody has.
    if (values.size > 1 if several is None else several) and values.size and draws.size:
        low, high = (float(v) for v in np.percentile(draws, [2.5, 97.5]))
    return Statistic(
        n=int(values.size),
        mean=float(values.mean()) if values.size else None,
        median=float(np.median(values)) if values.size else None,
        sd=float(values.std(ddof=1)) if values.size > 1 else None,
        low=low,
        high=high,
    )
