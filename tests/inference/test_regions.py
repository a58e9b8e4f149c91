"""Regions in prediction: label maps of logits and probabilities, whatever the chunks; probabilities; statistics."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightm.errors import LightMError
from lightm.images.volume import Volume
from lightm.inference import Predictor, budget
from lightm.inference.native_space import class_indices, label_map, to_probabilities
from lightm.inference.statistics import class_statistics
from lightm.preparation.plan import Plan

from .factories import PlanMaker

ORDER = [4, 300, 2]


def by_loop(probabilities: np.ndarray, order: list[int]) -> np.ndarray:
    """nnU-Net's rule, a voxel at a time."""
    result = np.zeros(probabilities.shape[1:], np.int16)
    for place in np.ndindex(result.shape):
        for channel, value in enumerate(order):
            if probabilities[(channel, *place)] > 0.5:
                result[place] = value
    return result


def test_later_regions_replace_earlier_ones() -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 4, 5, 6)))
    expected = by_loop(to_probabilities(logits, regions=True).numpy(), ORDER)
    assert len(np.unique(expected)) == 4
    found = label_map(logits, regions_class_order=ORDER)
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found, expected)
    probabilities = to_probabilities(logits, regions=True)
    np.testing.assert_array_equal(label_map(probabilities, regions_class_order=ORDER, probabilities=True), expected)
    assert label_map(logits, regions_class_order=[1, 2, 3]).dtype == np.uint8
    assert not label_map(torch.zeros(2, 3), regions_class_order=[1, 2]).any()


def test_classes_from_logits_and_from_averaged_probabilities() -> None:
    logits = [torch.from_numpy(np.random.default_rng(seed).normal(size=(3, 4, 5))) for seed in range(2)]
    values = np.array([0, 3, 7], np.uint8)
    np.testing.assert_array_equal(label_map(logits[0], values), values[logits[0].numpy().argmax(0)])
    mean = sum(to_probabilities(part, regions=False) for part in logits) / 2
    np.testing.assert_array_equal(label_map(mean, values, probabilities=True), values[mean.numpy().argmax(0)])


@pytest.mark.parametrize("shape", [(7, 9, 10), (13, 20, 17)])
def test_slab_by_slab_is_the_whole_at_once(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(3, 7, 9, 10))).float()
    whole = class_indices([logits], logits.shape[1:], shape, regions_class_order=[1, 2, 3])
    monkeypatch.setattr("lightm.inference.native_space._CHUNK_VALUES", 1)
    parts = class_indices(logits.split(2, dim=1), logits.shape[1:], shape, regions_class_order=[1, 2, 3])
    np.testing.assert_array_equal(whole, parts)
    if shape == logits.shape[1:]:
        np.testing.assert_array_equal(whole, label_map(logits, regions_class_order=[1, 2, 3]))


class Shells(nn.Module):
    """Two regions of the first channel: above 0, and above 50."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :1] / 10, (x[:, :1] - 50) / 10], dim=1)


@pytest.fixture
def plan(make_plan: PlanMaker) -> Plan:
    return make_plan(
        (2.0, 1.0, 1.0),
        (8, 8, 8),
        labels={"background": 0, "label_3": 3, "label_5": 5},
        regions={"whole": [3, 5], "core": [5]},
        regions_class_order=[3, 5],
    )


@pytest.fixture
def image() -> Volume:
    data = np.random.default_rng(3).normal(0, 60, (20, 18, 17)).astype(np.float32)
    return Volume.from_spacing(data, (2.0, 1.0, 1.0))


def test_a_predictor_writes_the_values_of_the_order(plan: Plan, image: Volume) -> None:
    found = Predictor(Shells(), plan, "cpu").predict_volumes([image])
    expected = np.where(image.data > 50, 5, np.where(image.data > 0, 3, 0))
    np.testing.assert_array_equal(found.data, expected)


def test_a_limit_of_memory_changes_no_label(plan: Plan, image: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    free = Predictor(Shells(), plan, "cpu").predict_volumes([image])
    limited = Predictor(Shells(), plan, "cpu", max_memory=10**12)
    monkeypatch.setattr(budget, "choose", lambda *given: budget.MemoryPlan(False, False, False))
    np.testing.assert_array_equal(limited.predict_volumes([image]).data, free.data)


def test_probabilities_are_sigmoids(plan: Plan, image: Volume, tmp_path: Path) -> None:
    Predictor(Shells(), plan, "cpu").predict_volumes([image], probabilities=tmp_path / "p.nii.gz")
    stored = np.asarray(nibabel.load(tmp_path / "p.nii.gz").dataobj)
    assert stored.shape == (17, 18, 20, 2)
    for channel, logit in enumerate((image.data / 10, (image.data - 50) / 10)):
        np.testing.assert_allclose(stored[..., channel].T, 1 / (1 + np.exp(-logit)), atol=0.003)


def test_a_network_with_another_number_of_regions_is_told(plan: Plan, image: Volume) -> None:
    with pytest.raises(LightMError, match=r"returned 1 regions; its plan has 2 \(whole, core\)"):
        Predictor(nn.Identity(), plan, "cpu").predict_volumes([image])


def test_statistics_are_those_of_regions(plan: Plan, image: Volume) -> None:
    labels = Predictor(Shells(), plan, "cpu").predict_volumes([image])
    whole, core = class_statistics(labels, image, plan.targets)
    assert (whole.class_name, whole.value, core.value) == ("whole", [3, 5], [5])
    assert whole.voxels == np.count_nonzero(image.data > 0)
    assert core.voxels == np.count_nonzero(image.data > 50)
    assert whole.mean == pytest.approx(float(image.data[image.data > 0].mean()), rel=1e-5)
