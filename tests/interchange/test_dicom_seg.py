"""DICOM-SEG: read back voxel for voxel by highdicom and by pydicom alone, with what it says of its source."""

from __future__ import annotations

import json
import logging
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightm.cli import main
from lightm.errors import InputError
from lightm.images.io import read_volume
from lightm.images.volume import Volume, geometry_difference
from lightm.interchange.dicom_seg import cielab, write_dicom_seg
from lightm.interchange.segment_codes import TISSUE, segment_code
from lightm.nets.folder import save_model
from lightm.nets.presets import create

from ..images.dicom_made import CT, FRAME_OF_REFERENCE, SERIES, STUDY, stored_pixels, write_ct, write_enhanced_mr
from ..inference.conftest import make_plan
from ..inference.factories import PlanMaker

pydicom = pytest.importorskip("pydicom")
highdicom = pytest.importorskip("highdicom")

__all__ = ["make_plan"]

CLASSES = {"background": 0, "liver": 1, "liver tumour": 3, "left lung": 7, "gizmo": 9}


def random_labels(volume: Volume, values: list[int], *, empty: tuple[int, ...] = ()) -> Volume:
    data = np.random.default_rng(5).choice(np.array(values, np.uint8), volume.shape)
    data[list(empty)] = 0
    return volume.with_data(data)


def by_pydicom(file: Path, affine: np.ndarray, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Masks by segment label from the frames' own positions, without any help of the writer or highdicom."""
    data = pydicom.dcmread(file)
    names = {int(item.SegmentNumber): str(item.SegmentLabel) for item in data.SegmentSequence}
    masks = {name: np.zeros(shape, bool) for name in names.values()}
    pixels = np.asarray(data.pixel_array).reshape(-1, *shape[1:])
    to_index = np.linalg.inv(affine) @ np.diag([-1.0, -1.0, 1.0, 1.0])
    for frame, groups in zip(pixels, data.PerFrameFunctionalGroupsSequence, strict=True):
        place = [float(v) for v in groups.PlanePositionSequence[0].ImagePositionPatient]
        x, y, z, _ = to_index @ [*place, 1.0]
        np.testing.assert_allclose([x, y, z], [0, 0, round(z)], atol=1e-3)
        holder = groups if "SegmentIdentificationSequence" in groups else data.SharedFunctionalGroupsSequence[0]
        name = names[int(holder.SegmentIdentificationSequence[0].ReferencedSegmentNumber)]
        masks[name][round(z)] |= frame.astype(bool)
    return masks


def assert_masks(file: Path, labels: Volume, classes: dict[str, int]) -> Any:
    masks = by_pydicom(file, labels.affine, labels.shape)
    wanted = {name: value for name, value in classes.items() if value}
    assert list(masks) == sorted(wanted, key=lambda name: wanted[name])
    for name, value in wanted.items():
        assert np.array_equal(masks[name], labels.data == value)
    return highdicom.seg.segread(file)


def test_regions_are_segments_that_overlap(tmp_path: Path) -> None:
    write_ct(tmp_path / "ct", stored_pixels((6, 6, 7)))
    labels = random_labels(read_volume(tmp_path / "ct"), [0, 1, 2, 3], empty=(1,))
    regions = {"whole tumour": (1, 2, 3), "tumour core": (2, 3), "enhancing tumour": (3,)}
    file = write_dicom_seg(tmp_path / "a.seg.dcm", labels, tmp_path / "ct", regions)
    masks = by_pydicom(file, labels.affine, labels.shape)
    assert list(masks) == list(regions)
    for name, values in regions.items():
        assert np.array_equal(masks[name], np.isin(labels.data, values))
    with pytest.raises(InputError, match="values \\[3\\] that no class has"):
        write_dicom_seg(tmp_path / "b.seg.dcm", labels, tmp_path / "ct", {"whole": (1, 2), "core": (2,)})


def test_round_trip_of_a_made_series(tmp_path: Path) -> None:
    write_ct(tmp_path / "ct", stored_pixels((6, 6, 7)))
    image = read_volume(tmp_path / "ct")
    labels = random_labels(image, [0, 1, 3, 7], empty=(0, 4))
    file = write_dicom_seg(tmp_path / "out" / "a.seg.dcm", labels, tmp_path / "ct", CLASSES, model="lightm-small")
    segmentation = assert_masks(file, labels, CLASSES)
    # highdicom, asked by the source's instances, in the order of the stack
    uids = [f"{SERIES}.{z + 1}" for z in range(6)]
    stacked = segmentation.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    for number, value in enumerate((1, 3, 7, 9)):
        assert np.array_equal(stacked[..., number], labels.data == value)
    assert segmentation.NumberOfFrames == 3 * 4  # slices 0 and 4 and the class without voxels have no frame
    assert segmentation.SegmentationType == "BINARY"
    assert (segmentation.StudyInstanceUID, segmentation.FrameOfReferenceUID) == (STUDY, FRAME_OF_REFERENCE)
    assert segmentation.PatientID == "P1"
    assert segmentation.SeriesInstanceUID != SERIES
    (series,) = segmentation.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == SERIES
    referenced = {
        (item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID) for item in series.ReferencedInstanceSequence
    }
    assert referenced == {(CT, uid) for uid in uids}
    liver, tumour, lung, gizmo = segmentation.SegmentSequence
    assert liver.SegmentedPropertyTypeCodeSequence[0].CodeValue == "10200004"
    assert tumour.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Neoplasm"
    assert tumour.AnatomicRegionSequence[0].CodeMeaning == "Liver"
    side = lung.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0]
    assert side.CodeMeaning == "Left"
    assert gizmo.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Tissue"
    assert len({tuple(item.RecommendedDisplayCIELabValue) for item in segmentation.SegmentSequence}) == 4
    algorithm = liver.SegmentationAlgorithmIdentificationSequence[0]
    assert algorithm.AlgorithmName == liver.SegmentAlgorithmName == "LightM lightm-small"
    assert algorithm.AlgorithmFamilyCodeSequence[0].CodeMeaning == "Artificial Intelligence"
    measures = segmentation.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    steps = [float(measures.SpacingBetweenSlices), *(float(v) for v in measures.PixelSpacing)]
    np.testing.assert_allclose(steps, [2.5, 0.8, 0.7], rtol=1e-6)
    again = write_dicom_seg(tmp_path / "out" / "b.seg.dcm", labels, tmp_path / "ct", CLASSES)
    assert pydicom.dcmread(again).SOPInstanceUID != segmentation.SOPInstanceUID


