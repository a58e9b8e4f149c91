"""Splits: exact parts, no overlap, the same every time, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightm.datasets.split import Split, keep_in_training, load_split, make_split
from lightm.errors import InputError

IDS = [f"case_{i:02d}" for i in range(20)]


def test_seven_one_two_has_every_case_once_and_ignores_the_order() -> None:
    split = make_split(IDS, seed=3)
    assert (len(split.train), len(split.val), len(split.test)) == (14, 2, 4)
    assert sorted([*split.train, *split.val, *split.test]) == IDS
    assert make_split(IDS[::-1], seed=3) == split
    assert make_split(IDS, seed=4) != split


def test_three_cases_are_the_least() -> None:
    split = make_split(["a", "b", "c"])
    assert [len(split.train), len(split.val), len(split.test)] == [1, 1, 1]
    with pytest.raises(InputError, match=r"2 case\(s\)"):
        make_split(["a", "b"])


def test_folds_test_every_case_once_and_never_watch_or_train_on_it() -> None:
    tested: list[str] = []
    for fold in range(5):
        split = make_split(IDS, folds=5, fold=fold)
        assert not set(split.test) & {*split.train, *split.val}
        assert sorted([*split.train, *split.val, *split.test]) == IDS
        tested += split.test
    assert sorted(tested) == IDS


@pytest.mark.parametrize(
    ("folds", "fold", "message"), [(1, 0, "at least 2"), (21, 0, "at most one fold"), (5, 5, "numbered from 0 to 4")]
)
def test_impossible_folds_are_refused(folds: int, fold: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_split(IDS, folds=folds, fold=fold)


def test_a_written_split_is_read_back_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    split = make_split(IDS)
    split.save(path)
    assert load_split(path, IDS) == split
    with pytest.raises(InputError, match="has not"):
        load_split(path, IDS[1:])
    path.write_text(json.dumps({**split.model_dump(), "val": split.train[:1]}), encoding="utf-8")
    with pytest.raises(InputError, match="more than once"):
        load_split(path, IDS)
    path.write_text(json.dumps({"train": []}), encoding="utf-8")
    with pytest.raises(InputError, match="not a split"):
        load_split(path, IDS)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="JSON"):
        load_split(path, IDS)
    with pytest.raises(InputError, match="cannot be read"):
        load_split(tmp_path / "none.json", IDS)


def test_folds_are_validated_by_different_cases() -> None:
    assert len({tuple(make_split(IDS, folds=5, fold=fold).val) for fold in range(5)}) == 5


def test_fold_all_trains_on_every_case(tmp_path: Path) -> None:
    split = make_split(IDS, fold="all")
    assert (split.train, split.val, split.test) == (IDS, IDS, [])
    split.save(tmp_path / "split.json")
    assert load_split(tmp_path / "split.json", IDS) == split


@pytest.mark.parametrize("folds", [None, 3])
@pytest.mark.parametrize("pattern", [r"^p\d", r"^p(\d)_"])
def test_cases_of_a_group_stay_together(folds: int | None, pattern: str) -> None:
    ids = [f"p{patient}_{scan}" for patient in range(6) for scan in "abc"[: 1 + patient % 3]]
    split = make_split(ids, folds=folds, group_by=pattern)
    parts = [{case[:2] for case in part} for part in (split.train, split.val, split.test)]
    assert sum(len(part) for part in parts) == 6
    assert set().union(*parts) == {case[:2] for case in ids}
    assert sorted([*split.train, *split.val, *split.test]) == ids


def test_groups_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(InputError, match="finds nothing in the name of case 'case_00'"):
        make_split(IDS, group_by="patient")
    with pytest.raises(InputError, match="not a regular expression"):
        make_split(IDS, group_by="(")
    with pytest.raises(InputError, match="in 1 groups"):
        make_split(IDS, group_by="case")


def test_nnunets_file_of_folds(tmp_path: Path) -> None:
    path = tmp_path / "splits_final.json"
    folds = [{"train": IDS[:15], "val": IDS[15:]}, {"train": IDS[5:], "val": IDS[:5]}]
    path.write_text(json.dumps(folds), encoding="utf-8")
    split = load_split(path, IDS, 1)
    assert (split.train, split.val, split.test, split.fold) == (IDS[5:], IDS[:5], IDS[:5], 1)
    assert load_split(path, IDS).fold == 0
    split.save(tmp_path / "split.json")
    assert load_split(tmp_path / "split.json", IDS) == split
    with pytest.raises(InputError, match=r"splits_final\.json: holds 2 folds"):
        load_split(path, IDS, 2)
    with pytest.raises(InputError, match="no fold 1 of it"):
        load_split(tmp_path / "split.json", IDS, 1)
    for faulty, words in (
        ([{"train": IDS}], "'train' and 'val'"),
        ([{"train": IDS, "val": IDS[:1]}], "more than once"),
    ):
        path.write_text(json.dumps(faulty), encoding="utf-8")
        with pytest.raises(InputError, match=words):
            load_split(path, IDS)


def test_a_case_that_training_needs_moves_there() -> None:
    split = Split(kind="7:1:2", seed=0, train=["a", "b", "c"], val=["d", "e"], test=["f"])
    assert keep_in_training(split, lambda case: case in "bf") is split
    assert keep_in_training(split, lambda case: case == "x") is split
    moved = keep_in_training(split, lambda case: case == "e")
    assert (moved.train, moved.val, moved.test) == (["a", "b", "c", "e"], ["d"], ["f"])


def test_a_part_that_would_be_empty_gets_a_case_that_training_can_miss() -> None:
    split = Split(kind="7:1:2", seed=0, train=["a", "b", "c"], val=["d", "e"], test=["f"])
    moved = keep_in_training(split, lambda case: case == "f", [lambda case: case == "a"])
    assert (moved.train, moved.val, moved.test) == (["a", "c", "f"], ["d", "e"], ["b"])
    stuck = Split(kind="7:1:2", seed=0, train=["a"], val=["d"], test=["f"])
    assert keep_in_training(stuck, lambda case: case == "d", [lambda case: case == "a"]) is stuck


def test_groups_move_as_a_whole() -> None:
    split = Split(kind="7:1:2", seed=0, train=["p1a", "p1b", "p2a"], val=["p3a", "p3b"], test=["p4a"])
    groups = [["p1a", "p1b"], ["p2a"], ["p3a", "p3b"], ["p4a"]]
    moved = keep_in_training(split, lambda case: case == "p3b", groups=groups)
    assert (moved.train, moved.val) == (["p2a", "p3a", "p3b"], ["p1a", "p1b"])
