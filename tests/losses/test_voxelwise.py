"""TopK, binary cross-entropy and focal Tversky: values by hand, limits, options, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightm.errors import InputError
from lightm.losses import create_loss

# Two classes, four voxels: foreground probabilities and labels 1, 1, 0, 0.
FOREGROUND = torch.tensor([0.9, 0.5, 0.2, 0.1], dtype=torch.float64)
LOGITS = torch.stack([1 - FOREGROUND, FOREGROUND]).log()[None, :, None]
TARGET = torch.tensor([[[1, 1, 0, 0]]])
COSTS = [-math.log(0.9), -math.log(0.5), -math.log(0.8), -math.log(0.9)]
TP, FP, FN = 1.4, 0.3, 0.6


def make(name: str, *, classes: int = 2, **options: object) -> nn.Module:
    return create_loss(name, spatial_dims=2, num_classes=classes, **options)


def random(classes: int = 3, ignored: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, classes, 6, 7, generator=generator, dtype=torch.float64)
    target = torch.randint(0, classes, (2, 6, 7), generator=generator)
    if ignored:
        target[:, 2:4] = 255
    return logits, target


@pytest.mark.parametrize(("k", "voxels"), [(25, 1), (26, 2), (50, 2), (75, 3), (100, 4), (0.1, 1)])
def test_topk_by_hand(k: float, voxels: int) -> None:
    expected = sum(sorted(COSTS, reverse=True)[:voxels]) / voxels
    assert make("topk", k=k)(LOGITS, TARGET).item() == pytest.approx(expected, rel=1e-12)


def test_topk_rounds_the_number_of_voxels_and_not_the_noise_of_a_product() -> None:
    logits = torch.zeros(1, 2, 1, 300, dtype=torch.float64)
    logits[0, 1, 0, :21] = torch.arange(21, 0, -1)  # 7 per cent of 300 is 21, and 0.07 * 300 is more than 21
    target = torch.zeros(1, 1, 300, dtype=torch.int64)
    expected = functional.softplus(torch.arange(1, 22, dtype=torch.float64)).mean()
    torch.testing.assert_close(make("topk", k=7)(logits, target), expected)


@pytest.mark.parametrize("ignored", [False, True])
def test_topk_of_all_voxels_is_cross_entropy_and_of_fewer_is_more(ignored: bool) -> None:
    logits, target = random(ignored=ignored)
    every = make("topk", classes=3, k=100)(logits, target)
    torch.testing.assert_close(every, make("ce", classes=3)(logits, target))
    assert make("topk", classes=3, k=10)(logits, target) > make("topk", classes=3, k=50)(logits, target) > every


def test_topk_gives_gradient_to_the_hardest_voxels_alone() -> None:
    logits = LOGITS.clone().requires_grad_()
    make("topk", k=50)(logits, TARGET).backward()
    assert logits.grad is not None
    assert (logits.grad[0, 1, 0] != 0).tolist() == [False, True, True, False]


def test_topk_splits_the_last_places_among_voxels_that_tie() -> None:
    logits = torch.zeros(1, 2, 1, 4, dtype=torch.float64)
    logits[0, 1, 0, 0] = 2.0
    logits.requires_grad_()
    loss = make("topk", k=50)(logits, torch.zeros(1, 1, 4, dtype=torch.int64))
    assert loss.item() == pytest.approx((math.log1p(math.exp(2)) + math.log(2)) / 2, rel=1e-12)
    loss.backward()
    assert logits.grad is not None
    # d/dx of log(1 + e^x) at 2, and at 0 a third of one place for each of three voxels; two places in all.
    expected = [1 / (1 + math.exp(-2)) / 2] + 3 * [0.5 / 3 / 2]
    assert logits.grad[0, 1, 0].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [0.5, 10, 63])
def test_topk_agrees_with_sorting(k: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(2, 3, 40, 50, generator=generator, dtype=dtype)
    target = torch.randint(0, 3, (2, 40, 50), generator=generator)
    costs = functional.cross_entropy(logits.double(), target, reduction="none").flatten().sort(descending=True).values
    expected = costs[: math.ceil(4000 * k / 100)].mean().to(dtype)
    torch.testing.assert_close(make("topk", classes=3, k=k)(logits, target), expected)


def test_topk_says_nan_when_a_voxel_is() -> None:
    logits, target = random()
    logits[0, 1, 2, 3] = torch.nan
    assert make("topk", classes=3)(logits, target).isnan()


def test_binary_cross_entropy_by_hand() -> None:
    logits = torch.tensor([0.3, -1.2, 2.0, 0.0, 0.7, -0.4], dtype=torch.float64).reshape(1, 3, 1, 2)
    target = torch.tensor([[[0, 2]]])
    cost = [math.log1p(math.exp(-x)) if hit else math.log1p(math.exp(x)) for x, hit in
            [(0.3, True), (-1.2, False), (2.0, False), (0.0, False), (0.7, False), (-0.4, True)]]  # fmt: skip
    assert make("bce", classes=3)(logits, target).item() == pytest.approx(sum(cost) / 6, rel=1e-12)
    weighted = (1 * (cost[0] + cost[1]) / 2 + 3 * (cost[4] + cost[5]) / 2) / 4
    loss = make("bce", classes=3, class_weights=[1, 0, 3])
    assert loss(logits, target).item() == pytest.approx(weighted, rel=1e-12)


def test_binary_cross_entropy_agrees_with_pytorch_where_voxels_are_ignored() -> None:
    logits, target = random(ignored=True)
    kept = target != 255
    truth = functional.one_hot(target.masked_fill(~kept, 0), 3).movedim(-1, 1).double()
    every = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    expected = every[kept.unsqueeze(1).expand_as(every)].mean()
    torch.testing.assert_close(make("bce", classes=3)(logits, target), expected)


def test_focal_tversky_by_hand() -> None:
    index = (TP + 0.1) / (TP + 0.3 * FP + 0.7 * FN + 0.1)
    for gamma in (1.0, 4 / 3, 2.5):
        loss = make("focal-tversky", gamma=gamma, eps=0.1)
        assert loss(LOGITS, TARGET).item() == pytest.approx((1 - index) ** (1 / gamma), rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"batch": True}, {"include_background": True}, {"skip_absent": True}])
def test_focal_tversky_of_gamma_one_is_tversky(options: dict[str, bool]) -> None:
    logits, target = random()
    focal = make("focal-tversky", classes=3, gamma=1, alpha=0.4, beta=0.6, **options)
    torch.testing.assert_close(
        focal(logits, target), make("tversky", classes=3, alpha=0.4, beta=0.6, **options)(logits, target)
    )


def test_focal_tversky_has_no_infinite_slope_at_its_least_value() -> None:
    target = torch.ones(1, 4, 4, dtype=torch.int64)
    for shift in (5.0, 10.0, 20.0, 200.0):  # ever nearer to a perfect prediction
        logits = torch.zeros(1, 2, 4, 4)
        logits[:, 1] = shift
        logits.requires_grad_()
        value = make("focal-tversky")(logits, target)
        value.backward()
        assert logits.grad is not None
        assert torch.isfinite(logits.grad).all()
        assert logits.grad.abs().sum() < 1
        assert value < 0.1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("topk", {"k": 0}, "positive number"),
        ("topk", {"k": 101}, "at most 100"),
        ("topk", {"kk": 3}, "no option 'kk'"),
        ("bce", {"class_weights": [0, 0]}, "one above zero"),
        ("bce", {"class_weights": [1, 2, 3]}, "list of 2"),
        ("focal-tversky", {"gamma": 0}, "positive number"),
        ("focal-tverski", {}, "did you mean 'focal-tversky'"),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(name, **options)


def test_infinite_sums_of_finite_logits_change_nothing() -> None:
    logits = torch.zeros(1, 2, 4, 4)
    logits[0, 1, 0] = 3e38  # their sum is infinite in float32, no logit is
    target = torch.zeros(1, 4, 4, dtype=torch.int64)
    target[0, 0], target[0, 3] = 1, 255
    value = make("ce+dice")(logits, target)
    assert torch.isfinite(value)
    torch.testing.assert_close(value, make("ce+dice")(logits[:, :, :3], target[:, :3]))
