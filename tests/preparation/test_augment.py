from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from lightm.preparation.augment import Augment, AugmentConfig, AugmentParams

NOTHING = AugmentParams(None, 1.0, (), None, None, None, None, 0, None)


def sample_3d(shape: tuple[int, ...] = (12, 14, 16)) -> dict:
    generator = torch.Generator().manual_seed(0)
    label = torch.zeros(shape, dtype=torch.int64)
    label[3:9, 4:10, 5:11] = 1
    return {"image": torch.randn(1, *shape, generator=generator), "label": label, "case": "a"}


def test_the_seed_decides_everything():
    augment = Augment(AugmentConfig(), 3)
    sample = sample_3d()
    for seed in range(20):
        first, second = augment(sample, seed), augment(sample, seed)
        assert torch.equal(first["image"], second["image"])
        assert torch.equal(first["label"], second["label"])
        assert (first["image"].dtype, first["label"].dtype) == (torch.float32, torch.int64)
        assert type(first["image"]) is torch.Tensor
        assert first["case"] == "a"
    draws = {augment.sample_params(seed) for seed in range(200)}
    assert len(draws) == 200


def test_the_given_sample_is_left_alone():
    sample = sample_3d()
    image, label = sample["image"].clone(), sample["label"].clone()
    augment = Augment(AugmentConfig(mirror_axes=[0, 1, 2]), 3)
    for seed in range(20):
        augment(sample, seed)
    for step in ("rotation_rad", "scale", "mirror", "gamma", "contrast", "brightness", "noise_std", "low_resolution"):
        value = {"rotation_rad": (0.1, 0.1, 0.1), "mirror": (0,)}.get(step, 0.7)
        draw = replace(NOTHING, **{step: value})
        augment.apply_intensity(augment.apply_spatial(sample["image"], sample["label"], draw)[0], draw)
    assert torch.equal(sample["image"], image)
    assert torch.equal(sample["label"], label)


def test_probabilities_and_ranges_are_kept():
    config = AugmentConfig(mirror_axes=[1])
    draws = [Augment(config, 3).sample_params(seed) for seed in range(3000)]

    def share(taken) -> float:
        return sum(map(bool, taken)) / len(draws)

    assert share(draw.rotation_rad for draw in draws) == pytest.approx(0.2, abs=0.03)
    assert share(draw.scale != 1 for draw in draws) == pytest.approx(0.2, abs=0.03)
    assert share(draw.mirror for draw in draws) == pytest.approx(0.5, abs=0.03)
    assert share(draw.gamma for draw in draws) == pytest.approx(config.gamma_probability, abs=0.03)
    assert share(draw.low_resolution for draw in draws) == pytest.approx(config.low_resolution_probability, abs=0.03)
    angles = [abs(angle) for draw in draws for angle in draw.rotation_rad or ()]
    assert 14 < math.degrees(max(angles)) <= 15
    scales = [draw.scale for draw in draws]
    assert 0.85 <= min(scales) < 0.87
    assert 1.18 < max(scales) <= 1.2
    flat = [Augment(config, 2).sample_params(seed) for seed in range(3000)]
    assert share(draw.rotation_rad for draw in flat) == pytest.approx(0.3, abs=0.03)
    assert {len(draw.rotation_rad) for draw in flat if draw.rotation_rad} == {1}


def test_one_probability_does_not_change_what_another_draws():
    usual = Augment(AugmentConfig(), 3).sample_params(5)
    changed = Augment(AugmentConfig(gamma_probability=1.0), 3).sample_params(5)
    assert replace(changed, gamma=usual.gamma) == usual
    assert changed.gamma is not None


def test_nothing_drawn_changes_nothing():
    sample = sample_3d()
    augment = Augment(AugmentConfig(), 3)
    image, label = augment.apply_spatial(sample["image"], sample["label"], NOTHING)
    assert torch.equal(augment.apply_intensity(image, NOTHING), sample["image"])
    assert torch.equal(label, sample["label"])
    off = Augment(AugmentConfig(enabled=False, rotation_probability=1.0), 3)
    assert off(sample, 1) is sample


def test_a_quarter_turn_by_hand():
    image = torch.arange(16.0).reshape(1, 4, 4)
    label = torch.arange(16).reshape(4, 4)
    augment = Augment(AugmentConfig(), 2)
    moved, classes = augment.apply_spatial(image, label, replace(NOTHING, rotation_rad=(math.pi / 2,)))
    turned = [np.rot90(label.numpy(), k) for k in (1, -1)]
    assert any(np.array_equal(classes.numpy(), other) for other in turned)
    np.testing.assert_allclose(moved[0].numpy(), classes.numpy(), atol=1e-4)


def test_a_mirror_by_hand():
    sample = sample_3d()
    image, label = Augment(AugmentConfig(mirror_axes=[0, 2]), 3).apply_spatial(
        sample["image"], sample["label"], replace(NOTHING, mirror=(0, 2))
    )
    assert torch.equal(image, sample["image"].flip([1, 3]))
    assert torch.equal(label, sample["label"].flip([0, 2]))


