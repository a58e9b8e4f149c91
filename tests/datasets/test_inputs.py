"""Which cases are taken from files, folders and datasets to predict, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightm.datasets.inputs import find_cases
from lightm.errors import InputError


def add(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def ids(folder: Path, *, channels: int = 1, cases: list[str] | None = None) -> list[str]:
    return [case.id for case in find_cases(folder, [f"c{i}" for i in range(channels)], cases=cases)]


def test_which_cases_are_taken(tmp_path: Path) -> None:
    for name in ("imagesTr/t1_0000", "imagesTr/t2_0000", "imagesTs/s1_0000", "labelsTr/t1"):
        add(tmp_path / "raw" / f"{name}.nii.gz")
    assert ids(tmp_path / "raw") == ["s1"]
    assert ids(tmp_path / "raw", cases=["t2", "s1"]) == ["s1", "t2"]
    assert ids(tmp_path / "raw" / "imagesTr") == ["t1", "t2"]
    # Names as the Medical Segmentation Decathlon has them; a number at the end is part of the name.
    for name in ("liver_0001", "liver_0002", ".hidden_0000"):
        add(tmp_path / "msd" / f"{name}.nii")
    assert ids(tmp_path / "msd") == ["liver_0001", "liver_0002"]
    for channel in range(2):
        add(tmp_path / "two" / f"p_{channel:04d}.nii")
    assert ids(tmp_path / "two", channels=2) == ["p"]
    assert [path.name for path in find_cases(tmp_path / "two" / "p_0001.nii", ["a", "b"])[0].images] == [
        "p_0000.nii",
        "p_0001.nii",
    ]


@pytest.mark.parametrize(
    ("names", "channels", "cases", "message"),
    [
        ([], 1, None, "no image"),
        (["a_0000", "b_0001"], 2, None, r"a_0001\.nii: channel 1 \('c1'\) of case 'a' is missing"),
        (["a_0000", "a_0001", "a_0002"], 2, None, r"a_0002\.nii: channel 2 of case 'a', but the model names 2"),
        (["a_0000", "a_0001"], 1, None, r"a_0001\.nii: channel 1 of case 'a', but the model names 1"),
        (["plain"], 2, None, r"plain\.nii: the name has no channel number"),
        (["a_0000", "a"], 1, None, "case 'a' is there twice"),
        (["liver_0000"], 1, ["livre"], "no case 'livre' among 1 cases; did you mean 'liver'"),
    ],
)
def test_faulty_inputs(names: list[str], channels: int, cases: list[str] | None, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in names:
        (folder / f"{name}.nii").touch()
    with pytest.raises(InputError, match=message):
        ids(folder, channels=channels, cases=cases)


def test_inputs_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        ids(tmp_path / "none")
    (tmp_path / "imagesTr").mkdir()
    with pytest.raises(InputError, match="without imagesTs"):
        ids(tmp_path)
