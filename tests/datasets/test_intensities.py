"""Channels whose intensities cannot be scaled, look like CT, or stand out; and files that are taken to lie together."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from lightm.datasets.cases import read_case
from lightm.datasets.check import check_dataset
from lightm.datasets.discovery import open_dataset
from lightm.datasets.intensities import image_ends, unusual
from lightm.errors import InputError
from lightm.images.io import write_volume
from lightm.images.lazy import LazyVolume, spread_voxels
from lightm.images.volume import Volume
from lightm.preparation.plan import make_plan
from tests.helpers import describe

SHAPE = (6, 16, 16)


def hu(seed: int) -> np.ndarray:
    """A body of about 40 HU with an organ of 120, in air."""
    rng = np.random.default_rng(seed)
    data = np.full(SHAPE, -1000.0)
    data[:, 3:13, 3:13] = 40
    data[1:5, 6:11, 6:11] = 120
    return (data + rng.normal(0, 10, SHAPE)).astype(np.float32)


def organ() -> np.ndarray:
    label = np.zeros(SHAPE, np.uint8)
    label[1:5, 6:11, 6:11] = 1
    return label


def data_set(root: Path, images: list[np.ndarray], *, channel: str = "CT", codes: tuple[int, int] = (1, 1)) -> Path:
    describe(root, channel_names={"0": channel}, labels={"background": 0, "organ": 1}, numTraining=len(images))
    placed = np.diag([-1.0, -1.0, 3.0, 1.0])
    placed[:3, 3] = (90, 80, -40)
    header = nibabel.Nifti1Header()
    header.set_data_shape(SHAPE[::-1])
    header.set_zooms((1, 1, 3))
    own = placed if any(codes) else header.get_base_affine()  # all that a file without codes can say
    for number, image in enumerate(images):
        write_volume(root / f"imagesTr/c{number}_0000.nii.gz", Volume(image, (3, 1, 1), own, codes))
        write_volume(root / f"labelsTr/c{number}.nii.gz", Volume(organ(), (3, 1, 1), placed), kind="label")
    return root


def said(root: Path, **options: object) -> str:
    result = check_dataset(root, **options)  # type: ignore[arg-type]
    return "\n".join(f"{problem.severity}: {problem}" for problem in result.problems)


def test_sound_ct_gives_no_remark(tmp_path: Path) -> None:
    assert said(data_set(tmp_path, [hu(seed) for seed in range(4)])) == ""


@pytest.mark.parametrize("value", [1, 255, 0.5])
def test_a_mask_called_ct_is_found_by_the_check_as_by_the_plan(tmp_path: Path, value: float) -> None:
    mask = (organ() * value).astype(np.float32)
    root = data_set(tmp_path, [mask] * 3)
    words = rf"c0_0000\.nii\.gz: channel 'CT': the foreground has one value only, {value:g}.* noNorm"
    assert not check_dataset(root).ok
    with pytest.raises(InputError, match=words):
        make_plan(open_dataset(root))
    assert check_dataset(root, channels=["noNorm"]).ok
    assert make_plan(open_dataset(root, channels=["noNorm"])).normalization[0].scheme == "none"


def test_values_of_ct_in_another_channel_are_said(tmp_path: Path) -> None:
    padded = [hu(seed) for seed in range(4)]
    padded[1][0] = -3024
    padded[1][:, 0] = -3024
    told = said(data_set(tmp_path, padded, channel="image"))
    assert "warning" in told
    assert "look like CT" in told
    assert "1 of 4 are padded with less than air, as c1_0000.nii.gz" in told
    assert "--channels CT" in told
    assert make_plan(open_dataset(tmp_path, channels=["CT"])).normalization[0].scheme == "ct"


@pytest.mark.parametrize("change", [lambda x: x + 1100, lambda x: np.clip(x + 1000, 0, 2000) / 2000, lambda x: x * 10])
def test_one_case_in_another_unit_is_said(tmp_path: Path, change) -> None:  # type: ignore[no-untyped-def]
    images = [hu(seed) for seed in range(5)]
    images[3] = np.asarray(change(images[3]), np.float32)
    told = said(data_set(tmp_path, images)).splitlines()
    assert len(told) == 1
    assert "c3_0000.nii.gz: channel 'CT': intensities from" in told[0]


def test_other_names_of_channels(tmp_path: Path) -> None:
    root = data_set(tmp_path, [hu(seed) for seed in range(2)], channel="image")
    assert open_dataset(root, channels=["CT"]).channels == ("CT",)
    with pytest.raises(InputError, match=r"channels CT,T1: .* has 1 \(image\)"):
        open_dataset(root, channels=["CT", "T1"])


def test_files_without_a_place_are_said_and_taken_together_when_asked_for(tmp_path: Path) -> None:
    images = [hu(seed) for seed in range(3)]
    root = data_set(tmp_path, images, codes=(0, 0))
    told = said(root)
    assert told.count("error") == 3
    assert "c0_0000.nii.gz has no place in space (neither sform nor qform is set)" in told
    assert "--trust-image-geometry" in told
    assert "resample" not in told
    assert check_dataset(root, trust_image_geometry=True).ok
    trusted = open_dataset(root, trust_image_geometry=True)
    found, label = read_case(trusted.cases[1], trust_image_geometry=True)
    assert label is not None
    np.testing.assert_array_equal(label.data, organ())
    np.testing.assert_array_equal(label.affine, found[0].affine)
    assert make_plan(trusted).fingerprint.intensities[0].median == pytest.approx(120, abs=5)
    with pytest.raises(InputError, match=r"c0\.nii\.gz: case c0: does not lie where"):
        make_plan(open_dataset(root))


def test_another_shape_is_never_trusted(tmp_path: Path) -> None:
    root = data_set(tmp_path, [hu(0), hu(1)])
    short = Volume.from_spacing(organ()[1:], (3.0, 1.0, 1.0))
    write_volume(root / "labelsTr/c1.nii.gz", short, kind="label")
    with pytest.raises(InputError, match="resample one onto the other"):
        make_plan(open_dataset(root, trust_image_geometry=True))
    assert "resample one onto the other" in said(root, trust_image_geometry=True)


@pytest.mark.parametrize("shape", [(64, 64), (7, 300, 300), (300, 20, 30), (1, 5, 5)])
def test_spread_voxels_have_the_ends_of_the_whole(shape: tuple[int, ...]) -> None:
    data = np.random.default_rng(0).normal(100, 20, shape).astype(np.float32)
    image = LazyVolume.of(Volume.from_spacing(data, (1.0,) * len(shape)))
    assert 0 < len(spread_voxels(image)) <= 110_000
    np.testing.assert_allclose(image_ends(image), np.percentile(data, [1, 99]), atol=6)


@pytest.mark.parametrize(
    ("ends", "odd"),
    [
        ((-1000, 300), False), ((-1020, 180), False), ((-900, 420), False), ((24, 1324), True), ((0, 255), True),
        ((0, 1), True), ((-3024, 300), True), ((-1000, 3000), True),
    ],
)  # fmt: skip
def test_what_passes_for_hu(ends: tuple[float, float], odd: bool) -> None:
    assert (unusual(ends, [-1010, -990], [250, 350]) is not None) == odd
    tiny = tuple(end * 1e-9 for end in ends)
    assert (unusual(tiny, [-1010e-9, -990e-9], [250e-9, 350e-9]) is not None) == odd