def test_magnification_by_hand():
    label = torch.zeros(20, 20, dtype=torch.int64)
    label[8:12, 8:12] = 1
    augment = Augment(AugmentConfig(), 2)
    _, larger = augment.apply_spatial(label[None].float(), label, replace(NOTHING, scale=2.0))
    assert int(larger.sum()) == 64
    assert (larger[6:14, 6:14] == 1).all()
    image, smaller = augment.apply_spatial(label[None].float() + 1, label, replace(NOTHING, scale=0.5))
    assert (smaller == 1).sum() == 4
    inside = torch.zeros_like(label, dtype=torch.bool)
    inside[5:15, 5:15] = True
    assert torch.equal(smaller != 255, inside)  # what comes in from outside is ignored
    assert (image[0][:4] == 0).all()


def test_image_and_label_move_together():
    sample = sample_3d((24, 24, 24))
    block = torch.zeros(24, 24, 24, dtype=torch.int64)
    block[6:16, 8:18, 7:17] = 1
    draw = replace(NOTHING, rotation_rad=(0.2, -0.25, 0.1), scale=1.1)
    image, label = Augment(AugmentConfig(), 3).apply_spatial(block[None].float(), block, draw)
    known = label != 255
    agree = ((image[0] > 0.5) == (label == 1))[known].float().mean()
    assert agree > 0.995
    assert sample["label"].max() == 1


def test_rotation_is_rigid_in_millimetres():
    # A cube of 12 mm in voxels of 4 x 1 x 1 mm, turned by 90 degrees about x, stays a cube of 12 mm.
    label = torch.zeros(9, 36, 36, dtype=torch.int64)
    label[3:6, 12:24, 12:24] = 1
    draw = replace(NOTHING, rotation_rad=(0.0, 0.0, math.pi / 2))
    for axis in range(3):
        angles = [0.0, 0.0, 0.0]
        angles[axis] = math.pi / 2
        augment = Augment(AugmentConfig(), 3, (4.0, 1.0, 1.0))
        _, moved = augment.apply_spatial(label[None].float(), label, replace(draw, rotation_rad=tuple(angles)))
        assert torch.equal(moved == 1, label == 1)


def test_colours_by_hand():
    augment = Augment(AugmentConfig(), 3)
    image = sample_3d()["image"]
    brighter = augment.apply_intensity(image, replace(NOTHING, brightness=0.5))
    torch.testing.assert_close(
        brighter - image, torch.full_like(image, float(0.5 * image.std(correction=0))), atol=2e-3, rtol=0
    )
    flatter = augment.apply_intensity(image, replace(NOTHING, contrast=0.5))
    torch.testing.assert_close(flatter, (image - image.mean()) * 0.5 + image.mean())
    steeper = augment.apply_intensity(image, replace(NOTHING, contrast=2.0))
    assert (steeper.min(), steeper.max()) == (image.min(), image.max())
    bent = augment.apply_intensity(image, replace(NOTHING, gamma=1.4))
    assert float(bent.mean()) == pytest.approx(float(image.mean()), abs=1e-4)
    assert float(bent.std()) == pytest.approx(float(image.std()), abs=1e-3)
    assert torch.equal(bent.ravel().argsort(), image.ravel().argsort())
    noisy = augment.apply_intensity(image, replace(NOTHING, noise_std=0.1, noise_seed=4))
    assert float((noisy - image).std()) == pytest.approx(0.1, rel=0.1)
    coarse = augment.apply_intensity(image, replace(NOTHING, low_resolution=0.5))
    assert coarse.shape == image.shape
    assert float(coarse.std()) < float(image.std())


def test_channels_keep_apart():
    image = torch.stack([torch.randn(8, 8, 8), 1000 + 50 * torch.randn(8, 8, 8)])
    bent = Augment(AugmentConfig(), 3).apply_intensity(image, replace(NOTHING, gamma=1.3, contrast=1.1, brightness=0.1))
    assert abs(float(bent[0].mean())) < 1
    assert abs(float(bent[1].mean()) - 1000) < 30


@pytest.mark.parametrize(
    "options",
    [
        {"rotation": 3},
        {"gamma": (2.0, 1.0)},
        {"gamma": (0.0, 1.0)},
        {"gamma_probability": 1.5},
        {"mirror_axes": [0, 0]},
        {"mirror_axes": [3]},
        {"low_resolution": (0.5, 2.0)},
        {"noise_std": -1},
    ],
)
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValidationError):
        AugmentConfig(**options)


def test_a_patch_is_cheap():
    augment = Augment(AugmentConfig(), 3)
    sample = sample_3d((40, 56, 40))
    augment(sample, 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.process_time()
        for seed in range(40):
            augment(sample, seed)
        mean = (time.process_time() - start) / 40
    finally:
        torch.set_num_threads(threads)
    assert mean < 0.025
