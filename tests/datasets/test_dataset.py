from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from lightm.datasets.check import check_dataset
from lightm.datasets.discovery import open_dataset
from lightm.errors import InputError
from lightm.images.io import read_volume, write_volume
from lightm.images.volume import Volume
from tests.helpers import describe


def respell(root, number: int, change) -> None:
    """Read a label map, change its array, write it back."""
    path = root / f"labelsTr/case_{number}.nii.gz"
    volume = read_volume(path, kind="label")
    write_volume(path, volume.with_data(change(volume.data)))


def test_nnunet_layout(make_dataset):
    root = make_dataset()
    shutil.copytree(root / "imagesTr", root / "imagesTs")
    for file in (root / "imagesTs").iterdir():
        file.rename(file.with_name("test_" + file.name))
    dataset = open_dataset(root)
    assert dataset.name == "Dataset001_Small"
    assert [case.id for case in dataset.cases] == ["case_0", "case_1", "case_2"]
    assert [case.id for case in dataset.test_cases] == ["test_case_0", "test_case_1", "test_case_2"]
    assert dataset.case("case_1").label == root / "labelsTr/case_1.nii.gz"
    assert dataset.case("test_case_1").label is None
    assert (dataset.channels, dataset.classes, dataset.values) == (
        ("MRI",),
        ("background", "organ", "lesion"),
        (0, 1, 2),
    )
    assert open_dataset(root / "dataset.json") == dataset
    with pytest.raises(InputError, match="no case 'x'"):
        dataset.case("x")
    assert check_dataset(root).ok


def test_labels_are_ordered_by_value_and_ignore_is_apart(make_dataset):
    root = make_dataset()
    labels = {"lesion": 7, "organ": 3, "background": 0, "ignore": 9}
    describe(root, labels=labels, description="more keys", overwrite_image_reader_writer="SimpleITKIO")
    dataset = open_dataset(root)
    assert list(dataset.labels.items()) == [("background", 0), ("organ", 3), ("lesion", 7)]
    assert dataset.ignore_label == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, '"labels" is missing'),
        ({"labels": {"background": 0, "whole": [1, 2]}}, "no regions_class_order"),
        ({"labels": {"background": 0, "organ": 1.5}}, "expected a whole number"),
        ({"labels": {"background": 0, "organ": -1}}, "values from 0 to 32767"),
        ({"labels": {"organ": 1, "lesion": 2}}, "no label has the value 0"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "share the value 1"),
        ({"labels": {"background": 0}}, "only the background"),
        ({"labels": {"background": 0, **{f"l{i}": i for i in range(1, 300)}}}, "300 labels; at most 255"),
        ({"channel_names": None}, '"channel_names" is missing'),
        ({"channel_names": {"1": "CT"}}, "number them"),
        ({"file_ending": ".xyz"}, "'.xyz' is not a format"),
    ],
)
def test_a_faulty_description_is_named(make_dataset, changes, message):
    root = make_dataset()
    describe(root, **changes)
    for call in (open_dataset, check_dataset):
        with pytest.raises(InputError, match=message) as raised:
            call(root)
        assert str(raised.value).startswith(str(root / "dataset.json"))


def test_no_dataset_at_all(tmp_path, make_dataset):
    with pytest.raises(InputError, match="no such folder"):
        open_dataset(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="the folder is empty"):
        open_dataset(tmp_path / "empty")
    root = make_dataset()
    (root / "dataset.json").write_text("{")
    with pytest.raises(InputError, match=r"dataset\.json: not readable as JSON"):
        open_dataset(root)
    (root / "dataset.json").unlink()
    with pytest.raises(InputError, match=r"no dataset\.json"):
        open_dataset(root)
    describe(root)
    for file in (*root.glob("imagesTr/*"), *root.glob("labelsTr/*")):
        file.unlink()
    with pytest.raises(InputError, match=r"no cases: no file ends in \.nii\.gz"):
        open_dataset(root)
    shutil.rmtree(root / "labelsTr")
    with pytest.raises(InputError, match="labelsTr: no such folder"):
        open_dataset(root)


