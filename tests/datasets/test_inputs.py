"""Which cases are taken from files, folders, datasets and lists to predict, and what is refused, by file and line."""

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
