"""Which cases are for training, validation and test; drawn once, written to disk and reused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from lightm.config_io import load_json, read_json
from lightm.errors import InputError
from lightm.files import write_text

ALL = "all"  # every case trains and validates
NNUNET = "splits_final"  # the cases that validate are those that are scored
_SHARING = (ALL, NNUNET)


class Split(BaseModel):
    """Case ids of the three parts, and how they were drawn.

    kind: "7:1:2", "5-fold" with `fold`, "all" (every case trains and validates), "splits_final" (a fold of nnU-Net's
    file, whose validation cases are the test too), or the caller's own word. A case is in one part only, but for the
    last two.

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


def make_split(
    case_ids: Sequence[str],
    *,
    seed: int = 0,
    folds: int | None = None,
    fold: int | Literal["all"] = 0,
    group_by: str | None = None,
) -> Split:
    """Draw a split of the cases: 7:1:2 (train, validation, test), fold `fold` of `folds` as the test, or all to train.

    With folds, every case is tested exactly once over all folds, and an eighth of a fold's other cases validates the
    training, so that the test cases take no part in choosing the weights. group_by: a regular expression that is found
    in every id; cases in which its first group (without one, all that it matches) is the same, such as those of one
    patient, stay together, and groups are drawn instead of cases. The draw depends on the ids, not on their order.
    Raises InputError for fewer than three cases or groups, folds that cannot be made, and an id without a group.

    >>> make_split(["p1_a", "p1_b", "p2_a", "p3_a"], group_by="p[0-9]+").test
    ['p2_a']
    """
    ids = sorted(case_ids)
    if isinstance(fold, str):
        if len(ids) < 1:
            raise InputError("no case with a label to train on")
        return Split(kind=ALL, seed=seed, train=ids, val=ids, test=[])
    groups = groups_of(ids, group_by)
    what = "cases" if group_by is None else f"groups of cases (by '{group_by}')"
    if len(groups) < 3:
        raise InputError(
            f"{len(ids)} case(s) with a label{'' if group_by is None else f' in {len(groups)} {what}'}: training, "
            "validation and test need one each, so three at least; or train on all of them (--fold all)"
        )
    order = [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    if folds is None:
        n_test, n_val = max(1, round(0.2 * len(order))), max(1, round(0.1 * len(order)))
        test, val, train = order[:n_test], order[n_test : n_test + n_val], order[n_test + n_val :]
        kind, number = "7:1:2", None
    else:
        if not 2 <= folds <= len(order):
            raise InputError(f"{folds} folds of {len(order)} {what}: at least 2 and at most one fold per case or group")
        if not 0 <= fold < folds:
            raise InputError(f"fold {fold} of {folds}: folds are numbered from 0 to {folds - 1}")
        test = order[fold::folds]
        rest = [group for i, group in enumerate(order) if i % folds != fold]
        if len(rest) < 2:
            raise InputError(f"{folds} folds of {len(order)} {what} leave {len(rest)} to train on; use fewer folds")
        n_val = max(1, len(rest) // 8)
        first = fold * n_val % len(rest)  # other cases validate in every fold
        rest = rest[first:] + rest[:first]
        val, train = rest[:n_val], rest[n_val:]
        kind, number = f"{folds}-fold", fold
    parts = {name: sorted(chain(*part)) for name, part in (("train", train), ("val", val), ("test", test))}
    return Split(kind=kind, seed=seed, fold=number, **parts)


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


def groups_of(ids: Sequence[str], group_by: str | None) -> list[list[str]]:
    """The ids by what `group_by` finds in them, sorted; each by itself without it."""
    if group_by is None:
        return [[case] for case in ids]
    try:
        pattern = re.compile(group_by)
    except re.error as error:
        raise InputError(f"group_by '{group_by}': not a regular expression ({error})") from None
    groups: dict[str, list[str]] = {}
    for case in ids:
        if (found := pattern.search(case)) is None:
            raise InputError(f"group_by '{group_by}': finds nothing in the name of case '{case}'")
        groups.setdefault(found.group(1 if pattern.groups else 0) or "", []).append(case)
    return [groups[name] for name in sorted(groups)]


def load_split(path: Path, case_ids: Sequence[str], fold: int | None = None) -> Split:
    """Read a split and check it against the data set's cases; InputError, naming the file, when they disagree.

    path: a split.json, or nnU-Net's splits_final.json, of which `fold` (0 by default) is taken.
    """
    content = None
    with suppress(InputError):  # which the next reading raises
        content = read_json(path)
    if not isinstance(content, list):
        split = load_json(path, Split, "a split", "correct it, or delete it to have one drawn")
        if fold is not None:
            raise InputError(f"{path}: holds one split, so there is no fold {fold} of it; leave out --fold")
        return check_split(split, case_ids, str(path))
    if not 0 <= (fold or 0) < len(content):
        raise InputError(f"{path}: holds {len(content)} folds, numbered from 0; there is no fold {fold or 0}")
    parts = content[fold or 0]
    if not isinstance(parts, dict) or not all(isinstance(parts.get(key), list) for key in ("train", "val")):
        raise InputError(f"{path}: fold {fold or 0} has no lists of cases 'train' and 'val', as nnU-Net's file has")
    val = sorted(map(str, parts["val"]))
    split = Split(kind=NNUNET, seed=0, fold=fold or 0, train=sorted(map(str, parts["train"])), val=val, test=val)
    return check_split(split, case_ids, str(path))


def check_split(split: Split, case_ids: Sequence[str], where: str) -> Split:
    """Return the split where it fits the data set's cases; InputError, naming `where`, else."""
    named = [*split.train, *split.val, *split.test]
    if unknown := sorted(set(named) - set(case_ids)):
        raise InputError(f"{where}: names cases that the data set has not: {', '.join(unknown[:5])}")
    apart = {ALL: [split.train], NNUNET: [split.train + split.val]}.get(split.kind, [named])
    if twice := sorted(case for part in apart for case, count in Counter(part).items() if count > 1):
        raise InputError(f"{where}: names cases more than once: {', '.join(twice[:5])}")
    if not split.train or not split.val:
        raise InputError(f"{where}: no cases to train on or none to validate on; both lists need one at least")
    return split
