"""One case from native images to a native label map: orientation, spacing, label values."""

from __future__ import annotations

from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightm
from lightm.errors import InputError, LightMError
from lightm.images.volume import Volume
from lightm.inference import Predictor

from .factories import PlanMaker, Threshold


def blobs(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A smooth random image with values around zero."""
    noise = torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()[None, None]
    pool = torch.nn.functional.avg_pool3d if len(shape) == 3 else torch.nn.functional.avg_pool2d
    smooth = pool(noise, 3, stride=1, padding=1)
    return (100 * smooth[0, 0]).numpy()


def oriented(data: np.ndarray, axes: tuple[int, ...], signs: tuple[int, ...], steps: tuple[float, ...]) -> Volume:
    """A volume whose file axis i (x, y, z order) points along patient axis axes[i], in direction signs[i]."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, (row, sign) in enumerate(zip(axes, signs, strict=True)):
        affine[row, column] = sign * steps[column]
    affine[:3, 3] = (11.0, -7.0, 3.5)
    return Volume(data, tuple(reversed(steps)), affine)


ORIENTATIONS = list(product(permutations(range(3)), product((1, -1), repeat=3)))


@pytest.mark.parametrize(("axes", "signs"), ORIENTATIONS[::3])
def test_every_orientation_comes_back_voxel_for_voxel(
    axes: tuple[int, ...], signs: tuple[int, ...], make_plan: PlanMaker
) -> None:
    image = oriented(blobs((9, 21, 13)), axes, signs, (0.7, 1.1, 2.5))
    spacing = image.to_canonical().spacing_mm
    result = Predictor(Threshold(5.0), make_plan(spacing, (8, 16, 8))).predict_volumes([image])
    assert np.array_equal(result.data, image.data > 5)
    assert result.data.dtype == np.uint8
    assert result.spacing_mm == image.spacing_mm
    assert np.array_equal(result.affine, image.affine)


def test_tilted_affine_comes_back(make_plan: PlanMaker) -> None:
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-0.8, 0.8, 3.0])
    image = Volume(blobs((6, 12, 10)), (3.0, 0.8, 0.8), affine)
    result = Predictor(Threshold(0.0), make_plan(image.spacing_mm, (8, 8, 8))).predict_volumes([image])
    assert np.array_equal(result.data, image.data > 0)
    assert np.array_equal(result.affine, affine)


@pytest.mark.parametrize("spacing", [(2.5, 2.5, 2.5), (1.0, 3.0, 2.0), (4.0, 1.0, 1.0)])
def test_resampling_stays_in_place(spacing: tuple[float, ...], make_plan: PlanMaker) -> None:
    # A ball in millimetres: whatever grid the network works on, it comes back where it was.
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in (16, 40, 40)), indexing="ij"))
    steps = np.array([2.5, 1.0, 1.0])[:, None, None, None]
    distance = np.linalg.norm((grid - np.array([6, 22, 15])[:, None, None, None]) * steps, axis=0)
    image = oriented((12 - distance).astype(np.float32), (1, 0, 2), (-1, 1, -1), (1.0, 1.0, 2.5))
    plan = make_plan(spacing, (16, 16, 16))
    result = Predictor(Threshold(0.0), plan).predict_volumes([image])
    truth = image.data > 0
    dice = 2 * (truth & (result.data == 1)).sum() / (truth.sum() + (result.data == 1).sum())
    assert dice > 0.97
    shift = np.argwhere(truth).mean(0) - np.argwhere(result.data == 1).mean(0)
    assert np.abs(shift).max() < 0.1


def test_2d_and_label_values(make_plan: PlanMaker) -> None:
    image = Volume.from_spacing(blobs((30, 21)), (1.0, 1.0))
    for value, dtype in [(1, np.uint8), (7, np.uint8), (900, np.int16)]:
        plan = make_plan((1.0, 1.0), (16, 16), labels={"background": 0, "bright": value})
        result = Predictor(Threshold(3.0), plan).predict_volumes([image])
        assert result.data.dtype == dtype
        assert np.array_equal(result.data, np.where(image.data > 3, value, 0))