def test_orphans_stop_opening_and_are_all_listed_by_check(make_dataset):
    root = make_dataset(cases=5)
    (root / "imagesTr/case_0_0000.nii.gz").unlink()
    (root / "labelsTr/case_1.nii.gz").unlink()
    with pytest.raises(InputError, match=r"case_1_0000\.nii\.gz: an image without a label.*1 more"):
        open_dataset(root)
    result = check_dataset(root)
    assert not result.ok
    assert {(problem.case, problem.file.name) for problem in result.problems} == {
        ("case_0", "case_0.nii.gz"),
        ("case_1", "case_1_0000.nii.gz"),
    }
    assert all(problem.cure for problem in result.problems)


def test_missing_channels_and_odd_names(make_dataset):
    root = make_dataset()
    describe(root, channel_names={"0": "T1", "1": "T2"})
    for number in (0, 1):
        shutil.copy(root / f"imagesTr/case_{number}_0000.nii.gz", root / f"imagesTr/case_{number}_0001.nii.gz")
    shutil.copy(root / "imagesTr/case_0_0000.nii.gz", root / "imagesTr/case_0_0002.nii.gz")
    shutil.copy(root / "imagesTr/case_0_0000.nii.gz", root / "imagesTr/odd.nii.gz")
    messages = {str(problem) for problem in check_dataset(root).problems}
    assert len(messages) == 3
    assert any("case_2_0001.nii.gz: channel 1 ('T2') of case 'case_2' is missing" in message for message in messages)
    assert any("channel 2 of case 'case_0', but dataset.json names 2" in message for message in messages)
    assert any("odd.nii.gz: the name has no channel number" in message for message in messages)


def test_files_that_are_left_out_are_mentioned(make_dataset):
    root = make_dataset()
    (root / "imagesTr/case_9_0000.png").write_bytes(b"x")
    (root / "imagesTr/._case_0_0000.nii.gz").write_bytes(b"x")
    describe(root, numTraining=8)
    result = check_dataset(root)
    assert result.ok
    assert [problem.severity for problem in result.problems] == ["warning"]
    assert "case_9_0000.png" in str(result.problems[0])
    (root / "imagesTr/case_9_0000.png").unlink()
    assert "numTraining says 8, found 3" in str(check_dataset(root).problems[0])


def test_check_lists_every_fault_of_the_voxels_at_once(make_dataset):
    root = make_dataset(cases=8)

    def image(number: int) -> Volume:
        return read_volume(root / f"imagesTr/case_{number}_0000.nii.gz")

    torn = root / "imagesTr/case_0_0000.nii.gz"
    torn.write_bytes(torn.read_bytes()[:100])
    respell(root, 1, lambda data: np.where(data == 1, 5, data))
    volume = image(2)
    write_volume(root / "labelsTr/case_2.nii.gz", Volume.from_spacing(np.ones((6, 8, 9), np.uint8), (2, 1, 1)))
    volume = image(3)
    affine = volume.affine.copy()
    affine[0, 3] += 40
    write_volume(root / "imagesTr/case_3_0000.nii.gz", Volume(volume.data, volume.spacing_mm, affine))
    write_volume(root / "imagesTr/case_4_0000.nii.gz", image(4).with_data(np.zeros((6, 8, 10), np.int16)))
    write_volume(root / "labelsTr/case_5.nii.gz", Volume.from_spacing(np.full((6, 8, 10), 0.5, np.float32), (2, 1, 1)))
    flat = Volume.from_spacing(np.arange(80, dtype=np.uint8).reshape(8, 10) % 3, (1, 1))
    for file in ("imagesTr/case_6_0000.nii.gz", "labelsTr/case_6.nii.gz"):
        write_volume(root / file, flat)
    calls = []
    result = check_dataset(root, progress=lambda what, done, total: calls.append((done, total)))
    assert calls == [(done, 8) for done in range(1, 9)]
    found = {(problem.severity, problem.case, problem.file.name): str(problem) for problem in result.problems}
    expected = {
        ("error", "case_0", "case_0_0000.nii.gz"): "",
        ("error", "case_1", "case_1.nii.gz"): "label value 5 is not in dataset.json",
        ("error", "case_2", "case_2.nii.gz"): "shape (6, 8, 9) against (6, 8, 10)",
        ("error", "case_3", "case_3.nii.gz"): "up to 40 mm apart",
        ("warning", "case_4", "case_4_0000.nii.gz"): "every voxel has the same value",
        ("error", "case_5", "case_5.nii.gz"): "whole numbers",
        ("error", "case_6", "case_6_0000.nii.gz"): "a 2D image among 3D ones",
    }
    assert set(found) == set(expected)
    for key, message in expected.items():
        assert message in found[key]
    assert result.problems[-1].severity == "warning"
    assert result.summary["errors"] == 6
    json.dumps(result.summary)


