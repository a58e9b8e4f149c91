"""What a reader must know of a comparison that is incomplete or uneven, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightm.lab.compare.results import Comparison
from lightm.lab.compare.significance import FEWEST_PAIRS


def notes_on(comparison: Comparison, missing: Sequence[str], scored: Mapping[str, Sequence[str]]) -> list[str]:
    """Sentences about missing and failed trainings, seeds, test cases and what makes times incomparable.

    `missing`: ids of cells that have not run; `scored`: the cases scored in each finished cell, by its id.
    """
    notes = []
    planned = len(comparison.experiment.cells())
    if missing:
        notes.append(f"{len(missing)} of {planned} trainings have not run: {_some(missing)}.")
    if comparison.failed:
        failed = [record.id for record in comparison.failed]
        notes.append(f"{len(failed)} of {planned} trainings failed: {_some(failed)}.")
    methods = {name: [cell.cell.seed for cell in cells] for name, cells in comparison.methods()}
    if comparison.baseline not in methods:
        notes.append(f"The baseline, {comparison.baseline}, has no finished training: nothing is tested against it.")
    if len(set(map(tuple, methods.values()))) > 1:
        counts = ", ".join(f"{name}: {len(seeds)}" for name, seeds in methods.items())
        notes.append(f"Methods have different seeds, some fewer than others ({counts}).")
    elif max(map(len, methods.values())) == 1:
        notes.append("One seed a method: how much results vary from training to training is not known.")
    tested = comparison.split.test
    short = [cell for cell, cases in scored.items() if set(cases) != set(tested)]
    if short:
        notes.append(f"Not exactly the {len(tested)} test cases of the split were scored in {_some(short)}.")
    if len(tested) < FEWEST_PAIRS:
        notes.append(f"{len(tested)} test cases: fewer than {FEWEST_PAIRS} cannot show a difference in any test.")
    records = [cell.record for cell in comparison.finished]
    threads = sorted({record.threads for record in records})
    if len(threads) > 1:
        notes.append(f"Trainings ran on {' and '.join(map(str, threads))} threads: their times cannot be compared.")
    if len({record.data_hash for record in records}) > 1:
        notes.append("Trainings saw different data (data_hash in cells.csv): run the older ones again.")
    differing = sorted({name for record in records for name, v in record.versions.items()
                        if any(other.versions.get(name) != v for other in records)})  # fmt: skip
    if differing:
        notes.append(f"Trainings ran with different versions of {', '.join(differing)} (cells.csv).")
    return notes


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
