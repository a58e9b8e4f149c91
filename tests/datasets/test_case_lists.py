"""Lists of cases: what is taken, and the line that is named where something is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightm.datasets.inputs import find_cases
from lightm.errors import InputError


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name in ("a/ct.nii.gz", "b/ct.nii.gz", "b/other.nii", "two/p_0000.nii", "two/p_0001.nii", "x, y.nii"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def found(path: Path | list[Path], channels: int = 1, **options: list[str]) -> dict[str, list[str]]:
    cases = find_cases(path, [f"c{i}" for i in range(channels)], **options)
    return {case.id: ["/".join(image.parts[-2:]) for image in case.images] for case in cases}


def test_text_with_comments_relative_and_absolute_paths(place: Path) -> None:
    text = f"\ufeff# images\n\n  b/other.nii  \r\n  # more\n{place / 'a' / 'ct.nii.gz'}\nx, y.nii\n"
    (place / "list.txt").write_text(text, encoding="utf-8")
    assert found(place / "list.txt") == {
        "ct": ["a/ct.nii.gz"],
        "other": ["b/other.nii"],
        "x, y": [f"{place.name}/x, y.nii"],
    }
    assert list(found(place / "list.txt", cases=["other"])) == ["other"]


def test_channels(place: Path) -> None:
    (place / "tabs.txt").write_text("two/p_0001.nii\t b/other.nii\n")
    assert found(place / "tabs.txt", 2) == {"p_0001": ["two/p_0001.nii", "b/other.nii"]}
    (place / "first.txt").write_text("two/p_0000.nii\n")  # the others are beside it, by their names
    assert found(place / "first.txt", 2) == {"p": ["two/p_0000.nii", "two/p_0001.nii"]}
    (place / "named.csv").write_text('case,channel0,channel1\n# no\nz,a/ct.nii.gz,"x, y.nii"\n')
    assert found(place / "named.csv", 2) == {"z": ["a/ct.nii.gz", f"{place.name}/x, y.nii"]}


def test_csv_names_cases_apart_and_several_inputs_go_together(place: Path) -> None:
    (place / "named.csv").write_text("case,channel0\nfirst,a/ct.nii.gz\nsecond,b/ct.nii.gz\n")
    assert found(place / "named.csv") == {"first": ["a/ct.nii.gz"], "second": ["b/ct.nii.gz"]}
    assert list(found([place / "named.csv", place / "b"])) == ["ct", "first", "other", "second"]
    with pytest.raises(InputError, match=r"case 'ct' is there twice, also from .*a"):
        found([place / "a", place / "b"])
    with pytest.raises(InputError, match="no case 'secnd' among 4 cases; did you mean 'second'"):
        found([place / "named.csv", place / "b"], cases=["secnd"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.txt", "# nothing\n\n", r"l\.txt: an empty list"),
        ("l.txt", "a/ct.nii.gz\n\nnone.nii\n", r"l\.txt, line 3: .*none\.nii: no such file"),
        ("l.txt", "a/ct.nii.gz,b/ct.nii.gz\n", r"l\.txt, line 1: .*channels are separated by tabs"),
        ("l.txt", "a/ct.nii.gz\tb/other.nii\n", r"l\.txt, line 1: 2 file\(s\), but the model takes 1"),
        ("l.txt", "a/ct.nii.gz\t\tb/other.nii\n", r"l\.txt, line 1: an empty path between tabs"),
        ("l.txt", "a/ct.nii.gz\nb/ct.nii.gz\n", r"l\.txt, line 2: case 'ct' is there twice, also from .*, line 1"),
        ("l.txt", "# x\nl.txt\n", r"l\.txt, line 2: .*a list in a list"),
        ("l.txt", b"\xff\xfea", r"l\.txt: not a list of paths in UTF-8"),
        ("l.csv", "a/ct.nii.gz\n", r"l\.csv, line 1: header 'a/ct\.nii\.gz', expected 'case,channel0'"),
        ("l.csv", "case,channel0\n", "a header and no case"),
        ("l.csv", "case,channel0\n\nx\n", r"l\.csv, line 3: 1 columns, the header has 2"),
        ("l.csv", "case,channel0\nx,\n", r"l\.csv, line 2: column 'channel0' is empty"),
        ("l.csv", "case,channel0\n../x,a/ct.nii.gz\n", r"l\.csv, line 2: case '\.\./x' cannot be the name of a file"),
        ("l.csv", "case,channel0,channel1\nx,a/ct.nii.gz,b/ct.nii.gz\n", "line 2: 2 file.* the model takes 1"),
        ("l.csv", 'case,channel0\n"x,a/ct.nii.gz\n', r"l\.csv, line 2: not a line of CSV"),
    ],
)
def test_faults_are_named_with_their_line(place: Path, name: str, text: str | bytes, message: str) -> None:
    (place / name).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(InputError, match=message):
        found(place / name)


def test_a_list_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.txt: cannot be opened"):
        found(tmp_path / "none.txt")
