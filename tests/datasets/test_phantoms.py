"""Phantoms: the same seed gives the same data, the layout is nnU-Net's, and the task is hard but not hopeless."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from lightm.datasets.phantoms import KINDS, make_phantoms, phantom_case
from lightm.datasets.phantoms.shapes import (
    add_tube,
    centred_axis,
    ellipsoid,
    empty_distance,
    mesh,
    smooth_field,
    spline_curve,
)
from lightm.errors import InputError
from lightm.images.io import channel_paths, read_volume
from lightm.images.volume import Volume
from lightm.labels import each_value

SIZE = {"liver": 64, "vessels": 80, "xray": 128, "brain": 48}
CLASSES = {"liver": 2, "vessels": 3, "xray": 1, "brain": 3}
CHANNELS = {"xray": ["xray"], "brain": ["FLAIR", "T1w", "T1gd", "T2w"]}


@pytest.fixture(scope="module")
def livers() -> list[tuple[Volume, Volume]]:
    return [phantom_case("liver", i, size=64, seed=5) for i in range(12)]


@pytest.fixture(scope="module")
def chests() -> list[tuple[Volume, Volume]]:
    return [phantom_case("vessels", i, size=80, seed=5) for i in range(3)]


def dataset_bytes(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*") if p.is_file()}


def best_threshold_dice(cases: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Return the best Dice that one interval of intensities reaches on all cases together."""
    edges = np.arange(-250, 450, 4)
    everything, wanted = (np.zeros(len(edges) - 1) for _ in range(2))
    for image, target in cases:
        everything += np.histogram(image, edges)[0]
        wanted += np.histogram(image[target], edges)[0]
    chosen = np.concatenate([[0], np.cumsum(everything)])
    hit = np.concatenate([[0], np.cumsum(wanted)])
    both = 2 * (hit[None] - hit[:, None])
    return float(np.max(both / (np.maximum(chosen[None] - chosen[:, None], 0) + wanted.sum())))


# ---------------------------------------------------------------- layout and determinism