def test_multi_frame_source_and_empty_map(tmp_path: Path) -> None:
    source = write_enhanced_mr(tmp_path / "mr", stored_pixels(), [3, 0, 4, 1, 2])
    labels = random_labels(read_volume(source), [0, 1, 3], empty=(2,))
    segmentation = assert_masks(write_dicom_seg(tmp_path / "a.dcm", labels, source, CLASSES), labels, CLASSES)
    frames = segmentation.get_pixels_by_source_frame(
        f"{SERIES}.9", list(range(1, 6)), assert_missing_frames_are_empty=True, combine_segments=True
    )
    assert np.array_equal(frames[np.argsort([3, 0, 4, 1, 2])], np.array([0, 1, 0, 2])[labels.data])
    none = labels.with_data(np.zeros_like(labels.data))
    assert_masks(write_dicom_seg(tmp_path / "b.dcm", none, source, CLASSES), none, CLASSES)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    write_ct(tmp_path / "ct", stored_pixels())
    image = read_volume(tmp_path / "ct")
    labels = random_labels(image, [0, 1])
    moved = Volume(labels.data, image.spacing_mm, image.affine + np.eye(4, k=3) * 4)

    def refused(
        message: str, volume: Volume, classes: dict[str, int] = CLASSES, source: Path = tmp_path / "ct"
    ) -> None:
        with pytest.raises(InputError, match=message):
            write_dicom_seg(tmp_path / "out.dcm", volume, source, classes)
        assert not (tmp_path / "out.dcm").exists()

    refused("does not lie on this series: same shape and spacing, but affines", moved)
    refused(r"values \[1\] that no class has; the classes have \[2\]", labels, {"liver": 2})
    refused("at least one class beside the background", labels, {"background": 0})
    write_ct(tmp_path / "bare", stored_pixels(), change=lambda z, data: delattr(data, "FrameOfReferenceUID"))
    refused("FrameOfReferenceUID is missing", labels, source=tmp_path / "bare")


def test_blanked_identifiers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def blank(z: int, data: Any) -> None:
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"):
            setattr(data, keyword, "")
        del data.PatientID, data.PatientName

    write_ct(tmp_path / "ct", stored_pixels(), change=blank)
    labels = random_labels(read_volume(tmp_path / "ct"), [0, 1])
    with caplog.at_level(logging.WARNING, "lightm.interchange"):
        file = write_dicom_seg(tmp_path / "a.dcm", labels, tmp_path / "ct", {"liver": 1})
    assert "StudyInstanceUID and SeriesInstanceUID missing" in caplog.text
    segmentation = assert_masks(file, labels, {"liver": 1})
    other = pydicom.dcmread(write_dicom_seg(tmp_path / "b.dcm", labels, tmp_path / "ct", {"liver": 1}))
    assert other.StudyInstanceUID == segmentation.StudyInstanceUID != ""
    (series,) = segmentation.ReferencedSeriesSequence
    assert series.ReferencedInstanceSequence[0].ReferencedSOPInstanceUID.startswith(SERIES)


