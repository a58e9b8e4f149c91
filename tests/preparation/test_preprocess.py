from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from lightm.datasets.discovery import open_dataset
from lightm.datasets.phantoms import phantom_case
from lightm.errors import InputError, LightMError
from lightm.images import limits
from lightm.images.io import read_volume, write_volume
from lightm.images.volume import Volume
from lightm.preparation import cache
from lightm.preparation.cache import default_cache_dir
from lightm.preparation.plan import ChannelNormalization, make_plan
from lightm.preparation.preprocess import preprocess_case, preprocess_dataset, to_class_indices
from lightm.preparation.resample import resample_image, resample_label, resampled_shape
from tests.helpers import describe


@pytest.fixture
def small(make_dataset):
    dataset = open_dataset(make_dataset())
    return dataset, make_plan(dataset)


def times(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in sorted(folder.rglob("*.npy"))}


def resampled(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    whole = tuple(slice(0, size) for size in shape)
    return resample_image(lambda start, stop: image[start:stop], image.shape, shape).read(whole)


def zoomed(image: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    """The same by SciPy, the whole at once; float32."""
    factors = [new / old for new, old in zip(shape, image.shape, strict=True)]
    return ndimage.zoom(image, factors, np.float32, order, mode="nearest", grid_mode=True)


def test_resampled_shapes_cover_the_same_space():
    assert resampled_shape((10, 20), (2, 1), (1, 2)) == (20, 10)
    assert resampled_shape((3, 3), (1, 1), (100, 0.999)) == (1, 3)


def test_an_equal_grid_changes_nothing():
    image = np.random.default_rng(0).random((3, 4, 5)).astype(np.float32)
    np.testing.assert_array_equal(resampled(image, (3, 4, 5)), image)
    label = np.zeros((3, 4), np.uint8)
    assert resample_label(label, (3, 4)) is label


def test_cubic_resampling_follows_a_smooth_function():
    def wave(size: int) -> np.ndarray:
        place = (np.arange(size) + 0.5) / size
        return (np.sin(4 * place)[:, None] * np.cos(3 * place)[None]).astype(np.float32)

    finer = resampled(wave(40), (60, 60))
    np.testing.assert_allclose(finer[5:-5, 5:-5], wave(60)[5:-5, 5:-5], atol=2e-4)
    assert finer.dtype == np.float32


def test_labels_keep_their_values_and_their_place():
    label = np.zeros((8, 8), np.uint8)
    label[2:6, 2:6] = 7
    label[3:5, 3:5] = 255
    finer = resample_label(label, (16, 16))
    assert finer.dtype == np.uint8
    assert set(np.unique(finer)) == {0, 7, 255}
    np.testing.assert_array_equal(finer == 255, np.kron(label == 255, np.ones((2, 2), bool)))
    np.testing.assert_array_equal(finer > 0, np.kron(label > 0, np.ones((2, 2), bool)))
    np.testing.assert_array_equal(resample_label(finer, (8, 8)), label)
    np.testing.assert_array_equal(resample_label(np.full((2, 2), 3, np.uint8), (3, 3)), np.full((3, 3), 3))


@pytest.mark.parametrize("shape", [(9, 31, 11), (30, 12, 25), (17, 20, 40)])
def test_labels_are_those_of_the_largest_linear_share(shape, monkeypatch):
    blobs = ndimage.gaussian_filter(np.random.default_rng(2).normal(size=(5, 17, 20, 23)), (0, 2, 2, 2))
    label = np.array([0, 1, 2, 7, 255], np.uint8)[blobs.argmax(0)]
    shares = np.stack([zoomed((label == value).astype(np.float32), shape, 1) for value in np.unique(label)])
    expected = np.unique(label)[shares.argmax(0)]
    found = resample_label(label, shape)
    np.testing.assert_array_equal(found, expected)
    monkeypatch.setattr("lightm.preparation.resample._SLAB_VOXELS", 900)
    np.testing.assert_array_equal(resample_label(label, shape), found)


@pytest.mark.parametrize("kind", ["liver", "vessels"])
def test_a_phantom_is_resampled_as_scipy_does(kind):
    image, label = phantom_case(kind, 0, size=48, seed=3)
    shape = (39, 61, 48)
    expected = zoomed(image.data.astype(np.float32), shape, 3)
    difference = np.abs(resampled(image.data, shape) - expected).max()
    assert difference <= 5e-7 * np.ptp(expected)  # rounded to float32 once per axis, and once by SciPy
    shares = [zoomed((label.data == value).astype(np.float32), shape, 1) for value in np.unique(label.data)]
    np.testing.assert_array_equal(resample_label(label.data, shape), np.argmax(shares, 0))


def test_normalisation_by_hand(make_dataset):
    schemes = [
        ChannelNormalization(scheme="zscore"),
        ChannelNormalization(scheme="ct", clip_low=0, clip_high=10, mean=5, std=2),
    ]
    plan = make_plan(open_dataset(make_dataset()))
    values = {"spatial_dims": 2, "spacing_mm": [1.0, 1.0], "channels": ["a", "b"], "normalization": schemes}

    def normalized(data: np.ndarray) -> np.ndarray:
        volume = Volume.from_spacing(data, (1, 1))
        return preprocess_case([volume, volume], None, plan.model_copy(update=values))[0]

    image = np.array([[-4.0, 1.0], [6.0, 40.0]], np.float32)
    result = normalized(image)
    np.testing.assert_allclose(result[0], (image - 10.75) / image.std(), rtol=1e-6)
    np.testing.assert_allclose(result[1], [[-2.5, -2.0], [0.5, 2.5]])
    assert not normalized(np.full((2, 2), 7, np.float32))[0].any()
    wild = np.random.default_rng(0).normal(1e6, 3e5, (20, 20)).astype(np.float32)
    assert abs(float(normalized(wild)[0].mean())) < 1e-6


def test_class_indices_of_values_that_skip():
    label = np.array([0, 3, 7, 9])
    np.testing.assert_array_equal(to_class_indices(label, (0, 3, 7), 9), [0, 1, 2, 255])
    with pytest.raises(InputError, match="label value 9 is not among"):
        to_class_indices(label, (0, 3, 7), None)


def test_a_case_is_turned_resampled_and_normalised(small):
    dataset, plan = small
    native = read_volume(dataset.cases[0].images[0])
    label = read_volume(dataset.cases[0].label, kind="label")
    image, classes = preprocess_case([native], label, plan)
    assert (image.shape, image.dtype, classes.dtype) == ((1, 6, 8, 10), np.float32, np.uint8)
    np.testing.assert_array_equal(classes, label.data)
    assert abs(float(image.mean())) < 1e-5
    affine = native.affine.copy()
    affine[0] *= -1
    affine[0, 3] = 9
    turned = [Volume(volume.data[:, :, ::-1], volume.spacing_mm, affine) for volume in (native, label)]
    again, classes_again = preprocess_case([turned[0]], turned[1], plan)
    np.testing.assert_array_equal(again, image)
    np.testing.assert_array_equal(classes_again, classes)
    finer, none = preprocess_case([native], None, plan.model_copy(update={"spacing_mm": [1.0, 1.0, 1.0]}))
    assert (finer.shape, none) == ((1, 12, 8, 10), None)


def test_cases_that_do_not_fit_the_plan(small):
    dataset, plan = small
    native = read_volume(dataset.cases[0].images[0])
    with pytest.raises(InputError, match="2 images, but the plan has 1 channels"):
        preprocess_case([native, native], None, plan)
    with pytest.raises(InputError, match="where the plan is 3D"):
        preprocess_case([Volume.from_spacing(native.data[0], (1, 1))], None, plan)
    with pytest.raises(InputError, match="do not lie in one place: shape"):
        preprocess_case([native], Volume.from_spacing(native.data[1:], (2, 1, 1)), plan)


def test_the_second_run_does_nothing(small, tmp_path, monkeypatch):
    dataset, plan = small
    first = preprocess_dataset(dataset, plan, tmp_path / "cache")
    before = times(tmp_path / "cache")
    assert len(before) == 6
    monkeypatch.setattr("lightm.preparation.preprocess.preprocess_case", None)  # called, it would fail
    assert preprocess_dataset(dataset, plan, tmp_path / "cache") == first
    assert times(tmp_path / "cache") == before
    assert [
        case.id for case in preprocess_dataset(dataset, plan, tmp_path / "cache", case_ids=["case_2", "case_0"])
    ] == [
        "case_2",
        "case_0",
    ]


def test_a_changed_file_redoes_its_case_and_a_touched_one_nothing(small, tmp_path):
    dataset, plan = small
    old = time.time() - 100  # older than the span in which hashes are not remembered
    for case in dataset.cases:
        os.utime(case.images[0], (old, old))
        os.utime(case.label, (old, old))
    first = preprocess_dataset(dataset, plan, tmp_path / "cache")
    before = times(tmp_path / "cache")
    os.utime(dataset.cases[0].images[0])
    volume = read_volume(dataset.cases[1].images[0])
    write_volume(dataset.cases[1].images[0], volume.with_data(volume.data[::-1]))
    second = preprocess_dataset(dataset, plan, tmp_path / "cache")
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False, True]
    assert {file: stamp for file, stamp in times(tmp_path / "cache").items() if file in before} == before
    assert len(times(tmp_path / "cache")) == 8


def test_hashes_are_remembered_for_files_that_rest(small, tmp_path, monkeypatch):
    dataset, plan = small
    old = time.time() - 100
    for case in dataset.cases:
        os.utime(case.images[0], (old, old))
        os.utime(case.label, (old, old))
    first = preprocess_dataset(dataset, plan, tmp_path / "cache")
    monkeypatch.setattr(cache, "file_hash", None)
    assert preprocess_dataset(dataset, plan, tmp_path / "cache") == first


def test_another_spacing_redoes_all_and_other_keys_nothing(small, tmp_path):
    dataset, plan = small
    first = preprocess_dataset(dataset, plan, tmp_path / "cache")
    other = preprocess_dataset(dataset, plan.model_copy(update={"batch_size": 7}), tmp_path / "cache")
    assert other == first
    finer = plan.model_copy(update={"spacing_mm": [1.0, 1.0, 1.0]})
    second = preprocess_dataset(dataset, finer, tmp_path / "cache", workers=2)
    assert not {case.image_path for case in first} & {case.image_path for case in second}
    assert second[0].label().shape == (12, 8, 10)
    assert first[0].label().shape == (6, 8, 10)


@pytest.mark.parametrize("moment", ["save", "savez", "rename"])
def test_killed_in_the_middle_nothing_torn_is_left(small, tmp_path, monkeypatch, moment):
    dataset, plan = small

    class Killed(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(cache.os if moment == "rename" else cache.np, moment, die)
        with pytest.raises(Killed):
            preprocess_dataset(dataset, plan, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.npy"))
    done = preprocess_dataset(dataset, plan, tmp_path / "cache")
    assert all(case.image().shape == (1, 6, 8, 10) for case in done)


def test_an_incomplete_folder_is_done_again(small, tmp_path):
    dataset, plan = small
    case = preprocess_dataset(dataset, plan, tmp_path / "cache")[0]
    case.label_path.unlink()
    assert preprocess_dataset(dataset, plan, tmp_path / "cache")[0].label().shape == (6, 8, 10)


def test_a_full_disk_is_told(small, tmp_path, monkeypatch):
    dataset, plan = small

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.np, "save", full)
    with pytest.raises(LightMError, match=r"case case_0 cannot be stored .*No space left"):
        preprocess_dataset(dataset, plan, tmp_path / "cache")


def test_foreground_and_meta_by_hand(small, tmp_path):
    dataset, plan = small
    case = preprocess_dataset(dataset, plan, tmp_path / "cache")[0]
    foreground = case.foreground()
    assert sorted(foreground) == [1, 2]
    np.testing.assert_array_equal(foreground[2], np.argwhere(case.label() == 2))
    assert len(foreground[1]) == 64 - 8
    assert case.meta["class_voxels"] == {"0": 416, "1": 56, "2": 8}
    assert case.meta["shape"] == [6, 8, 10]


def test_foreground_is_bounded(tmp_path):
    label = np.zeros((60, 60), np.uint8)
    label[:50] = 1
    label[55:] = 255
    case = cache.store(tmp_path / "x", "x", np.zeros((1, 60, 60), np.float32), label, {})
    places = case.foreground()[1]
    assert places.shape == (2000, 2)
    assert len(np.unique(places, axis=0)) == 2000
    assert (label[tuple(places.T)] == 1).all()
    assert list(case.foreground()) == [1]


def test_faults_name_the_case_and_cases_without_labels_are_told(small, tmp_path):
    dataset, plan = small
    volume = read_volume(dataset.cases[1].label, kind="label")
    write_volume(dataset.cases[1].label, volume.with_data(volume.data + 5))
    with pytest.raises(InputError, match=r"case_1\.nii\.gz: case case_1: label value 5"):
        preprocess_dataset(dataset, plan, tmp_path / "cache")
    case = cache.store(tmp_path / "y", "y", np.zeros((1, 4, 4), np.float32), None, {})
    assert case.label_path is None
    with pytest.raises(LightMError, match="case y has no label map"):
        case.label()


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTM_CACHE", str(tmp_path / "mine"))
    assert default_cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("LIGHTM_CACHE")
    assert default_cache_dir().name == "lightm" or "lightm" in default_cache_dir().parts


@pytest.mark.parametrize("unit", [1.0, 1e-9, 1e6])
def test_schemes_do_not_depend_on_the_unit_of_an_image(small, unit):
    """Diffusion in m2/s is no constant image."""
    _, plan = small
    data = np.random.default_rng(0).normal(2, 0.5, (6, 8, 8)).astype(np.float32)
    image = Volume.from_spacing(data * np.float32(unit), tuple(plan.spacing_mm))
    found, _ = preprocess_case([image], None, plan)
    assert abs(float(found.mean())) < 1e-3
    assert float(found.std()) == pytest.approx(1, abs=1e-3)
    flat, _ = preprocess_case([image.with_data(np.full_like(data, 3 * unit))], None, plan)
    assert not flat.any()


@pytest.mark.parametrize(
    ("channel", "scheme", "expected"),
    [
        ("noNorm", "none", lambda x: x),
        ("NoNorm ", "none", lambda x: x),
        ("rescale_to_0_1", "rescale_to_0_1", lambda x: (x - x.min()) / (x.max() - x.min())),
        ("rgb_to_0_1", "rgb_to_0_1", lambda x: x / 255),
        ("T1", "zscore", lambda x: (x - x.mean()) / x.std()),
    ],
)
def test_a_channel_s_name_chooses_its_normalization(make_dataset, channel, scheme, expected):
    root = make_dataset()
    describe(root, channel_names={"0": channel})
    dataset = open_dataset(root)
    plan = make_plan(dataset)
    assert plan.normalization[0].scheme == scheme
    image = read_volume(dataset.cases[0].images[0])
    plan = plan.model_copy(update={"spacing_mm": list(image.to_canonical().spacing_mm)})
    found, _ = preprocess_case([image], None, plan)
    np.testing.assert_allclose(found[0], expected(image.to_canonical().data.astype(np.float64)), rtol=1e-4, atol=1e-5)


def test_a_grid_that_no_memory_holds_is_refused_with_its_sizes(small, monkeypatch):
    _, plan = small
    coarse = Volume.from_spacing(np.zeros((40, 40, 40), np.int16), (500.0, 500.0, 500.0))
    with pytest.raises(InputError, match="at the plan's spacing of"):
        preprocess_case([coarse], None, plan)
    monkeypatch.setattr(limits, "available_bytes", lambda: 10_000_000)
    with pytest.raises(InputError, match=r"at the plan's spacing need .* GB of memory"):
        preprocess_case([Volume.from_spacing(np.zeros((20, 20, 20), np.int16), (20.0, 20.0, 20.0))], None, plan)


def test_a_cache_without_room_is_said_before_a_case_is_prepared(small, tmp_path, monkeypatch):
    dataset, plan = small
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(LightMError, match=r"case case_0 needs .* GB there once it is preprocessed.* LIGHTM_CACHE"):
        preprocess_dataset(dataset, plan, tmp_path / "cache")
