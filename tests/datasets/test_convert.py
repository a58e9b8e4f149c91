"""`lightm convert` on small made-up copies of the public downloads' layouts, sound and spoilt."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from lightm.cli import app
from lightm.datasets.check import check_dataset
from lightm.datasets.convert import convert_dataset
from lightm.datasets.discovery import open_dataset
from lightm.errors import InputError
from lightm.images.io import read_volume
from lightm.images.volume import geometry_difference

OBLIQUE = np.array([[-0.7, 0.1, 0.0, 11.0], [0.1, 0.7, 0.2, -7.0], [0.0, -0.2, 2.5, 40.0], [0, 0, 0, 1.0]])


def nifti(path: Path, data: np.ndarray, affine: np.ndarray = OBLIQUE) -> Path:
    """Write a NIfTI file past LightM's own writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(data, affine), path)
    return path


def png(path: Path, data: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(data).save(path)
    return path


def make_lits(root: Path, cases: int = 3, ending: str = ".nii") -> Path:
    """Volumes and segmentations over two batch folders, a volume without one for the test, and a stray file."""
    rng = np.random.default_rng(0)
    for number in range(cases):
        folder = root / f"Training Batch {1 + number % 2}"
        nifti(folder / f"volume-{number}{ending}", rng.integers(-1024, 1500, (7, 6, 5)).astype(np.int16))
        label = np.zeros((7, 6, 5), np.uint8)
        label[1:6, 1:5, 1:4], label[2:4, 2:4, 2] = 1, 2
        nifti(folder / f"segmentation-{number}{ending}", label)
    nifti(root / "Test" / f"test-volume-0{ending}", rng.integers(-1024, 1500, (5, 5, 5)).astype(np.int16))
    return root


def make_xrays(root: Path) -> Path:
    """Montgomery: two pictures with two masks each. Shenzhen: an RGB and a grey picture with a mask, one without."""
    rng = np.random.default_rng(1)
    left, right = np.zeros((12, 10), np.uint8), np.zeros((12, 10), np.uint8)
    left[2:9, 1:4], right[2:9, 6:9] = 255, 255
    for name, dtype in (("MCUCXR_0001_0", np.uint8), ("MCUCXR_0002_1", np.uint16)):
        picture = rng.integers(0, np.iinfo(dtype).max, (12, 10)).astype(dtype)
        png(root / f"MontgomerySet/CXR_png/{name}.png", picture)
        png(root / f"MontgomerySet/ManualMask/leftMask/{name}.png", left)
        png(root / f"MontgomerySet/ManualMask/rightMask/{name}.png", right)
    grey = rng.integers(0, 255, (12, 10)).astype(np.uint8)
    china = root / "ChinaSet_AllFiles"
    png(china / "CXR_png/CHNCXR_0001_0.png", np.stack([grey] * 3, -1))
    png(china / "CXR_png/CHNCXR_0002_0.png", grey)
    png(china / "CXR_png/CHNCXR_0003_1.png", grey)
    for number in (1, 2):
        png(china / f"mask/CHNCXR_000{number}_0_mask.png", left | right)
    return root


def make_msd(root: Path, channels: int = 2) -> Path:
    rng = np.random.default_rng(2)
    entries = []
    for number in (1, 2, 3):
        shape = (6, 5, 4, channels)[: 3 if channels == 1 else 4]
        nifti(root / f"imagesTr/prostate_0{number}.nii.gz", rng.normal(0, 9, shape).astype(np.float32))
        nifti(root / f"labelsTr/prostate_0{number}.nii.gz", rng.integers(0, 3, (6, 5, 4)).astype(np.uint8))
        (root / f"imagesTr/._prostate_0{number}.nii.gz").write_bytes(b"macOS")
        name = f"prostate_0{number}.nii.gz"
        entries.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    nifti(root / "imagesTs/prostate_09.nii.gz", rng.normal(0, 9, shape).astype(np.float32))
    content = {
        "name": "PROSTATE",
        "modality": {"0": "T2", "1": "ADC"} if channels == 2 else {"0": "T2"},
        "labels": {"0": "background", "1": "PZ", "2": "TZ"},
        "numTraining": 3,
        "training": entries,
        "test": ["./imagesTs/prostate_09.nii.gz"],
    }
    (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return root


def make_folder(root: Path) -> Path:
    rng = np.random.default_rng(3)
    for name in ("anna", "bert", "carl"):
        nifti(root / f"images/{name}.nii.gz", rng.normal(0, 9, (5, 6, 4)).astype(np.float32))
        nifti(root / f"labels/{name}.nii.gz", rng.choice([0, 1, 4], (5, 6, 4)).astype(np.int16))
    return root


MAKERS: dict[str, Callable[[Path], Path]] = {
    "lits": make_lits,
    "montgomery-shenzhen": make_xrays,
    "msd": make_msd,
    "folder": make_folder,
}


def description(out: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((out / "dataset.json").read_text(encoding="utf-8"))
    return content


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in ("src", "out", "lightm-cache"))


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("link", [False, True])
def test_every_layout_becomes_a_sound_data_set(kind: str, link: bool, tmp_path: Path) -> None:
    result = convert_dataset(kind, MAKERS[kind](tmp_path / "src"), tmp_path / "out", link=link)
    checked = check_dataset(tmp_path / "out")
    assert checked.problems == []
    assert len(open_dataset(tmp_path / "out").cases) == result.train
    assert left_over(tmp_path) == []


def test_lits_is_copied_byte_for_byte_with_its_names(tmp_path: Path) -> None:
    source = make_lits(tmp_path / "src")
    (source / "Test" / "notes.nii").write_bytes(b"x")
    result = convert_dataset("lits", source, tmp_path / "out")
    assert (result.train, result.test) == (3, 1)
    assert "notes.nii" in result.remarks[0]
    content = description(tmp_path / "out")
    assert content["channel_names"] == {"0": "CT"}
    assert content["labels"] == {"background": 0, "liver": 1, "tumour": 2}
    assert content["file_ending"] == ".nii"
    assert content["numTraining"] == 3
    for number in range(3):
        folder = source / f"Training Batch {1 + number % 2}"
        for kind, copy in (("volume", f"imagesTr/lits_00{number}_0000"), ("segmentation", f"labelsTr/lits_00{number}")):
            assert (tmp_path / "out" / f"{copy}.nii").read_bytes() == (folder / f"{kind}-{number}.nii").read_bytes()
    assert (tmp_path / "out/imagesTs/lits_test_000_0000.nii").is_file()


def test_lits_of_both_formats_is_packed_without_loss(tmp_path: Path) -> None:
    source = make_lits(tmp_path / "src")
    nifti(source / "more/volume-7.nii.gz", np.ones((4, 4, 4), np.int16))
    nifti(source / "more/segmentation-7.nii.gz", np.ones((4, 4, 4), np.uint8))
    convert_dataset("lits", source, tmp_path / "out")
    packed = gzip.decompress((tmp_path / "out/imagesTr/lits_001_0000.nii.gz").read_bytes())
    assert packed == (source / "Training Batch 2/volume-1.nii").read_bytes()


def test_xrays_get_one_mask_of_both_lungs_and_pictures_without_are_named(tmp_path: Path) -> None:
    source = make_xrays(tmp_path / "src")
    result = convert_dataset("montgomery-shenzhen", source, tmp_path / "out")
    assert (result.train, result.test) == (4, 0)
    assert [remark for remark in result.remarks if "no mask" in remark and "CHNCXR_0003_1.png" in remark]
    assert description(tmp_path / "out")["labels"] == {"background": 0, "lung": 1}
    expected = np.zeros((12, 10), np.uint8)
    expected[2:9, 1:4], expected[2:9, 6:9] = 1, 1
    for case in ("MCUCXR_0001_0", "MCUCXR_0002_1", "CHNCXR_0001_0", "CHNCXR_0002_0"):
        assert (read_volume(tmp_path / f"out/labelsTr/{case}.png", kind="label").data == expected).all()
    sixteen = read_volume(tmp_path / "out/imagesTr/MCUCXR_0002_1_0000.png").data
    assert (sixteen == np.array(Image.open(source / "MontgomerySet/CXR_png/MCUCXR_0002_1.png"))).all()
    colour = np.array(Image.open(source / "ChinaSet_AllFiles/CXR_png/CHNCXR_0001_0.png"))
    with Image.open(tmp_path / "out/imagesTr/CHNCXR_0001_0_0000.png") as grey:
        assert grey.mode == "L"
        assert (np.array(grey) == colour[..., 0]).all()


@pytest.mark.parametrize("part", ["MontgomerySet", "ChinaSet_AllFiles"])
def test_either_set_alone_is_enough(part: str, tmp_path: Path) -> None:
    source = make_xrays(tmp_path / "src") / part
    assert convert_dataset("montgomery-shenzhen", source, tmp_path / "out").train == 2


def test_modalities_of_a_4d_file_become_channels_with_the_same_voxels_and_place(tmp_path: Path) -> None:
    source = make_msd(tmp_path / "src")
    result = convert_dataset("msd", source, tmp_path / "out")
    assert (result.train, result.test) == (3, 1)
    assert description(tmp_path / "out")["channel_names"] == {"0": "T2", "1": "ADC"}
    assert description(tmp_path / "out")["labels"] == {"background": 0, "PZ": 1, "TZ": 2}
    for part, case in (("Tr", "prostate_02"), ("Ts", "prostate_09")):
        whole = nibabel.load(source / f"images{part}/{case}.nii.gz")
        for channel in (0, 1):
            image = nibabel.load(tmp_path / f"out/images{part}/{case}_000{channel}.nii.gz")
            assert image.shape == (6, 5, 4)
            assert (np.asarray(image.dataobj) == np.asarray(whole.dataobj)[..., channel]).all()
            assert (image.affine == whole.affine).all()
            assert image.header["sform_code"] == whole.header["sform_code"]


def test_scaled_4d_files_keep_their_scale(tmp_path: Path) -> None:
    source = make_msd(tmp_path / "src")
    path = source / "imagesTr/prostate_01.nii.gz"
    image = nibabel.Nifti1Image(np.arange(240, dtype=np.float64).reshape(6, 5, 4, 2) / 7, OBLIQUE)
    image.set_data_dtype(np.int16)  # nibabel stores whole numbers and a slope
    nibabel.save(image, path)
    convert_dataset("msd", source, tmp_path / "out")
    part = nibabel.load(tmp_path / "out/imagesTr/prostate_01_0001.nii.gz")
    assert part.get_data_dtype() == np.int16
    assert (part.get_fdata() == nibabel.load(path).get_fdata()[..., 1]).all()


def test_one_modality_of_the_decathlon_is_copied(tmp_path: Path) -> None:
    source = make_msd(tmp_path / "src", channels=1)
    convert_dataset("msd", source, tmp_path / "out")
    copy = tmp_path / "out/imagesTr/prostate_01_0000.nii.gz"
    assert copy.read_bytes() == (source / "imagesTr/prostate_01.nii.gz").read_bytes()


def test_two_folders_keep_values_and_geometry(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "src")
    convert_dataset("folder", source / "images", tmp_path / "out", labels=source / "labels")
    assert description(tmp_path / "out")["labels"] == {"background": 0, "label_1": 1, "label_4": 4}
    before, after = read_volume(source / "labels/bert.nii.gz"), read_volume(tmp_path / "out/labelsTr/bert.nii.gz")
    assert (before.data == after.data).all()
    assert geometry_difference(before, after) is None


# ---- what is wrong ------------------------------------------------------------------------------------------


def _shifted(root: Path) -> None:
    path = root / "Training Batch 1/segmentation-0.nii"
    affine = OBLIQUE.copy()
    affine[0, 3] += 5
    nifti(path, np.asarray(nibabel.load(path).dataobj).copy(), affine)


FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "segmentation missing": (
        "lits",
        lambda r: (r / "Training Batch 2/segmentation-1.nii").unlink(),
        "volume-1.nii: has",
    ),
    "volume missing": ("lits", lambda r: (r / "Training Batch 2/volume-1.nii").unlink(), "segmentation-1.nii: has no"),
    "number twice": (
        "lits",
        lambda r: nifti(r / "Again/volume-1.nii", np.ones((4, 4, 4), np.int16)),
        "volume 1 exists twice",
    ),
    "geometry": ("lits", _shifted, "segmentation-0.nii: does not fit its image.*--trust-image-geometry"),
    "shape": (
        "lits",
        lambda r: nifti(r / "Training Batch 2/segmentation-1.nii", np.ones((4, 4, 4), np.uint8)),
        r"segmentation-1.nii: does not fit its image: shape",
    ),
    "value": (
        "lits",
        lambda r: nifti(r / "Training Batch 2/segmentation-1.nii", np.full((7, 6, 5), 3, np.uint8)),
        "segmentation-1.nii: holds the value 3",
    ),
    "truncated": (
        "lits",
        lambda r: (r / "Training Batch 2/volume-1.nii").write_bytes(b"abc"),
        "volume-1.nii: not a NIfTI file",
    ),
    "one lung": (
        "montgomery-shenzhen",
        lambda r: (r / "MontgomerySet/ManualMask/leftMask/MCUCXR_0001_0.png").unlink(),
        r"MCUCXR_0001_0.png: has a mask of the right lung but none of the left; add .*leftMask",
    ),
    "grey mask": (
        "montgomery-shenzhen",
        lambda r: png(
            r / "ChinaSet_AllFiles/mask/CHNCXR_0001_0_mask.png", np.arange(120, dtype=np.uint8).reshape(12, 10)
        ),
        "CHNCXR_0001_0_mask.png: a mask holds 0 and one other value",
    ),
    "mask of another size": (
        "montgomery-shenzhen",
        lambda r: png(r / "ChinaSet_AllFiles/mask/CHNCXR_0001_0_mask.png", np.zeros((5, 5), np.uint8)),
        "CHNCXR_0001_0_mask.png: the mask has shape",
    ),
    "listed file missing": (
        "msd",
        lambda r: (r / "labelsTr/prostate_02.nii.gz").unlink(),
        "labelsTr/prostate_02.nii.gz",
    ),
    "fewer modalities": (
        "msd",
        lambda r: nifti(r / "imagesTr/prostate_02.nii.gz", np.ones((6, 5, 4, 1), np.float32)),
        "prostate_02.nii.gz: has shape .* names 2",
    ),
    "label without image": ("folder", lambda r: (r / "images/bert.nii.gz").unlink(), "bert.*a label without an image"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_by_file_and_nothing_is_written_unless_the_case_is_left_out(
    fault: str, tmp_path: Path
) -> None:
    kind, spoil, message = FAULTS[fault]
    source = MAKERS[kind](tmp_path / "src")
    whole = convert_dataset(kind, source, tmp_path / "whole").train
    spoil(source)
    with pytest.raises(InputError, match=f"(?s){message}"):
        convert_dataset(kind, source, tmp_path / "out")
    assert left_over(tmp_path) == ["whole"]
    assert not (tmp_path / "out").exists()
    result = convert_dataset(kind, source, tmp_path / "out", skip_faulty=True)
    assert result.train == whole - 1
    assert [problem for problem in result.problems if problem.severity == "error"]
    assert check_dataset(tmp_path / "out").ok
    assert len(list((tmp_path / "out/labelsTr").iterdir())) == whole - 1


def test_a_label_in_the_wrong_place_can_be_given_its_images(tmp_path: Path) -> None:
    source = make_lits(tmp_path / "src")
    _shifted(source)
    convert_dataset("lits", source, tmp_path / "out", trust_image_geometry=True)
    label = read_volume(tmp_path / "out/labelsTr/lits_000.nii")
    assert geometry_difference(label, read_volume(tmp_path / "out/imagesTr/lits_000_0000.nii")) is None
    assert (label.data == read_volume(source / "Training Batch 1/segmentation-0.nii").data).all()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("lits", "is this LiTS"),
        ("montgomery-shenzhen", "no folder CXR_png"),
        ("msd", "dataset.json"),
        ("folder", "images and labels"),
        ("lit", "did you mean 'lits'"),
    ],
)
def test_a_folder_of_something_else_is_refused(kind: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    with pytest.raises(InputError, match=message):
        convert_dataset(kind, tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_targets(tmp_path: Path) -> None:
    source = make_lits(tmp_path / "src")
    out = tmp_path / "out"
    with pytest.raises(InputError, match="no such folder"):
        convert_dataset("lits", tmp_path / "nowhere", out)
    with pytest.raises(InputError, match="inside the folder"):
        convert_dataset("lits", source, source / "out")
    with pytest.raises(InputError, match="is or holds"):
        convert_dataset("lits", source, tmp_path)
    with pytest.raises(InputError, match="belongs to the layout 'folder'"):
        convert_dataset("lits", source, out, labels=source)
    out.mkdir()
    convert_dataset("lits", source, out)  # an empty folder is no hindrance
    with pytest.raises(InputError, match="--overwrite"):
        convert_dataset("lits", source, out)
    (source / "Training Batch 2/segmentation-1.nii").unlink()
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    with pytest.raises(InputError, match="segmentation-1"):
        convert_dataset("lits", source, out, overwrite=True)
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before
    assert convert_dataset("lits", source, out, overwrite=True, skip_faulty=True).train == 2
    assert not (out / "labelsTr/lits_001.nii").exists()
    assert left_over(tmp_path) == []
    other = tmp_path / "src2"
    other.mkdir()
    (other / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="no data set to replace"):
        convert_dataset("lits", source, other, overwrite=True)


def test_the_command_says_what_it_left_out(tmp_path: Path) -> None:
    source = make_xrays(tmp_path / "src")
    done = CliRunner().invoke(app, ["convert", "montgomery-shenzhen", str(source), str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0
    content = json.loads(done.stdout)
    assert (content["train"], content["test"]) == (4, 0)
    assert "CHNCXR_0003_1" in content["remarks"][0]
    again = CliRunner().invoke(app, ["convert", "montgomery-shenzhen", str(source), str(tmp_path / "out")])
    assert isinstance(again.exception, InputError)