def test_codes_are_those_of_the_standard() -> None:
    """Every code that a name can get is in pydicom's copy of DICOM PS3.16, with this meaning."""
    from pydicom.sr._concepts_dict import concepts

    from lightm.interchange import segment_codes as table

    known: dict[str, set[str]] = {}
    for entries in concepts["SCT"].values():
        for value, (meaning, *_) in entries.items():
            known.setdefault(value, set()).add(meaning.lower())
    codes = [code for _, code in (*table._FINDINGS, *table._VESSELS, *table._ORGANS)]
    for value, meaning in [*codes, *table._SIDES.values(), table.ANATOMY, table.ABNORMAL, table.TISSUE]:
        assert any(one.startswith(meaning.lower()) for one in known[value]), (value, meaning)


@pytest.mark.parametrize(
    ("name", "kind", "region", "side"),
    [
        ("liver", "Liver", None, None),
        ("Liver_Tumor", "Neoplasm", "Liver", None),
        ("hepatic-vessels", "Blood Vessel", "Liver", None),
        ("portalVein", "Portal vein", None, None),
        ("airway", "Airway structure", None, None),
        ("right_lung", "Lung", None, "Right"),
        ("left atrium", "Left atrium", None, None),
        ("hippocampus anterior", "Hippocampus", None, None),
        ("kidney cyst left", "Cyst", "Kidney", "Left"),
        ("delivery", TISSUE[1], None, None),
        ("1", TISSUE[1], None, None),
    ],
)
def test_names_and_codes(name: str, kind: str, region: str | None, side: str | None) -> None:
    code = segment_code(name)
    assert code.kind[1] == kind
    assert (code.region and code.region[1]) == region
    assert (code.side and code.side[1]) == side


def test_colours() -> None:
    assert cielab((255, 255, 255)) == [65535, 32896, 32896]
    assert cielab((0, 0, 0)) == [0, 32896, 32896]
    # sRGB red in CIELab under D50 is (54.29, 80.80, 69.89).
    lab = np.array(cielab((255, 0, 0))) * [100, 255, 255] / 65535 - [0, 128, 128]
    np.testing.assert_allclose(lab, [54.29, 80.80, 69.89], atol=0.02)


