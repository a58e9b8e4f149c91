"""The command line end to end on a small data set, its exit codes, and one clear message for bad input."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lightm import read_volume
from lightm.cli import main
from tests.helpers import make_balls

CONFIG = """\
network: lightm-unet-small
network_options: {base_channels: 8, bottleneck_layers: 1}
epochs: 2
val_patches: 2
settings: {steps_per_epoch: 30, lr: 0.01, warmup_steps: 0}
"""


def lightm(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lightm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=280)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set and a trained run."""
    place = tmp_path_factory.mktemp("place")
    make_balls(place / "Dataset001_Balls", cases=6)
    (place / "small.yaml").write_text(CONFIG, encoding="utf-8")
    done = lightm("train", "Dataset001_Balls", "-o", "run", "--config", "small.yaml", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["overall"]["dsc"]["mean"] > 0.3
    assert "pseudo Dice" in done.stderr
    return place


@pytest.mark.slow
def test_training_ends_with_scores_and_a_report(place: Path) -> None:
    split = json.loads((place / "run" / "split.json").read_text(encoding="utf-8"))
    with (place / "run" / "evaluation" / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["case"] for row in rows} == set(split["test"])
    html = (place / "run" / "report.html").read_text(encoding="utf-8")
    assert "shell" in html
    assert "http" not in html.split("</head>")[0]


@pytest.mark.slow
def test_predictions_keep_each_files_geometry_and_find_the_ball(place: Path) -> None:
    done = lightm("predict", "-i", "Dataset001_Balls/imagesTr", "-o", "found", "-m", "run", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    paths = [place / path for path in json.loads(done.stdout)]
    assert len(paths) == 6
    for path in paths:
        found = read_volume(path, kind="label")
        truth = read_volume(place / "Dataset001_Balls" / "labelsTr" / path.name, kind="label")
        assert found.spacing_mm == truth.spacing_mm
        assert np.allclose(found.affine, truth.affine)
        assert np.mean((found.data > 0) == (truth.data > 0)) > 0.9
    again = lightm("predict", "-i", "Dataset001_Balls/imagesTr", "-o", "found", "-m", "run", cwd=place)
    assert again.returncode == 2
    scored = lightm("evaluate", "found", "--labels", "Dataset001_Balls/labelsTr", "-o", "scores", "--json", cwd=place)
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout) == json.loads((place / "scores" / "metrics.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_list_of_cases_with_a_fault_in_it_is_told_and_gone_on_with(place: Path, tmp_path: Path) -> None:
    images = place / "Dataset001_Balls" / "imagesTr"
    (tmp_path / "torn.nii.gz").write_bytes(b"torn")
    rows = [f"first,{images / 'ball_00_0000.nii.gz'}", f"second,{images / 'ball_01_0000.nii.gz'}", "third,torn.nii.gz"]
    (tmp_path / "cases.csv").write_text("\n".join(["case,channel0", *rows]), encoding="utf-8")
    asked = ("predict", "-i", "cases.csv", "-o", "out", "-m", place / "run", "--statistics", "--report", "run.json")
    done = lightm(*asked, "--max-memory", "8GB", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    lines = done.stderr.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["[1/3]", "first"], ["[2/3]", "second"], ["[3/3]", "third"]]
    assert "2 case(s) segmented into out, 1 failed" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run.json").read_text())["failed"][0]["case"] == "third"
    assert (tmp_path / "out" / "statistics.csv").read_text().count("first,") == 2  # classes
    shutil.copy(images / "ball_02_0000.nii.gz", tmp_path / "torn.nii.gz")
    again = lightm(*asked, "--continue", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "2 of 3 case(s) finished earlier" in again.stderr
    assert {path.name for path in (tmp_path / "out").glob("*.nii.gz")} == {
        "first.nii.gz", "second.nii.gz", "third.nii.gz",
    }  # fmt: skip


@pytest.mark.slow
def test_check_and_plan(place: Path) -> None:
    done = lightm("check", "Dataset001_Balls", "--json", cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    done = lightm("plan", "Dataset001_Balls", "-o", "plan.yaml", "--patch-size", "16,16,16", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "patch_size" in (place / "plan.yaml").read_text(encoding="utf-8")


@pytest.mark.slow
def test_check_names_every_fault(place: Path, tmp_path: Path) -> None:
    data = tmp_path / "Dataset002_Torn"
    shutil.copytree(place / "Dataset001_Balls", data)
    torn = data / "imagesTr" / "ball_02_0000.nii.gz"
    torn.write_bytes(torn.read_bytes()[:200])
    (data / "labelsTr" / "ball_04.nii.gz").unlink()
    (data / "imagesTr" / "ball_05_0000.nii.gz").unlink()
    done = lightm("check", data, cwd=tmp_path)
    assert done.returncode == 2
    for name in ("ball_02_0000.nii.gz", "ball_04", "ball_05"):
        assert name in done.stdout
    assert "Traceback" not in done.stderr


BAD_USAGE: list[tuple[tuple[str, ...], str]] = [
    (("train", "nowhere"), "nowhere"),
    (("train",), "no data set"),
    (("train", "Dataset001_Balls", "-o", "run"), "already holds a run"),
    (("train", "Dataset001_Balls", "-o", "new", "--network", "lightm-unit"), "did you mean"),
    (("train", "Dataset001_Balls", "-o", "new", "--max-time", "soon"), "soon"),
    (("train", "--resume", "run", "--lr", "1"), "lr cannot change"),
    (("predict", "-i", "Dataset001_Balls", "-o", "x", "-m", "Dataset001_Balls"), "not a model folder"),
    (("predict", "-i", "nowhere", "-o", "x", "-m", "run"), "nowhere"),
    (("predict", "-i", "Dataset001_Balls", "-o", "x", "-m", "run", "--max-memory", "lots"), "memory 'lots'"),
    (("predict", "-i", "Dataset001_Balls", "-o", "x", "-m", "run", "--window", "half"), "'patch' or 'whole'"),
    (("evaluate", "nowhere", "--labels", "Dataset001_Balls/labelsTr"), "nowhere"),
    (("evaluate", "Dataset001_Balls"), "no trained run"),
    (("report", "Dataset001_Balls"), "Dataset001_Balls"),
    (("phantom", "livr", "x"), "did you mean"),
    (("check", "small.yaml"), "small.yaml"),
    (("plan", "Dataset001_Balls", "--patch-size", "a,b"), "a,b"),
    (("train", "Dataset001_Balls", "--nonsense"), "nonsense"),
]


def assert_refused(code: object, errors: str, words: str, place: Path) -> None:
    assert code == 2, errors
    assert words in errors
    assert "Traceback" not in errors
    assert not (place / "new").exists()
    assert not (place / "x").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "words"), BAD_USAGE)
def test_bad_usage_exits_with_2_and_one_message(
    place: Path,
    arguments: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["lightm", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert_refused(ended.value.code, capsys.readouterr().err, words, place)


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "words"), [BAD_USAGE[0], BAD_USAGE[6], BAD_USAGE[-1]])
def test_a_process_ends_as_the_function_does(place: Path, arguments: tuple[str, ...], words: str) -> None:
    done = lightm(*arguments, cwd=place)
    assert_refused(done.returncode, done.stderr, words, place)


@pytest.mark.slow
def test_phantoms_and_version(tmp_path: Path) -> None:
    done = lightm("phantom", "xray", "lungs", "--cases", "2", "--size", "64", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "lungs" / "imagesTr").glob("*.png"))) == 2
    assert lightm("--version", cwd=tmp_path).stdout.startswith("lightm ")
