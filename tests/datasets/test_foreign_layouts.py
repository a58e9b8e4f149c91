"""Data sets as people have them: several channels in one file, two endings, links, lists that nnU-Net does not use."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from lightm.datasets.check import check_dataset
from lightm.datasets.discovery import open_dataset
from lightm.datasets.inputs import find_cases
from lightm.errors import InputError
from lightm.images.io import read_volume

CASES = 3


def nifti(path: Path, data: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(data, np.diag([1.0, 1.0, 2.0, 1.0])), path)


def description(root: Path, channels: int = 1, **more: object) -> None:
    names = {str(index): f"channel {index}" for index in range(channels)}
    content = {"channel_names": names, "labels": {"background": 0, "lesion": 1}, "numTraining": CASES, **more}
    (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8")


def make(
    root: Path, name: str = "imagesTr/{}_0000.nii.gz", channels: int = 1, label: str = "labelsTr/{}.nii.gz"
) -> Path:
    rng = np.random.default_rng(0)
    for index in range(CASES):
        shape = (6, 7, 5) if channels == 1 else (6, 7, 5, channels)
        nifti(root / name.format(f"case{index}"), rng.random(shape).astype(np.float32))
        truth = np.zeros((6, 7, 5), np.uint8)
        truth[1:3, 1:3, 1:3] = 1
        nifti(root / label.format(f"case{index}"), truth)
    return root


def sound(root: Path) -> None:
    result = check_dataset(root)
    assert result.ok, [str(problem) for problem in result.problems]
    assert result.summary["training_cases"] == CASES


@pytest.mark.parametrize("name", ["imagesTr/{}.nii.gz", "imagesTr/{}_0000.nii.gz"])
def test_one_file_of_all_channels_in_nnunets_layout(tmp_path: Path, name: str) -> None:
    description(make(tmp_path, name, channels=4), channels=4, file_ending=".nii.gz")
    sound(tmp_path)
    case = open_dataset(tmp_path).cases[0]
    assert [file.name.partition("::")[2] for file in case.images] == ["0", "1", "2", "3"]
    assert case.id == "case0"
    stored = np.asarray(nibabel.load(tmp_path / name.format("case0")).dataobj)
    for index, file in enumerate(case.images):
        np.testing.assert_array_equal(read_volume(file).data, stored[..., index].T)
    given = find_cases(tmp_path / name.format("case1"), [f"channel {index}" for index in range(4)])
    assert [len(found.images) for found in given] == [4]


def test_one_file_of_all_channels_in_the_decathlons_layout(tmp_path: Path) -> None:
    make(tmp_path, "imagesTr/{}.nii.gz", channels=2)
    listed = [{"image": f"./imagesTr/case{i}.nii.gz", "label": f"./labelsTr/case{i}.nii.gz"} for i in range(CASES)]
    description(tmp_path, channels=2, training=listed)
    sound(tmp_path)
    description(tmp_path, channels=3, training=listed)
    with pytest.raises(InputError, match=r"case0\.nii\.gz: it holds 2 channel\(s\), but dataset.json names 3"):
        open_dataset(tmp_path)


def test_a_colour_picture_is_three_channels_or_one_grey(tmp_path: Path) -> None:
    colour = np.random.default_rng(0).integers(0, 255, (8, 9, 3)).astype(np.uint8)
    for index in range(CASES):
        for folder, data in (("imagesTr", colour), ("labelsTr", (colour[..., 0] > 99).astype(np.uint8))):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(data).save(tmp_path / folder / f"case{index}{'_0000' * (folder == 'imagesTr')}.png")
    for channels in (1, 3):
        description(tmp_path, channels=channels, file_ending=".png")
        sound(tmp_path)
        assert len(open_dataset(tmp_path).cases[0].images) == channels


def test_two_endings_and_any_case_of_an_ending_are_one_data_set(tmp_path: Path) -> None:
    description(make(tmp_path), file_ending=".nii.gz")
    nifti(tmp_path / "imagesTr" / "case1_0000.nii", np.zeros((6, 7, 5), np.float32) + np.arange(5))
    (tmp_path / "imagesTr" / "case1_0000.nii.gz").unlink()
    (tmp_path / "imagesTr" / "case2_0000.nii.gz").rename(tmp_path / "imagesTr" / "case2_0000.NII.GZ")
    (tmp_path / "labelsTr" / "case2.nii.gz").rename(tmp_path / "labelsTr" / "case2.Nii.gz")
    sound(tmp_path)
    nifti(tmp_path / "imagesTr" / "case0_0000.nii", np.zeros((6, 7, 5), np.float32))
    problems = check_dataset(tmp_path).problems
    assert [(problem.severity, problem.file.name) for problem in problems] == [("warning", "case0_0000.nii")]
    assert "is there beside case0_0000.nii.gz, so it is not used" in str(problems[0])


def test_a_list_in_dataset_json_of_nnunet_names_cases(tmp_path: Path) -> None:
    make(tmp_path)
    listed = [{"image": f"./imagesTr/case{i}.nii.gz", "label": f"./labelsTr/case{i}.nii.gz"} for i in range(CASES)]
    description(tmp_path, training=listed, test=[])
    sound(tmp_path)


def test_links_to_files_elsewhere_are_read(tmp_path: Path) -> None:
    make(tmp_path / "store", "{}.image.nii.gz", label="{}.label.nii.gz")
    root = tmp_path / "Task"
    for folder, kind in (("imagesTr", "image"), ("labelsTr", "label")):
        (root / folder).mkdir(parents=True)
        for index in range(CASES):
            target = tmp_path / "store" / f"case{index}.{kind}.nii.gz"
            try:
                (root / folder / f"case{index}.nii.gz").symlink_to(target)
            except OSError:
                pytest.skip("this system makes no symbolic links")
    listed = [{"image": f"./imagesTr/case{i}.nii.gz", "label": f"./labelsTr/case{i}.nii.gz"} for i in range(CASES)]
    description(root, training=listed)
    sound(root)


def test_names_that_end_in_digits_are_to_be_renamed_and_nothing_is_to_be_removed(tmp_path: Path) -> None:
    description(make(tmp_path, "imagesTr/{}_0012.nii.gz", label="labelsTr/{}_0012.nii.gz"), file_ending=".nii.gz")
    problems = check_dataset(tmp_path).problems
    files = [problem for problem in problems if problem.file != tmp_path]
    assert len(files) == CASES
    for problem in files:
        assert "rename it to case" in str(problem)
        assert "_0012_0000.nii.gz" in str(problem)
    assert "remove" not in " ".join(map(str, problems))


def test_faulty_test_images_are_warnings(tmp_path: Path) -> None:
    description(make(tmp_path), file_ending=".nii.gz")
    nifti(tmp_path / "imagesTs" / "case0_0000.nii.gz", np.ones((6, 7, 5), np.float32) + np.arange(5))
    nifti(tmp_path / "imagesTs" / "other_0001.nii.gz", np.ones((6, 7, 5), np.float32))
    result = check_dataset(tmp_path)
    assert result.ok
    assert {problem.file.parent.name for problem in result.problems if problem.file} == {"imagesTs"}
    assert open_dataset(tmp_path).test_cases == ()
