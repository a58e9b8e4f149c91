"""Dice by lesion size and by vessel radius over all cases and methods: bins, means, intervals, CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
from numpy.typing import NDArray

from lightm.evaluation.evaluation import bootstrap_weights
from lightm.lab.compare.markup import as_csv

_BINS, _FEWEST = 4, 5  # bins at most, and entries a bin holds at least
DRAWS = 1000


@dataclass(frozen=True)
class BinRow:
    """One class, bin and method: mean DSC, and its mean paired difference to the baseline, with 95% intervals.

    `n` counts components (`what` "size") or cases ("radius") in the bin, `found` is the share of found components.
    Intervals are percentile bootstraps that draw cases, with all of a case's components; None where fewer than two
    cases are in the bin, or for the baseline's difference to itself.
    """

    what: str
    class_name: str
    unit: str
    low_edge: float
    high_edge: float
    method: str
    n: int
    cases: int
    dsc: float | None
    dsc_low: float | None
    dsc_high: float | None
    found: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None


@dataclass(frozen=True)
class Entry:
    """One component, or one case's voxels of one radius bin: where it belongs, and each method's score.

    Scores are means over the seeds of a method; a method without this case is not among them.
    """

    case: str
    place: float
    dsc: Mapping[str, float]
    found: Mapping[str, float]


def quantile_edges(values: NDArray[np.float64], weights: NDArray[np.float64] | None = None) -> list[float]:
    """Edges of up to four bins that hold about equally many values (or weights), five at least; [] for no value.

    Bins are low <= value < high, the last one closed. Equal values are never parted, so bins may be fewer.
    """
    if not values.size:
        return []
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    share = np.cumsum(np.ones(values.size) if weights is None else weights[order])
    bins = int(np.clip(share[-1] // _FEWEST, 1, _BINS))
    inner = [float(ranked[np.searchsorted(share, share[-1] * k / bins, side="right")]) for k in range(1, bins)]
    low, high = float(ranked[0]), float(ranked[-1])
    return [low, *sorted({edge for edge in inner if low < edge <= high}), high]


def bin_of(value: float, edges: Sequence[float]) -> int:
    """The bin of a value within the edges."""
    return int(np.clip(np.searchsorted(edges[1:-1], value, side="right"), 0, max(0, len(edges) - 2)))


def summarize_bins(
    what: str,
    class_name: str,
    unit: str,
    entries: Sequence[Entry],
    edges: Sequence[float],
    methods: Sequence[str],
    baseline: str | None,
) -> list[BinRow]:
    """Mean and paired difference of every bin and method; methods share the bins and the resampled cases."""
    rows = []
    for k in range(len(edges) - 1):
        here = [entry for entry in entries if bin_of(entry.place, edges) == k]
        cases = list(dict.fromkeys(entry.case for entry in here))
        of = np.array([cases.index(entry.case) for entry in here], dtype=np.int64)
        weights = bootstrap_weights(len(cases), DRAWS, 0)
        base = np.array([entry.dsc.get(baseline, np.nan) if baseline else np.nan for entry in here])
        for method in methods:
            dsc = np.array([entry.dsc.get(method, np.nan) for entry in here])
            known = [entry.found[method] for entry in here if method in entry.found]
            mean, low, high = _mean(dsc, of, weights)
            difference = _mean(dsc - base, of, weights) if method != baseline else (None, None, None)
            rows.append(
                BinRow(
                    what,
                    class_name,
                    unit,
                    edges[k],
                    edges[k + 1],
                    method,
                    int(np.isfinite(dsc).sum()),
                    len(set(of[np.isfinite(dsc)].tolist())),
                    mean,
                    low,
                    high,
                    float(np.mean(known)) if known else None,
                    *difference,
                )
            )
    return rows


def bins_csv(rows: Sequence[BinRow]) -> str:
    """One line a row; an undefined value is an empty cell."""
    return as_csv([field.name for field in fields(BinRow)], [astuple(row) for row in rows])


def _mean(
    values: NDArray[np.float64], of: NDArray[np.int64], weights: NDArray[np.float64]
) -> tuple[float | None, float | None, float | None]:
    known = np.isfinite(values)
    if not known.any():
        return None, None, None
    total = np.bincount(of[known], values[known], minlength=weights.shape[1])
    count = np.bincount(of[known], minlength=weights.shape[1])
    mean = float(values[known].mean())
    if (count > 0).sum() < 2:
        return mean, None, None
    drawn = weights @ count
    draws = (weights @ total)[drawn > 0] / drawn[drawn > 0]
    low, high = np.percentile(draws, [2.5, 97.5])
    return mean, float(low), float(high)
