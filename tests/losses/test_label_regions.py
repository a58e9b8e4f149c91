"""Losses of region-based labels: the equations written out plainly in float64, gradients, ignored voxels, refusals."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from lightm.errors import InputError
from lightm.losses import (
    CrossEntropy,
    CustomLoss,
    SegmentationLoss,
    WeightedSum,
    create_loss,
    knowing_regions,
    register_loss,
)
from lightm.losses.base import Prepared

REGIONS = ((1, 2, 3), (2, 3), (3,))
SHAPE = (5, 4, 6)


def example(ignored: bool = True, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, 3, *SHAPE, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 4, (2, *SHAPE), generator=generator)
    if ignored:
        target[:, :2, 1] = 255
    return logits, target


def make(name: str, label_regions: tuple[tuple[int, ...], ...] = REGIONS, **options: object) -> SegmentationLoss:
    return create_loss(name, spatial_dims=3, num_classes=len(label_regions), label_regions=label_regions, **options)


def inside(target: Tensor) -> Tensor:
    """(B, R, *S) float64 of 0 and 1, a voxel at a time."""
    result = torch.zeros(2, len(REGIONS), *SHAPE, dtype=torch.float64)
    for b, z, y, x in product(range(2), *map(range, SHAPE)):
        for k, region in enumerate(REGIONS):
            result[b, k, z, y, x] = float(int(target[b, z, y, x]) in region)
    return result


def bce(x: Tensor, g: Tensor) -> Tensor:
    """The textbook's form."""
    p = 1 / (1 + torch.exp(-x))
    return -(g * torch.log(p) + (1 - g) * torch.log(1 - p))


def counts(x: Tensor, target: Tensor, b: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    valid = (target[b] != 255).double()
    p, g = valid / (1 + torch.exp(-x[b, k])), inside(target)[b, k]
    return (p * g).sum(), (p * (1 - g)).sum(), ((valid - p) * g).sum()


@pytest.mark.parametrize("ignored", [False, True])
def test_bce_is_the_mean_over_regions_and_voxels_that_count(ignored: bool) -> None:
    logits, target = example(ignored)
    each = bce(logits, inside(target)).movedim(1, -1)[target != 255]
    torch.testing.assert_close(make("bce")(logits, target), each.mean())
    torch.testing.assert_close(make("ce")(logits, target), each.mean())
    weighted = (each.mean(0) * torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)).sum() / 8
    torch.testing.assert_close(make("ce", class_weights=[1, 2, 5])(logits, target), weighted)


@pytest.mark.parametrize("ignored", [False, True])
def test_dice_and_tversky_count_each_region_by_its_sigmoid(ignored: bool) -> None:
    logits, target = example(ignored)
    found = [counts(logits, target, b, k) for b, k in product(range(2), range(3))]
    dice = sum(1 - (2 * tp + 0.3) / (2 * tp + fp + fn + 0.3) for tp, fp, fn in found) / 6
    torch.testing.assert_close(make("dice", smooth=0.3)(logits, target), dice)
    shares = [1 - (tp + 0.1) / (tp + 0.3 * fp + 0.7 * fn + 0.1) for tp, fp, fn in found]
    torch.testing.assert_close(make("tversky", alpha=0.3, beta=0.7, eps=0.1)(logits, target), sum(shares) / 6)
    focal = sum(share**0.75 for share in shares) / 6
    torch.testing.assert_close(make("focal-tversky", eps=0.1)(logits, target), focal)
    pooled = [[sum(counts(logits, target, b, k)[i] for b in range(2)) for i in range(3)] for k in range(3)]
    together = sum(1 - (2 * tp + 0.3) / (2 * tp + fp + fn + 0.3) for tp, fp, fn in pooled) / 3
    torch.testing.assert_close(make("dice", smooth=0.3, batch=True)(logits, target), together)


def test_arsl_weighs_each_region_in_each_part_of_space() -> None:
    logits, target = example(ignored=False)
    g, p = inside(target), torch.sigmoid(logits)
    parts = [(slice(0, 3), slice(0, 4), slice(0, 6)), (slice(3, 5), slice(0, 4), slice(0, 6))]
    total = []
    for b, k, part in product(range(2), range(3), parts):
        q, t = p[b, k][part], g[b, k][part]
        tp, fp, fn = (q * t).sum(), (q * (1 - t)).sum(), ((1 - q) * t).sum()
        alpha = 0.3 + 0.4 * (fp + 1e-5) / (fp + fn + 1e-5)
        beta = 0.3 + 0.4 * (fn + 1e-5) / (fp + fn + 1e-5)
        total.append(1 - (tp + 1e-5) / (tp + alpha * fp + beta * fn + 1e-5))
    loss = make("arsl", region_size=(3, 4, 6))
    torch.testing.assert_close(loss(logits, target), torch.stack(total).mean())
    assert loss.last_coefficients[0].shape == (3,)


