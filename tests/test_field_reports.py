"""Situations that users of such software reported in public: each ends right, or in one line that says how to go on.

The inputs lie beside the project (data/field_reports, one folder per situation); docs/reliability.md has the table.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import lightm
from lightm.cli import main
from lightm.images.volume import geometry_difference

pytestmark = pytest.mark.slow

Run = Callable[..., tuple[int, str]]
SHORT = ("--epochs", "1", "--steps-per-epoch", "2", "--val-patches", "2")


@pytest.fixture(scope="session")
def reports(shared: Path) -> Path:
    if not (shared / "data" / "field_reports").is_dir():
        pytest.skip("no field reports")
    return shared / "data" / "field_reports"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command in an empty folder; returns its exit code and all that it printed, in one line."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["lightm", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return code, " ".join((out + err).split())

    return command


@pytest.fixture
def writable(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a folder to where it may be changed."""

    def copy(source: Path) -> Path:
        target = Path(shutil.copytree(source, tmp_path / source.name))
        for path in [target, *target.rglob("*")]:
            path.chmod(path.stat().st_mode | 0o200)
        return target

    return copy


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on liver phantoms, after two steps."""
    folder = tmp_path_factory.mktemp("base")
    data = lightm.phantoms("liver", folder / "data", cases=8, size=32)
    options = {"epochs": 1, "steps_per_epoch": 2, "val_patches": 2, "test": False, "postprocess": False}
    return lightm.train(data, folder / "run", **options).run_dir


@pytest.mark.parametrize("name", ["D1", "D1b"])
def test_1_an_nnunet_data_set_with_a_training_list(reports: Path, run: Run, name: str) -> None:
    code, said = run("check", reports / "1" / name)
    assert code == 0, said
    assert "8 training cases" in said


def test_2_names_that_end_in_four_digits(reports: Path, run: Run) -> None:
    code, said = run("check", reports / "2" / "D2")
    assert code != 0
    assert "_0000" in said
    assert "rename" in said
    assert "remove" not in said


def test_3_files_that_are_symbolic_links(reports: Path, run: Run, writable: Callable[[Path], Path]) -> None:
    root = writable(reports / "3")
    for path in root.glob("Task/*/*"):
        content = path.read_bytes()
        if len(content) < 200 and content.startswith(b".."):  # a link that was copied as its target's name
            path.unlink()
            path.symlink_to(content.decode())
    code, said = run("check", root / "Task")
    assert code == 0, said
    assert "8 training cases" in said


def test_4_upper_case_endings(reports: Path, run: Run, base: Path) -> None:
    code, said = run("check", reports / "4" / "plain" / "images", "--labels", reports / "4" / "plain" / "labels")
    assert code == 0, said
    code, said = run("check", reports / "4" / "D4")
    assert code == 0, said
    code, said = run("predict", "-i", reports / "4" / "in", "-o", "out", "-m", base)
    assert code == 0, said


def test_5_one_4d_file_per_case(reports: Path, run: Run) -> None:
    task = reports / "5" / "Task01_BrainTumour"
    code, said = run("check", task)
    assert code == 0, said
    code, said = run("train", task, "-o", "run", *SHORT, "--no-test")
    assert code == 0, said
    code, said = run("predict", "-i", task / "imagesTs", "-o", "out", "-m", "run")
    assert code == 0, said
    assert sorted(path.name for path in Path("out").glob("*.nii.gz")) == ["BRATS_485.nii.gz", "BRATS_486.nii.gz"]


def test_6_regions(reports: Path, run: Run) -> None:
    data = reports / "6" / "Regions"
    code, said = run("train", data, "-o", "run", *SHORT)
    assert code == 0, said
    scores = json.loads(Path("run/evaluation/metrics.json").read_text(encoding="utf-8"))
    assert "whole liver" in json.dumps(scores)
    assert {int(value) for path in Path("run/predictions").glob("*.nii.gz") for value in np.unique(_data(path))} <= {
        0,
        1,
        2,
    }


def test_9_a_class_without_cases_or_with_one(reports: Path, run: Run) -> None:
    for name in ("Never", "Rare"):
        code, said = run("check", reports / "9" / name)
        assert code == 0, said
        assert "spleen" in said
        more = ("--folds", "4", "--fold", "0") if name == "Rare" else ()
        code, said = run("train", reports / "9" / name, "-o", name, *SHORT, "--no-test", *more)
        assert code == 0, said
        assert "spleen" in said
    split = json.loads(Path("Rare/split.json").read_text(encoding="utf-8"))
    holds = [path.name for path in (reports / "9" / "Rare" / "labelsTr").iterdir() if 3 in _data(path)]
    assert [name.removesuffix(".nii.gz") in split["train"] for name in holds] == [True]


def test_10_scoring_without_a_dataset_json_and_of_a_part(reports: Path, run: Run) -> None:
    here = reports / "10"
    code, said = run("evaluate", here / "pred", "--labels", here / "gt")
    assert code == 0, said
    code, said = run("evaluate", here / "sub", "--labels", here / "gt")
    assert code == 0 or "--cases" in said or "--partial" in said, said
    code, said = run("evaluate", here / "nothing", "--labels", here / "gt")
    assert code == 2
    assert "nothing" in said
    assert "labels_map" not in said
    assert "cases=" not in said


def test_12_colour_pictures_and_jpeg(reports: Path, run: Run) -> None:
    for arguments in (
        (reports / "12" / "RGB",),
        (reports / "12" / "RGB1",),
        (reports / "12" / "jpgplain" / "images", "--labels", reports / "12" / "jpgplain" / "labels"),
    ):
        code, said = run("check", *arguments)
        assert code == 0, said
        name = Path(arguments[0]).parent.name + Path(arguments[0]).name
        code, said = run("train", *arguments, "-o", name, *SHORT)
        assert code == 0, said
    assert len(list(Path("jpgplainimages/predictions").glob("*.png"))) > 0


def _data(path: Path) -> np.ndarray:
    return lightm.read_volume(path).data


@pytest.mark.parametrize("name", ["Dnrrd", "Dmha", "Dtif"])
def test_14_data_sets_in_other_formats(reports: Path, run: Run, name: str) -> None:
    code, said = run("check", reports / "14" / name)
    assert code == 0, said
    code, said = run("train", reports / "14" / name, "-o", "run", *SHORT)
    assert code == 0, said
    ending = name.removeprefix("D")
    assert [path.suffix for path in Path("run/predictions").glob(f"*.{ending}")]


@pytest.mark.parametrize("name", ["nrrd", "mha", "mhd", "hdr", "vtk"])
def test_14_results_have_format_and_place_of_their_scan(reports: Path, run: Run, base: Path, name: str) -> None:
    code, said = run("predict", "-i", reports / "14" / name, "-o", "out", "-m", base)
    assert code == 0, said
    scan, found = (lightm.read_volume(folder / f"scan.{name}") for folder in (reports / "14" / name, Path("out")))
    assert geometry_difference(scan, found) is None


def test_18_a_binary_image_that_is_called_ct(reports: Path, run: Run) -> None:
    for verb in (("check",), ("train", "-o", "run", *SHORT)):
        code, said = run(verb[0], reports / "18" / "RibSeg", *verb[1:])
        assert code != 0 or "warning" in said.lower() or "constant" in said, said
        assert "RibSeg" in said
        assert ".nii.gz" in said


def test_19_intensities_that_the_model_never_saw(reports: Path, run: Run, base: Path) -> None:
    code, said = run("predict", "-i", reports / "19" / "in", "-o", "out", "-m", base)
    assert code == 0, said
    told = {name: f"{name}" in said.replace("out/", "") for name in ("byte", "unit", "plus1024")}
    assert all(told.values()), said
    assert "intensit" in said


def test_24_a_channel_that_is_not_normalised(reports: Path, run: Run) -> None:
    code, said = run("plan", reports / "24" / "NoNorm", "-o", "plan.yaml")
    assert code == 0, said
    assert "none" in Path("plan.yaml").read_text(encoding="utf-8").lower()


def test_25_two_endings_in_one_folder(reports: Path, run: Run) -> None:
    code, said = run("check", reports / "25" / "Mixed")
    assert code == 0, said
    assert "8 training cases" in said
    code, said = run("train", reports / "25" / "Mixed", "-o", "run", *SHORT, "--no-test")
    assert code == 0, said
    split = json.loads(Path("run/split.json").read_text(encoding="utf-8"))
    assert sum(len(split[part]) for part in ("train", "val", "test")) == 8


def test_26_a_plan_of_other_data(reports: Path, run: Run) -> None:
    code, said = run("train", reports / "26" / "AL", "-o", "run", *SHORT, "--no-test")
    assert "plan" in said
    assert code != 0 or "changed" in said, said


def test_27_images_without_a_place(reports: Path, run: Run) -> None:
    code, said = run("check", reports / "27" / "NoCodes")
    assert "resample" not in said
    assert "sform" in said or "place" in said
    assert "--" in said or code == 0, said


@pytest.mark.parametrize("name", ["nopre/p1", "p1.zip"])
def test_32_dicom_without_preamble_and_in_a_zip(reports: Path, run: Run, base: Path, name: str) -> None:
    code, said = run("predict", "-i", reports / "32" / name, "-o", "out", "-m", base)
    assert code == 0, said


@pytest.mark.parametrize("name", ["tilt", "variable", "missing"])
def test_32_dicom_that_is_no_regular_stack(reports: Path, run: Run, base: Path, name: str) -> None:
    code, said = run("predict", "-i", reports / "32" / name / "p1", "-o", "out", "-m", base)
    assert code != 0
    assert "p1" in said


def test_33_a_data_set_that_moved(reports: Path, run: Run, writable: Callable[[Path], Path], tmp_path: Path) -> None:
    source = writable(reports / "33" / "D2")
    code, said = run("train", source, "-o", "run", *SHORT, "--no-test")
    assert code == 0, said
    moved = source.rename(tmp_path / "elsewhere")
    code, said = run("resume", "run", "--epochs", "2")
    assert code != 0
    assert "--dataset" in said
    code, said = run("resume", "run", "--epochs", "2", "--dataset", moved)
    assert code == 0, said


def test_36_plain_folders_that_look_like_ct(reports: Path, run: Run) -> None:
    code, said = run("plan", reports / "36" / "ct", "--labels", reports / "36" / "seg", "-o", "plan.yaml")
    assert code == 0, said
    assert "CT" in said
    assert "--channel" in said or "channel" in said


def test_40_a_step_that_deletes_true_lesions_is_not_taken(reports: Path, run: Run) -> None:
    data = reports / "40" / "Lesions"
    code, said = run("train", data, "-o", "run", "--epochs", "1", "--steps-per-epoch", "30", "--no-test")
    assert code == 0, said
    model = json.loads(Path("run/model/model.json").read_text(encoding="utf-8"))
    assert "largest" not in json.dumps(model.get("postprocess") or {}), said


@pytest.mark.parametrize("name", ["dup", "missingch"])
def test_42_a_faulty_test_image_does_not_stop_a_training(reports: Path, run: Run, name: str) -> None:
    code, said = run("train", reports / "42" / name, "-o", "run", *SHORT, "--no-test")
    assert code == 0, said
    assert "imagesTs" in said


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps", "gpu", "0", "quantum"])
def test_a_device_that_is_not_there(run: Run, name: str, tmp_path: Path, base: Path) -> None:
    for arguments in (
        ("train", base.parent / "data", "-o", "run", *SHORT),
        ("predict", "-i", base.parent / "data" / "imagesTr", "-o", "out", "-m", base),
    ):
        code, said = run(*arguments, "--device", name)
        if code == 0 and name in ("cuda", "gpu"):
            pytest.skip("there is such a device")
        assert code == 2
        assert "device" in said
        assert not (tmp_path / "run").exists()
        assert not (tmp_path / "out").exists()


def test_a_fold_without_a_number_of_folds(run: Run, base: Path) -> None:
    code, said = run("train", base.parent / "data", "-o", "run", *SHORT, "--no-test", "--fold", "3")
    assert code == 0, said
    first = json.loads(Path("run/split.json").read_text(encoding="utf-8"))
    code, said = run("train", base.parent / "data", "-o", "other", *SHORT, "--no-test", "--fold", "2")
    second = json.loads(Path("other/split.json").read_text(encoding="utf-8"))
    assert (first["kind"], first["fold"], second["fold"]) == ("5-fold", 3, 2)
    assert not set(first["test"]) & set(second["test"])
    assert first["val"] != second["val"]


def test_two_models_are_an_ensemble(run: Run, base: Path) -> None:
    code, said = run("predict", "-i", base.parent / "data" / "imagesTr", "-o", "out", "-m", base, "-m", base)
    assert code == 0, said
    code, said = run("predict", "-i", base.parent / "data" / "imagesTr", "-o", "one", "-m", base)
    for path in Path("one").glob("*.nii.gz"):
        np.testing.assert_array_equal(_data(path), _data(Path("out") / path.name))


def test_sizes_are_refused_before_their_memory_is_asked_for(run: Run, base: Path, tmp_path: Path) -> None:
    code, said = run("train", base.parent / "data", "-o", "run", *SHORT, "--patch-size", "512,512,512")
    assert code == 2
    assert "512" in said
    affine = np.diag([500.0, 500.0, 500.0, 1.0])
    coarse = lightm.Volume(np.zeros((40, 40, 40), np.int16), (500.0, 500.0, 500.0), affine)
    (tmp_path / "in").mkdir()
    lightm.write_volume(tmp_path / "in" / "coarse.nii.gz", coarse)
    code, said = run("predict", "-i", "in", "-o", "out", "-m", base)
    assert code != 0
    assert "coarse" in said
    assert os.path.getsize(tmp_path / "in" / "coarse.nii.gz") < 1e5
