"""Which cases are for training, validation and test; drawn once, written to disk and reused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from lightm.config_io import load_json
from lightm.errors import InputError
from lightm.files import write_text


class Split(BaseModel):
    """Case ids of the three parts, and how they were drawn: `kind` is "7:1:2" or "k-fold", `fold` its part.

    >>> split = lightm.Split(kind="by hand", seed=0, train=["a", "b"], val=["c"], test=["d"])
    >>> split.save(folder / "split.json")
    """

    model_config = ConfigDict(extra="forbid")

    kind: str
    seed: int
    fold: int | None = None
    train: list[str]
    val: list[str]
    test: list[str]

    def save(self, path: Path) -> None:
        """Write the split as JSON."""
        write_text(path, self.model_dump_json(indent=1) + "\n")


def make_split(case_ids: Sequence[str], *, seed: int = 0, folds: int | None = None, fold: int = 0) -> Split:
    """Draw a split of the cases: 7:1:2 (train, validation, test), or fold `fold` of `folds` as the test.

    With folds, every case is tested exactly once over all folds, and an eighth of a fold's other cases validates the
    training, so that the test cases take no part in choosing the weights. The draw depends on the ids, not on their
    order. Raises InputError for fewer than three cases or folds that cannot be made.
    """
    ids = sorted(case_ids)
    if len(ids) < 3:
        raise InputError(
            f"{len(ids)} case(s) with a label: training, validation and test need one each, so three at least"
        )
    order = [ids[i] for i in np.random.default_rng(seed).permutation(len(ids))]
    if folds is None:
        n_test, n_val = max(1, round(0.2 * len(ids))), max(1, round(0.1 * len(ids)))
        test, val, train = order[:n_test], order[n_test : n_test + n_val], order[n_test + n_val :]
        kind = "7:1:2"
    else:
        if not 2 <= folds <= len(ids):
            raise InputError(f"{folds} folds of {len(ids)} cases: at least 2 and at most one fold per case")
        if not 0 <= fold < folds:
            raise InputError(f"fold {fold} of {folds}: folds are numbered from 0 to {folds - 1}")
        test = order[fold::folds]
        rest = [case for i, case in enumerate(order) if i % folds != fold]
        if len(rest) < 2:
            raise InputError(f"{folds} folds of {len(ids)} cases leave {len(rest)} to train on; use fewer folds")
        n_val = max(1, len(rest) // 8)
        val, train = rest[:n_val], rest[n_val:]
        kind = f"{folds}-fold"
    number = None if folds is None else fold
    return Split(kind=kind, seed=seed, fold=number, train=sorted(train), val=sorted(val), test=sorted(test))


def keep_in_training(
    split: Split,
    holds: Callable[[str], bool],
    needed: Sequence[Callable[[str], bool]] = (),
    *,
    groups: Sequence[Sequence[str]] = (),
) -> Split:
    """Return a split in which a training case holds what `holds` asks for, where any case does.

    The first such case of validation, else of the test, moves to training; where it is the only one of its part, the
    first training case that can go takes its place: one without which `needed` are still held in training.
    groups: cases that stay together (each by itself where it is in none). Returns `split` itself where nothing moves.

    >>> split = Split(kind="7:1:2", seed=0, train=["a", "b"], val=["c"], test=["d", "e"])
    >>> keep_in_training(split, lambda case: case == "c").train
    ['b', 'c']
    """
    if any(map(holds, split.train)):
        return split
    together = {case: list(group) for group in groups for case in group}
    for part in ("val", "test"):
        here = getattr(split, part)
        if (found := next(filter(holds, here), None)) is None:
            continue
        moved = together.get(found, [found])
        left, train = ([case for case in cases if case not in moved] for cases in (here, split.train))
        for case in [] if left else train:
            gone = together.get(case, [case])
            kept = [*(other for other in train if other not in gone), *moved]
            if all(any(map(need, kept)) for need in needed):
                left, train = gone, [other for other in train if other not in gone]
                break
        if left:
            return split.model_copy(update={part: sorted(left), "train": sorted([*train, *moved])})
    return split


def load_split(path: Path, case_ids: Sequence[str]) -> Split:
    """Read a split and check it against the data set's cases; InputError, naming the file, when they disagree."""
    split = load_json(path, Split, "a split", "correct it, or delete it to have one drawn")
    return check_split(split, case_ids, str(path))


def check_split(split: Split, case_ids: Sequence[str], where: str) -> Split:
    """Return the split where it fits the data set's cases; InputError, naming `where`, else."""
    named = [*split.train, *split.val, *split.test]
    if unknown := sorted(set(named) - set(case_ids)):
        raise InputError(f"{where}: names cases that the data set has not: {', '.join(unknown[:5])}")
    if twice := sorted(case for case, count in Counter(named).items() if count > 1):
        raise InputError(f"{where}: names cases more than once: {', '.join(twice[:5])}")
    if not split.train or not split.val:
        raise InputError(f"{where}: no cases to train on or none to validate on; both lists need one at least")
    return split