def test_topk_takes_the_hardest_pairs_of_voxel_and_region() -> None:
    logits, target = example()
    each = bce(logits, inside(target)).movedim(1, -1)[target != 255].flatten().sort(descending=True).values
    count = math.ceil(each.numel() * 0.1)
    torch.testing.assert_close(make("topk")(logits, target), each[:count].mean())


def test_sums_are_sums_of_their_parts() -> None:
    logits, target = example()
    whole = make("ce+dice", weights=(0.5, 2))(logits, target)
    torch.testing.assert_close(whole, 0.5 * make("bce")(logits, target) + 2 * make("dice")(logits, target))


@pytest.mark.parametrize("name", ["bce", "dice", "tversky", "focal-tversky", "arsl", "topk", "ce+dice", "ce+arsl"])
def test_gradients(name: str) -> None:
    logits, target = example()
    options = {"regions": 2} if "arsl" in name else {}
    loss = make(name, **options)
    assert torch.autograd.gradcheck(lambda x: loss(x, target), logits.requires_grad_())
    loss(logits, target).backward()
    ignored = (target == 255)[:, None].expand_as(logits)
    assert (logits.grad[ignored] == 0).all()
    assert (logits.grad[~ignored] != 0).any()


def test_what_lies_under_ignored_voxels_changes_nothing() -> None:
    logits, target = example()
    spoilt = logits.clone()
    spoilt[(target == 255)[:, None].expand_as(logits)] = math.nan
    for name in ("ce+dice", "arsl", "topk"):
        assert torch.equal(make(name)(spoilt, target), make(name)(logits, target))
    nothing = torch.full_like(target, 255)
    for name in ("ce+dice", "topk", "arsl"):
        assert make(name)(logits, nothing).item() == pytest.approx(0, abs=1e-9)


def test_nine_regions_have_more_bits_than_a_byte() -> None:
    regions = tuple(tuple(range(first, 10)) for first in range(1, 10))
    target = torch.arange(10).reshape(1, 1, 1, 10)
    logits = torch.stack([torch.where(target >= first, 40.0, -40.0) for first in range(1, 10)], dim=1)[:, :, 0]
    loss = make("dice", regions, smooth=1e-9)
    assert loss(logits.reshape(1, 9, 1, 1, 10), target).item() == pytest.approx(0, abs=1e-6)
    logits[:, 8] = -40
    assert loss(logits.reshape(1, 9, 1, 1, 10), target).item() == pytest.approx(1 / 9, rel=1e-4)


def test_one_region_alone() -> None:
    logits, target = example()
    value = make("ce+dice", ((1, 3),))(logits[:, :1], target)
    assert value.ndim == 0
    assert math.isfinite(value.item())


def test_a_function_gets_the_regions_as_channels() -> None:
    logits, target = example()
    seen: list[Tensor] = []

    def own(x: Tensor, y: Tensor) -> Tensor:
        seen.append(y)
        return x.mean()

    CustomLoss(own, spatial_dims=3, num_classes=3, label_regions=REGIONS)(logits, target)
    valid = (target != 255)[:, None].expand_as(logits)
    assert torch.equal(seen[0][valid].double(), inside(target)[valid])
    assert (seen[0][~valid] == 255).all()


def test_refusals() -> None:
    logits, target = example()
    with pytest.raises(InputError, match="include_background"):
        make("dice", include_background=True)
    with pytest.raises(InputError, match="of regions ce is bce"):
        make("ce+bce")
    with pytest.raises(InputError, match="expected as many"):
        create_loss("dice", spatial_dims=3, num_classes=4, label_regions=REGIONS)
    with pytest.raises(InputError, match="from 1 to 254"):
        make("dice", ((0, 1), (1,)))
    with pytest.raises(InputError, match=r"class index 4.*0\.\.3"):
        make("dice")(logits, torch.where(target == 1, 4, target))

    class Softmax(SegmentationLoss):
        def compute(self, batch: Prepared) -> Tensor:
            return batch.probabilities.mean()

    def softmax(spatial_dims: int, num_classes: int) -> Softmax:
        return Softmax(spatial_dims=spatial_dims, num_classes=num_classes)

    register_loss("softmax-only", softmax, overwrite=True)
    with pytest.raises(InputError, match="the labels are regions"):
        make("softmax-only")
    with pytest.raises(InputError, match="was made for label_regions"):
        knowing_regions(make("dice"), ((1, 2),), "loss Dice")
    with pytest.raises(InputError, match="was made for label_regions"):
        knowing_regions(make("dice"), None, "loss Dice")
    with pytest.raises(InputError, match="differ in"):
        WeightedSum([make("dice"), make("dice", ((1, 2), (2,), (3,)))])
    with pytest.raises(TypeError, match="label_regions"):
        CrossEntropy(spatial_dims=3, num_classes=3, label_regions=REGIONS)
