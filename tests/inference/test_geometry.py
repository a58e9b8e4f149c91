"""A file goes through prediction and comes back where it was: every orientation, tilt and spacing."""

from __future__ import annotations

from itertools import permutations, product
from pathlib import Path

import nibabel
import numpy as np
import pytest

from lightm.errors import InputError
from lightm.images.io import read_volume, write_volume
from lightm.images.volume import Volume
from lightm.inference import Predictor

from .factories import PlanMaker, Threshold

ORIENTATIONS = list(product(permutations(range(3)), product((1, -1), repeat=3)))


def image_of(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Voxels (x, y, z) none of which is near the threshold of 5."""
    values = np.random.default_rng(seed).integers(-90, 90, shape)
    return (values * 10 + 3).astype(np.int16)


def rotation(rng: np.random.Generator) -> np.ndarray:
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    return q * np.sign(np.diag(r))


def through(path: Path, data: np.ndarray, affine: np.ndarray, make_plan: PlanMaker, *, patch: int = 8) -> None:
    """Predict a file by thresholding, write the map, and compare both files as nibabel reads them."""
    nibabel.save(nibabel.Nifti1Image(data, affine), path / "image.nii.gz")
    image = read_volume(path / "image.nii.gz")
    plan = make_plan(image.to_canonical().spacing_mm, (patch,) * 3)
    write_volume(path / "label.nii.gz", Predictor(Threshold(5.0), plan).predict_volumes([image]), kind="label")
    source, label = nibabel.load(path / "image.nii.gz"), nibabel.load(path / "label.nii.gz")
    np.testing.assert_array_equal(np.asarray(label.dataobj), data > 5)
    assert 0 < np.asarray(label.dataobj).sum() < data.size
    np.testing.assert_array_equal(label.affine, source.affine)
    # The affine is exact; the lengths of its columns are rounded to float32 by the writer.
    np.testing.assert_allclose(label.header.get_zooms(), source.header.get_zooms(), rtol=2e-7)
    assert nibabel.aff2axcodes(label.affine) == nibabel.aff2axcodes(affine)


@pytest.mark.parametrize(("axes", "signs"), ORIENTATIONS)
def test_all_48_orientations_with_uneven_spacing(
    tmp_path: Path, axes: tuple[int, ...], signs: tuple[int, ...], make_plan: PlanMaker
) -> None:
    affine = np.zeros((4, 4))
    for column, (row, sign, step) in enumerate(zip(axes, signs, (0.625, 1.25, 3.3), strict=True)):
        affine[row, column] = sign * step
    affine[:, 3] = (-31.5, 12.25, 808.0, 1)
    through(tmp_path, image_of((9, 6, 4), 1), affine, make_plan)


@pytest.mark.parametrize("seed", range(12))
def test_oblique_affines(tmp_path: Path, seed: int, make_plan: PlanMaker) -> None:
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = rotation(rng) @ np.diag(rng.uniform(0.3, 6, 3))
    affine[:3, 3] = rng.uniform(-500, 500, 3)
    shape = tuple(int(size) for size in rng.integers(1, 11, 3))
    data = image_of(shape, seed)  # type: ignore[arg-type]
    data.flat[0], data.flat[-1] = 93, -97
    if data.size > 1:
        through(tmp_path, data, affine, make_plan)


@pytest.mark.parametrize("shape", [(1, 7, 9), (7, 1, 9), (9, 7, 1), (2, 1, 1), (8, 8, 8)])
def test_single_slices_and_lines(tmp_path: Path, shape: tuple[int, int, int], make_plan: PlanMaker) -> None:
    data = image_of(shape, 2)
    data.flat[0], data.flat[-1] = 93, -97
    through(tmp_path, data, np.diag([-0.5, 0.75, 2.0, 1.0]), make_plan)


def test_2d_files_come_back(tmp_path: Path, make_plan: PlanMaker) -> None:
    data = image_of((9, 6, 1), 3)[..., 0]
    nibabel.save(nibabel.Nifti1Image(data, np.diag([0.5, 0.75, 1, 1])), tmp_path / "a.nii")
    image = read_volume(tmp_path / "a.nii")
    assert image.spacing_mm == (0.75, 0.5)
    label = Predictor(Threshold(5.0), make_plan(image.spacing_mm, (8, 8))).predict_volumes([image])
    write_volume(tmp_path / "b.nii", label, kind="label")
    np.testing.assert_array_equal(np.asarray(nibabel.load(tmp_path / "b.nii").dataobj), data > 5)


def test_channels_that_lie_elsewhere_are_refused(make_plan: PlanMaker) -> None:
    first = Volume.from_spacing(np.zeros((4, 5, 6), np.float32), (2.0, 1.0, 1.0))
    plan = make_plan((2.0, 1.0, 1.0), (8, 8, 8))
    shifted = first.affine.copy()
    shifted[0, 3] += 0.2
    flipped = first.affine @ np.diag([-1.0, 1, 1, 1])
    two = plan.model_copy(update={"channels": ["a", "b"], "normalization": plan.normalization * 2})
    for other in (
        Volume(first.data, first.spacing_mm, shifted),
        Volume(first.data, first.spacing_mm, flipped),
        Volume(first.data[:, :, :5], first.spacing_mm, first.affine),
    ):
        with pytest.raises(InputError, match="do not lie in one place"):
            Predictor(Threshold(0.5), two).predict_volumes([first, other])