@pytest.mark.parametrize("kind", KINDS)
def test_layout_is_nnunet_raw(kind: str, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    size = SIZE[kind] // 2
    out = make_phantoms(kind, tmp_path / "D", cases=2, size=size, seed=1, progress=lambda *step: seen.append(step))
    ending = ".png" if kind == "xray" else ".nii.gz"
    names = [f"{kind}_000", f"{kind}_001"]
    number = "" if kind == "brain" else "_0000"
    assert sorted(dataset_bytes(out)) == sorted(
        ["dataset.json"] + [f"imagesTr/{n}{number}{ending}" for n in names] + [f"labelsTr/{n}{ending}" for n in names]
    )
    info = json.loads((out / "dataset.json").read_text())
    assert list(info["channel_names"].values()) == CHANNELS.get(kind, ["CT"])
    assert (info["numTraining"], info["file_ending"]) == (2, ending)
    values = {one for value in info["labels"].values() for one in each_value(value)}
    assert sorted(values) == list(range(CLASSES[kind] + 1))
    assert info["labels"]["background"] == 0
    assert "synthetic" in info["description"].lower()
    assert seen == [("phantoms", 1, 2), ("phantoms", 2, 2)]
    assert [p.name for p in tmp_path.iterdir()] == ["D"], "no temporary folder may stay"
    for index, name in enumerate(names):
        image, label = phantom_case(kind, index, size=size, seed=1)
        stored_image = read_volume(channel_paths(out / "imagesTr" / f"{name}{number}{ending}")[0])
        stored_label = read_volume(out / "labelsTr" / f"{name}{ending}", kind="label")
        np.testing.assert_array_equal(stored_image.data, image.data)
        np.testing.assert_array_equal(stored_label.data, label.data)
        np.testing.assert_allclose(stored_image.affine, label.affine, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_bytes_and_first_cases_are_a_prefix(kind: str, tmp_path: Path) -> None:
    few = dataset_bytes(make_phantoms(kind, tmp_path / "few", cases=1, size=32, seed=7))
    more = dataset_bytes(make_phantoms(kind, tmp_path / "more", cases=3, size=32, seed=7))
    other = dataset_bytes(make_phantoms(kind, tmp_path / "other", cases=1, size=32, seed=8))
    assert few.keys() - more.keys() == set()
    for name in few.keys() - {"dataset.json"}:
        assert few[name] == more[name], name
        assert few[name] != other[name], name


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_class_occurs_and_types_are_right(kind: str) -> None:
    for index in (1, 2):
        image, label = phantom_case(kind, index, size=SIZE[kind], seed=2)
        assert image.data.shape == label.data.shape
        assert label.data.dtype == np.uint8
        assert image.data.dtype == (np.uint8 if kind == "xray" else np.int16)
        assert label.data.max() <= CLASSES[kind]
    found = np.unique(
        np.concatenate([np.unique(phantom_case(kind, i, size=SIZE[kind], seed=2)[1].data) for i in range(2)])
    )
    assert list(found) == list(range(CLASSES[kind] + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_smallest_size_works(kind: str) -> None:
    for index in range(4):
        image, label = phantom_case(kind, index, size=24, seed=0)
        assert np.count_nonzero(label.data) > 0
        assert image.data.std() > 0


# ---------------------------------------------------------------- liver


def test_liver_cases_vary(livers: list[tuple[Volume, Volume]]) -> None:
    spacings = np.array([image.spacing_mm for image, _ in livers])
    assert (spacings[:, 0] > spacings[:, 1]).all(), "slices are thicker than pixels"
    assert spacings.std(axis=0).min() > 0.2
    assert len({image.data.shape for image, _ in livers}) > 8
    directions = {tuple(np.sign(np.diag(image.affine)[:3])) for image, _ in livers}
    assert len(directions) > 1, "files differ in orientation"
    litres = [np.count_nonzero(label.data) * np.prod(label.spacing_mm) / 1e6 for _, label in livers]
    assert 0.7 < min(litres) < max(litres) < 2.8


def test_liver_lies_on_the_right_and_is_one_piece(livers: list[tuple[Volume, Volume]]) -> None:
    for _, label in livers:
        data = label.to_canonical().data > 0  # x ascends to the patient's right in no file order but this
        centre = ndimage.center_of_mass(data)[2] / data.shape[2]
        assert centre > 0.52, "canonical x ascends to the right"
        parts, count = ndimage.label(data)
        assert np.bincount(parts.ravel())[1:].max() > 0.98 * data.sum(), count


def test_some_livers_have_tumours_and_some_have_none(livers: list[tuple[Volume, Volume]]) -> None:
    voxels = np.array([np.count_nonzero(label.data == 2) for _, label in livers])
    assert 1 <= np.count_nonzero(voxels == 0) <= 4
    sizes = np.concatenate([np.bincount(ndimage.label(label.data == 2)[0].ravel())[1:] for _, label in livers])
    assert np.mean(sizes > 80) > 0.5
    assert sizes.max() > 5 * np.median(sizes) or sizes.min() < np.median(sizes) / 3, "sizes vary"


def test_tumours_can_be_seen(livers: list[tuple[Volume, Volume]]) -> None:
    ratios = []
    for image, label in livers:
        smooth = ndimage.uniform_filter(image.data.astype(np.float32), 3)
        healthy = ndimage.binary_erosion(label.data == 1, iterations=2)
        tumour = ndimage.binary_erosion(label.data == 2)
        if tumour.sum() > 5:
            ratios.append((smooth[healthy].mean() - smooth[tumour].mean()) / smooth[healthy].std())
    assert len(ratios) >= 6
    assert np.median(ratios) > 3


@pytest.mark.parametrize("smooth", [False, True])
def test_a_threshold_fails_on_livers_and_tumours(livers: list[tuple[Volume, Volume]], smooth: bool) -> None:
    images = [i.data.astype(np.float32) for i, _ in livers]
    images = [ndimage.uniform_filter(i, 3) for i in images] if smooth else images
    labels = [label.data for _, label in livers]
    pairs = list(zip(images, labels, strict=True))
    assert best_threshold_dice([(i, x > 0) for i, x in pairs]) < 0.70
    assert best_threshold_dice([(i, x == 2) for i, x in pairs]) < 0.20
    for pair in pairs:  # not even with an interval fitted to the case by its own label
        assert best_threshold_dice([(pair[0], pair[1] > 0)]) < 0.75


# ---------------------------------------------------------------- vessels


def test_branches_reach_down_to_a_voxel(chests: list[tuple[Volume, Volume]]) -> None:
    for _, label in chests:
        for value in (1, 2, 3):
            mask = label.data == value
            depth = ndimage.distance_transform_edt(mask)
            ridge = mask & (depth >= ndimage.maximum_filter(depth, 3))
            assert np.quantile(depth[ridge], 0.25) <= 1.5, value
            assert depth.max() > 1.7, f"class {value} tapers from thick to thin"


def test_arteries_run_beside_airways_and_veins_between(chests: list[tuple[Volume, Volume]]) -> None:
    for image, label in chests:
        distance = ndimage.distance_transform_edt(label.data != 3, sampling=image.spacing_mm)
        artery, vein = (distance[label.data == value] for value in (1, 2))
        assert np.median(artery) < 0.8 * np.median(vein)


def test_arteries_and_veins_are_alike_in_density(chests: list[tuple[Volume, Volume]]) -> None:
    for image, label in chests:
        inner = [image.data[ndimage.binary_erosion(label.data == value)] for value in (1, 2)]
        assert abs(inner[0].mean() - inner[1].mean()) < 40
        assert image.data[ndimage.binary_erosion(label.data == 3)].mean() < -700


# ---------------------------------------------------------------- radiographs


def test_radiographs_show_two_lungs() -> None:
    for index in range(8):
        image, label = phantom_case("xray", index, size=128, seed=4)
        parts, count = ndimage.label(label.data)
        areas = np.sort(np.bincount(parts.ravel())[1:])[::-1] / label.data.size
        assert count == 2, index
        assert 0.05 < areas[1] <= areas[0] < 0.25
        centres = sorted(x for _, x in ndimage.center_of_mass(label.data, parts, [1, 2]))
        assert centres[0] < 64 < centres[1]
        lungs, rest = (image.data[label.data == v].astype(float) for v in (1, 0))
        assert lungs.mean() < rest.mean() + 25, "air lets the rays through"
        assert image.data.max() > 150


def test_a_threshold_fails_on_radiographs() -> None:
    cases = [phantom_case("xray", i, size=128, seed=4) for i in range(8)]
    assert best_threshold_dice([(i.data, x.data > 0) for i, x in cases]) < 0.80


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "livr"}, "did you mean 'liver'"),
        ({"cases": 0}, "at least 1"),
        ({"size": 23}, "at least 24"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_bad_arguments_write_nothing(change: dict[str, object], words: str, tmp_path: Path) -> None:
    arguments = {"kind": "xray", "cases": 1, "size": 32, "seed": 0} | change
    with pytest.raises(InputError, match=words):
        make_phantoms(arguments.pop("kind"), tmp_path / "new", **arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_existing_dataset_is_refused_and_kept(tmp_path: Path) -> None:
    out = make_phantoms("xray", tmp_path / "D", cases=1, size=24, seed=0)
    before = dataset_bytes(out)
    with pytest.raises(InputError, match="already holds a dataset"):
        make_phantoms("xray", out, cases=1, size=24, seed=1)
    assert dataset_bytes(out) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        make_phantoms("xray", tmp_path / "other", cases=1, size=24, seed=1)
    with pytest.raises(InputError, match="is a file"):
        make_phantoms("xray", tmp_path / "other" / "notes.txt", cases=1, size=24, seed=1)


def test_empty_output_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    out = make_phantoms("xray", tmp_path / "empty", cases=1, size=24, seed=0)
    assert (out / "dataset.json").is_file()


def test_interrupted_writing_leaves_nothing(tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_phantoms("xray", tmp_path / "D", cases=2, size=24, seed=0, progress=stop)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- shapes


def test_sphere_and_tube_distances_are_exact() -> None:
    axes = [centred_axis(17, 1.0), centred_axis(21, 0.5), centred_axis(15, 2.0)]
    z, y, x = mesh(axes)
    exact = np.sqrt(z**2 + y**2 + x**2) - 4
    np.testing.assert_allclose(ellipsoid((z, y, x), (0, 0, 0), (4, 4, 4)), exact, atol=1e-4)
    tube = empty_distance(axes)
    add_tube(tube, axes, np.array([[-30.0, 1.0, 0.5], [30.0, 1.0, 0.5]]), np.array([2.0, 2.0]), 3.0)
    expected = np.hypot(y - 1.0, x - 0.5) - 2
    near = expected < 3.0
    np.testing.assert_allclose(tube[near], expected[near], atol=1e-4)


def test_spline_curve_meets_its_points() -> None:
    points = np.array([[0.0, 0.0], [1.0, 2.0], [4.0, 1.0]])
    np.testing.assert_allclose(spline_curve(points, 5)[::5], points, atol=1e-12)


def test_smooth_field_has_unit_variance_and_is_smooth() -> None:
    axes = [centred_axis(60, 2.0), centred_axis(50, 1.0), centred_axis(70, 1.5)]
    field = smooth_field(axes, 6.0, np.random.default_rng(0))
    assert field.shape == (60, 50, 70)
    assert abs(field.mean()) < 0.1
    assert abs(field.std() - 1) < 0.1
    step = np.abs(np.diff(field, axis=1))  # 1 mm of 6
    assert step.mean() < 0.3


def test_a_size_that_no_memory_holds_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"size 100000: one case needs 8e\+06 GB of memory at least"):
        make_phantoms("liver", tmp_path / "out", cases=1, size=100_000, seed=0)
    assert not (tmp_path / "out").exists()