def test_classes_that_never_occur(make_dataset):
    root = make_dataset()
    for number in range(3):
        respell(root, number, lambda data: np.minimum(data, 1))
    result = check_dataset(root)
    assert result.ok
    assert ["class 'lesion' (value 2) occurs in no label map" in str(problem) for problem in result.problems] == [True]
    for number in range(3):
        respell(root, number, lambda data: data * 0)
    result = check_dataset(root)
    assert not result.ok
    assert "nothing to learn" in str(result.problems[0])


def test_one_case_is_an_error_of_the_check_alone(make_dataset):
    root = make_dataset(cases=1)
    assert len(open_dataset(root).cases) == 1
    result = check_dataset(open_dataset(root))
    assert [problem.message.split(";")[0] for problem in result.problems] == ["1 usable training cases"]


def test_summary_counts_by_hand(make_dataset):
    summary = check_dataset(make_dataset()).summary
    assert summary["shape"]["median"] == [6, 8, 10]
    assert summary["spacing_mm"]["max"] == [2.0, 1.0, 1.0]
    assert summary["class_cases"] == {"background": 3, "organ": 3, "lesion": 3}
    assert summary["class_fractions"] == {"background": 0.8667, "organ": 0.1167, "lesion": 0.01667}


def test_a_case_that_exists_twice(make_dataset):
    root = make_dataset()
    for file in ("imagesTr/case_0_0000.nii.gz", "labelsTr/case_0.nii.gz"):
        shutil.copy(root / file, root / file.replace("case", "CASE"))
    if len(list((root / "labelsTr").iterdir())) == 3:
        pytest.skip("this file system keeps one of two names that differ in case")
    with pytest.raises(InputError, match="the case exists twice"):
        open_dataset(root)


def msd(root, **changes) -> None:
    """Turn a small dataset into the layout of the Decathlon."""
    for file in sorted((root / "imagesTr").iterdir()):
        file.rename(file.with_name(file.name.replace("_0000", "")))
    pairs = [
        {"image": f"./imagesTr/{file.name}", "label": f"./labelsTr/{file.name}"}
        for file in (root / "labelsTr").iterdir()
    ]
    content = {
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "organ", "2": "lesion"},
        "training": pairs,
        "test": [],
        "numTraining": len(pairs),
        **changes,
    }
    (root / "dataset.json").write_text(json.dumps(content))