def lightm(*arguments: Path | str) -> int:
    """Run the command line and return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightm", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
    return int(left.value.code or 0)


@pytest.fixture
def model(make_plan: PlanMaker, tmp_path: Path) -> Path:
    """A model folder with a tiny network of random weights."""
    plan = make_plan((2.5, 0.8, 0.8), (8, 8, 8), labels={"background": 0, "liver": 1, "liver tumour": 2})
    torch.manual_seed(0)
    described = {
        "name": "lightm-small", "spatial_dims": 3, "in_channels": 1, "out_channels": 3, "options": {"base_channels": 8},
    }  # fmt: skip
    network = create("lightm-small", spatial_dims=3, in_channels=1, out_channels=3, base_channels=8)
    return save_model(
        tmp_path / "model", network=described, state_dict=network.state_dict(), plan=plan.model_dump(mode="json"),
        training={},
    )  # fmt: skip


@pytest.mark.slow
def test_predict_from_the_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ct(tmp_path / "in" / "anna" / "ct", stored_pixels())
    write_ct(tmp_path / "in" / "bert", stored_pixels(seed=1))
    write_ct(tmp_path / "in" / "bert", stored_pixels((4, 6, 7), seed=2), series=SERIES + "7", prefix="b")
    out = tmp_path / "out"
    assert lightm("predict", "-i", tmp_path / "in", "-o", out, "-m", model, "--dicom-seg") == 0
    names = ["anna_ct", f"bert_{SERIES}", f"bert_{SERIES}7"]
    wanted = [*(f"{name}.nii.gz" for name in names), *(f"{name}.seg.dcm" for name in names), "prediction.json"]
    assert sorted(path.name for path in out.iterdir()) == sorted(wanted)
    image, labels = read_volume(tmp_path / "in" / "anna" / "ct"), read_volume(out / "anna_ct.nii.gz", kind="label")
    assert geometry_difference(image, labels) is None
    assert len(np.unique(labels.data)) > 1  # random weights, not one class
    assert_masks(out / "anna_ct.seg.dcm", labels, {"liver": 1, "liver tumour": 2})
    record = json.loads((out / "prediction.json").read_text())
    assert record["cases"][0]["more"] == ["anna_ct.seg.dcm"]
    # One series of two, chosen; what the last run wrote is removed, its segmentations too.
    chosen = f"{tmp_path / 'in' / 'bert'}::{SERIES}7"
    assert lightm("predict", "-i", chosen, "-o", out, "-m", model, "--overwrite") == 0
    assert sorted(path.name for path in out.iterdir()) == ["bert.nii.gz", "prediction.json"]
    assert read_volume(out / "bert.nii.gz", kind="label").shape == (4, 6, 7)
    capsys.readouterr()
    assert lightm("predict", "-i", out / "bert.nii.gz", "-o", tmp_path / "no", "-m", model, "--dicom-seg") == 2
    assert "not a DICOM series, which a DICOM-SEG must reference" in capsys.readouterr().err


def test_round_trip_of_a_real_series(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "dicom" / "totalseg_ct"
    image = read_volume(folder)
    data = np.zeros(image.shape, np.uint8)
    data[image.data > 100] = 1
    data[image.data < -500] = 2
    data[:3] = 0
    labels = image.with_data(data)
    file = write_dicom_seg(tmp_path / "a.seg.dcm", labels, folder, {"bone": 1, "lung": 2})
    segmentation = assert_masks(file, labels, {"bone": 1, "lung": 2})
    sources = [pydicom.dcmread(path).file_meta.MediaStorageSOPInstanceUID for path in sorted(folder.iterdir())]
    stacked = segmentation.get_pixels_by_source_instance(
        sources, assert_missing_frames_are_empty=True, combine_segments=True
    )
    assert np.array_equal(stacked[::-1], data)


def below(dataset: pydicom.Dataset, path: list[str]) -> list[pydicom.Dataset]:
    """The items at the end of a path of sequences."""
    items = [dataset]
    for name in path:
        items = [item for parent in items if name in parent for item in parent[name].value]
    return items


@pytest.mark.parametrize("kind", ["made", "real"])
def test_what_the_standard_demands_is_there(tmp_path: Path, request: pytest.FixtureRequest, kind: str) -> None:
    """DICOM's own tables, as highdicom packs them: mandatory modules (PS3.3 A.51) and their attributes of type 1, 2."""
    if kind == "real":
        folder = request.getfixturevalue("shared") / "data" / "dicom" / "totalseg_ct"
    else:
        folder = tmp_path / "ct"
        write_ct(folder, stored_pixels())
    image = read_volume(folder)
    labels = image.with_data((image.data > np.median(image.data)).astype(np.uint8))
    file = write_dicom_seg(tmp_path / "a.seg.dcm", labels, folder, {"liver": 1, "lung": 2})
    tables = resources.files("highdicom") / "_standard"
    if not (tables / "module_attribute_map.json").is_file():
        pytest.skip("this highdicom keeps the standard's tables elsewhere")
    modules = json.loads((tables / "iod_module_map.json").read_text())["segmentation"]
    attributes = json.loads((tables / "module_attribute_map.json").read_text())
    dataset = pydicom.dcmread(file)
    looked_at = 0
    for module in modules:
        for attribute in attributes[module["key"]] if module["usage"] == "M" else []:
            name, path = attribute["keyword"], attribute["path"]
            if attribute["type"] not in ("1", "2") or (path and path[-1].endswith("FunctionalGroupsSequence")):
                continue  # functional groups are either shared or each frame's: below
            for item in below(dataset, path):
                looked_at += 1
                assert name in item, (module["key"], path, name)
                assert attribute["type"] == "2" or not item[name].is_empty, (module["key"], path, name)
    assert looked_at > 100
    shared_groups = dataset.SharedFunctionalGroupsSequence[0]
    for name in ("PixelMeasures", "PlanePosition", "PlaneOrientation", "FrameContent", "SegmentIdentification"):
        frames = dataset.PerFrameFunctionalGroupsSequence
        assert f"{name}Sequence" in shared_groups or all(f"{name}Sequence" in frame for frame in frames), name


def test_every_value_is_valid_for_its_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ct(tmp_path / "ct", stored_pixels())
    image = read_volume(tmp_path / "ct")
    labels = image.with_data((image.data > np.median(image.data)).astype(np.uint8))
    file = write_dicom_seg(tmp_path / "a.seg.dcm", labels, tmp_path / "ct", {"liver": 1})
    monkeypatch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.RAISE)
    dataset = pydicom.dcmread(file)
    assert sum(1 for element in dataset.iterall() if element.value is not None) > 200
    pydicom.dataset.validate_file_meta(dataset.file_meta)