def test_rules_remove_stray_components(make_plan: PlanMaker) -> None:
    data = np.zeros((16, 24), np.float32)
    data[2:9, 3:9] = 10
    data[12:14, 18:20] = 10
    plan = make_plan((1.0, 1.0), (16, 16), labels={"background": 0, "bright": 7})
    image = Volume.from_spacing(data, (1.0, 1.0))
    assert (Predictor(Threshold(3.0), plan).predict_volumes([image]).data == 7).sum() == 46
    cleaned = Predictor(Threshold(3.0), plan, rules=[[7]]).predict_volumes([image]).data
    assert np.argwhere(cleaned == 7).max(0).tolist() == [8, 8]
    assert (cleaned == 7).sum() == 42


def test_mirroring_is_used_over_the_axes_of_training(make_plan: PlanMaker) -> None:
    class Ramp(nn.Module):
        """Votes for class 1 in the first half of the last axis, more weakly than the image's sign."""

        def forward(self, x: Tensor) -> Tensor:
            ramp = torch.linspace(200, -200, x.shape[-1]).expand_as(x)
            return torch.cat([torch.zeros_like(x), x + ramp], dim=1)

    image = Volume.from_spacing(blobs((8, 8)), (1.0, 1.0))
    plan = make_plan((1.0, 1.0), (8, 8))
    once = Predictor(Ramp(), plan).predict_volumes([image])
    mirrored = Predictor(Ramp(), plan, tta=(1,)).predict_volumes([image])
    assert np.array_equal(mirrored.data, image.data > 0)  # the ramp cancels
    assert not np.array_equal(once.data, mirrored.data)


def test_network_is_put_into_evaluation_mode(make_plan: PlanMaker) -> None:
    network = nn.Sequential(nn.Dropout(0.9), Threshold(0.0)).train()
    image = Volume.from_spacing(blobs((8, 8)), (1.0, 1.0))
    result = Predictor(network, make_plan((1.0, 1.0), (8, 8))).predict_volumes([image])
    assert np.array_equal(result.data, image.data > 0)


def test_errors(make_plan: PlanMaker) -> None:
    plan = make_plan((1.0, 1.0), (8, 8))
    flat, deep = (Volume.from_spacing(blobs((8,) * n), (1.0,) * n) for n in (2, 3))
    with pytest.raises(InputError, match="2 images"):
        Predictor(Threshold(0), plan).predict_volumes([flat, flat])
    with pytest.raises(InputError, match="3D image"):
        Predictor(Threshold(0), plan).predict_volumes([deep])
    with pytest.raises(InputError, match="overlap"):
        Predictor(Threshold(0), plan, overlap=1.5)
    with pytest.raises(InputError, match="tta=True: expected the axes"):
        Predictor(Threshold(0), plan, tta=True)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="device"):
        Predictor(Threshold(0), plan, "nowhere")
    with pytest.raises(LightMError, match="returned 1 classes; its plan has 2"):
        Predictor(nn.Identity(), plan).predict_volumes([flat])


@pytest.mark.slow
def test_a_model_is_flipped_along_the_axes_of_its_training_alone(tmp_path: Path) -> None:
    data = lightm.phantoms("xray", tmp_path / "data", cases=4, size=32)
    short = {"epochs": 1, "steps_per_epoch": 2, "val_patches": 1, "patch_size": [32, 32], "test": False}
    mirrored = lightm.train(data, tmp_path / "mirrored", augment={"mirror_axes": [1]}, **short)
    assert lightm.load(mirrored.run_dir, tta=True).tta == (1,)
    assert lightm.load(mirrored.run_dir).tta == ()
    plain = lightm.train(data, tmp_path / "plain", **short)
    with pytest.raises(InputError, match="was not trained with mirroring"):
        lightm.load(plain.run_dir, tta=True)
    with pytest.raises(InputError, match="was not trained with mirroring"):
        lightm.predict(plain.run_dir, data / "imagesTr", tmp_path / "out", tta=True)
    assert not (tmp_path / "out").exists()