def test_decathlon_layout(make_dataset):
    root = make_dataset("Task09_Small")
    msd(root)
    dataset = open_dataset(root)
    assert [case.id for case in dataset.cases] == ["case_0", "case_1", "case_2"]
    assert (dataset.channels, dataset.values, dataset.file_ending) == (("MRI",), (0, 1, 2), ".nii.gz")
    assert check_dataset(root).ok
    (root / "imagesTr/case_1.nii.gz").unlink()
    with pytest.raises(InputError, match=r"case_1\.nii\.gz: the image listed in dataset\.json does not exist"):
        open_dataset(root)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modality": {"0": "T1", "1": "T2"}}, r"it holds 1 channel\(s\), but dataset.json names 2 \(T1, T2\)"),
        ({"training": [{"image": "../../x.nii.gz", "label": "y.nii.gz"}]}, "outside the dataset"),
        ({"training": ["a.nii.gz"]}, '"training" holds'),
        ({"training": [{"image": 3, "label": 4}]}, "expected the path of a file"),
    ],
)
def test_faulty_decathlon_lists(make_dataset, changes, message):
    root = make_dataset()
    msd(root, **changes)
    with pytest.raises(InputError, match=message):
        open_dataset(root)


def test_two_plain_folders(make_dataset, tmp_path):
    root = make_dataset(ending=".png", shape=(16, 16))
    (root / "dataset.json").unlink()
    for file in sorted((root / "labelsTr").iterdir()):
        volume = read_volume(file, kind="label")
        write_volume(file, volume.with_data(np.where(volume.data == 2, 255, volume.data)))
    dataset = open_dataset(root / "imagesTr", labels=root / "labelsTr")
    assert dataset.labels == {"background": 0, "label_1": 1, "label_255": 255}
    assert dataset.channels == ("image",)
    assert dataset.case("case_2").images == (root / "imagesTr/case_2_0000.png",)
    (root / "imagesTr").rename(root / "images")
    (root / "labelsTr").rename(root / "labels")
    assert open_dataset(root).labels == dataset.labels
    for file in sorted((root / "images").iterdir()):
        file.rename(file.with_name(file.name.replace("_0000", "")))
    assert [case.id for case in open_dataset(root).cases] == ["case_0", "case_1", "case_2"]
    describe(root, labels={"background": 0, "a": 1, "b": 255}, file_ending=".png")
    assert open_dataset(root).classes == ("background", "a", "b")
    (root / "labels/case_1.png").unlink()
    assert [problem.case for problem in check_dataset(root).problems] == ["case_1"]
    (root / "images/more.nii.gz").write_bytes(b"x")
    with pytest.raises(InputError, match="files of several formats"):
        open_dataset(root)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cases", "shape"),
    [("Dataset004_Hippocampus", 200, [36, 50, 35]), ("Dataset802_ShenzhenXray", 566, [256, 256])],
)
def test_real_datasets_are_sound(shared, name, cases, shape):
    result = check_dataset(shared / "data" / name)
    assert result.problems == []
    assert result.summary["training_cases"] == cases
    assert result.summary["shape"]["median"] == shape


def test_label_maps_of_two_plain_folders_are_read_once(make_dataset, tmp_path, monkeypatch):
    root = make_dataset()
    for old, new in (("imagesTr", "images"), ("labelsTr", "labels")):
        shutil.copytree(root / old, tmp_path / "plain" / new)
    for image in (tmp_path / "plain" / "images").iterdir():
        image.rename(image.with_name(image.name.replace("_0000", "")))
    read = []

    def counting(file, **options):
        read.append(file.name)
        return read_volume(file, **options)

    monkeypatch.setattr("lightm.datasets.discovery.read_volume", counting)
    first = open_dataset(tmp_path / "plain")
    assert sorted(read) == ["case_0.nii.gz", "case_1.nii.gz", "case_2.nii.gz"]
    assert open_dataset(tmp_path / "plain") == first
    assert len(read) == 3
    changed = read_volume(first.cases[1].label, kind="label")
    write_volume(first.cases[1].label, changed.with_data(changed.data + 40))
    assert set(open_dataset(tmp_path / "plain").values) - set(first.values) >= {40}
    assert read[3:] == ["case_1.nii.gz"]
