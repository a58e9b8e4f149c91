"""ARSL: the formula by hand, its limits (Tversky, Dice), and the grid of regions."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightm.losses import AdaptiveRegion, create_loss
from lightm.losses.regions import Grid, soft_counts

A, B, EPS = 0.3, 0.4, 1e-5


def example(
    shape: tuple[int, ...], classes: int = 3, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch, classes, *shape, generator=generator, dtype=dtype)
    return logits, torch.randint(0, classes, (batch, *shape), generator=generator)


def arsl(shape: tuple[int, ...], classes: int = 3, **options: object) -> AdaptiveRegion:
    loss = create_loss("arsl", spatial_dims=len(shape), num_classes=classes, **options)
    assert isinstance(loss, AdaptiveRegion)
    return loss


def region_value(p: Tensor, g: Tensor, eps: float = EPS) -> Tensor:
    tp, fp, fn = (p * g).sum(), (p * (1 - g)).sum(), ((1 - p) * g).sum()
    alpha = A + B * (fp + eps) / (fp + fn + eps)
    beta = A + B * (fn + eps) / (fp + fn + eps)
    return 1 - (tp + eps) / (tp + alpha * fp + beta * fn + eps)


def test_by_hand() -> None:
    # Two regions of two voxels: (TP, FP, FN) = (0.9, 0.4, 0.1) and (0.5, 0.2, 0.5).
    p = torch.tensor([0.9, 0.4, 0.5, 0.2], dtype=torch.float64)
    logits = torch.stack([1 - p, p]).log()[None, :, None]
    target = torch.tensor([[[1, 0, 1, 0]]])
    first = 1 - 0.9 / (0.9 + (0.3 + 0.4 * 0.4 / 0.5) * 0.4 + (0.3 + 0.4 * 0.1 / 0.5) * 0.1)
    second = 1 - 0.5 / (0.5 + (0.3 + 0.4 * 0.2 / 0.7) * 0.2 + (0.3 + 0.4 * 0.5 / 0.7) * 0.5)
    for reduction, expected in [("mean", (first + second) / 2), ("sum", first + second)]:
        loss = arsl((1, 4), classes=2, regions=(1, 2), eps=1e-12, reduction=reduction)
        assert loss(logits, target).item() == pytest.approx(expected, rel=1e-9)
        same = arsl((1, 4), classes=2, region_size=(1, 2), eps=1e-12, reduction=reduction)
        assert same(logits, target).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shape", [(9, 6), (5, 6, 7)])
@pytest.mark.parametrize("options", [{}, {"batch": True}, {"include_background": True}])
def test_one_region_without_adaptation_is_tversky_and_dice(shape: tuple[int, ...], options: dict[str, bool]) -> None:
    logits, target = example(shape)
    value = arsl(shape, regions=1, a=0.5, b=0, **options)(logits, target)
    make = {"spatial_dims": len(shape), "num_classes": 3, **options}
    torch.testing.assert_close(value, create_loss("tversky", alpha=0.5, beta=0.5, **make)(logits, target))
    torch.testing.assert_close(value, create_loss("dice", smooth=2 * EPS, **make)(logits, target))


@pytest.mark.parametrize(
    ("options", "edges"),
    [
        ({"region_size": 4}, ([0, 4, 8, 10], [0, 4, 7], [0, 4, 8, 9])),
        ({"region_size": (3, 7, 20)}, ([0, 3, 6, 9, 10], [0, 7], [0, 9])),
        ({"regions": 3}, ([0, 4, 7, 10], [0, 3, 5, 7], [0, 3, 6, 9])),
        ({"regions": (1, 7, 100)}, ([0, 10], list(range(8)), list(range(10)))),
    ],
)
def test_ragged_grid_equals_a_loop_over_slices(options: dict[str, object], edges: tuple[list[int], ...]) -> None:
    shape = (10, 7, 9)
    logits, target = example(shape)
    p = logits.softmax(1)
    values = [
        region_value(p[(b, k, *box)], (target[(b, *box)] == k).double())
        for b in range(2)
        for k in (1, 2)
        for box in product(*([slice(i, j) for i, j in pairwise(e)] for e in edges))
    ]
    torch.testing.assert_close(arsl(shape, **options)(logits, target), torch.stack(values).mean())


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=3),
    count=st.integers(1, 12),
    by_size=st.booleans(),
)
def test_every_voxel_is_in_exactly_one_region(shape: list[int], count: int, by_size: bool) -> None:
    make = Grid.by_size if by_size else Grid.by_count
    grid = make(shape, [count] * len(shape))
    assert [sum(sizes) for sizes in grid.sizes] == shape
    assert all(min(sizes) >= 1 for sizes in grid.sizes)
    if not by_size:
        assert grid.shape == tuple(min(count, length) for length in shape)
        assert all(max(sizes) - min(sizes) <= 1 for sizes in grid.sizes)
    values = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    sums = grid.sum(values)
    assert sums.shape == grid.shape
    assert sums.sum() == values.sum()
    # Spreading is the adjoint of summing: <sum(v), w> = <v, spread(w)>.
    weights = torch.arange(sums.numel(), dtype=torch.float64).reshape(sums.shape) + 1
    assert (sums * weights).sum() == (values * grid.spread(weights)).sum()


def test_order_of_regions_does_not_matter() -> None:
    shape = (8, 12)
    logits, target = example(shape)
    loss = arsl(shape, region_size=(4, 4))
    order = torch.cat([torch.arange(8, 12), torch.arange(0, 4), torch.arange(4, 8)])
    torch.testing.assert_close(loss(logits[..., order], target[..., order]), loss(logits, target))
    torch.testing.assert_close(loss(logits.flip(2), target.flip(1)), loss(logits, target))


@pytest.mark.parametrize("detach", [False, True])
def test_gradient(detach: bool) -> None:
    shape = (5, 7)
    logits, target = example(shape)
    target[0, :3] = 0
    logits.requires_grad_()
    loss = arsl(shape, region_size=3, detach=detach, skip_empty=True)
    (grad,) = torch.autograd.grad(loss(logits, target), logits)
    if detach:
        # The same derivative by hand: a Tversky loss whose weights are numbers.
        grid = loss.grid(shape)
        counts = [c.detach() for c in soft_counts(logits.softmax(1), target, grid, first=1)]
        alpha, beta = loss._weights(counts[1], counts[2])
        p = logits.softmax(1)[:, 1:]
        g = torch.stack([target == k for k in (1, 2)], 1).to(p.dtype)
        tp, fp, fn = grid.sum(p * g), grid.sum(p * (1 - g)), grid.sum((1 - p) * g)
        kept = (tp + fn >= 0.5) | (tp + fp >= 0.5)
        ratio = 1 - (tp + EPS) / (tp + alpha * fp + beta * fn + EPS)
        (expected,) = torch.autograd.grad(ratio[kept].mean(), logits)
        torch.testing.assert_close(grad, expected)
    else:
        assert torch.autograd.gradcheck(lambda x: loss(x, target), (logits,))


def test_skip_empty_leaves_regions_without_label_and_prediction_out() -> None:
    target = torch.zeros(1, 4, 16, dtype=torch.int64)
    target[..., :4] = 1
    logits = torch.zeros(1, 2, 4, 16, dtype=torch.float64)
    logits[:, 0, :, 8:] = 12.0  # a trace of foreground only: 16 voxels of 6e-6
    p = logits.softmax(1)[0, 1]
    g = (target[0] == 1).double()
    values = [region_value(p[:, i : i + 4], g[:, i : i + 4]) for i in range(0, 16, 4)]
    kept = arsl((4, 16), classes=2, region_size=4, skip_empty=True)(logits, target)
    torch.testing.assert_close(kept, torch.stack(values[:2]).mean())
    every = arsl((4, 16), classes=2, region_size=4)(logits, target)
    torch.testing.assert_close(every, torch.stack(values).mean())
    assert abs(every - kept) > 0.01


def test_skip_empty_with_nothing_left_is_zero() -> None:
    logits = torch.zeros(1, 2, 8, 8)
    logits[:, 0] = 40.0
    logits.requires_grad_()
    value = arsl((8, 8), classes=2, skip_empty=True)(logits, torch.zeros(1, 8, 8, dtype=torch.int64))
    value.backward()
    assert value.item() == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("eps", [1e-7, 1e-5, 1e-1])
def test_empty_region_is_a_logistic_curve_in_the_logarithm_of_its_false_positives(eps: float) -> None:
    # The cliff of docs/results/arsl-cliff.md: half its height at FP = eps / (A+B), and the logistic function's slope.
    shape = (4, 4, 4)
    target = torch.zeros(1, *shape, dtype=torch.int64)
    loss = arsl(shape, classes=2, regions=1, eps=eps)
    for decades, expected in [(0.0, 0.5), (1.0, 10 / 11), (-1.0, 1 / 11), (2.0, 100 / 101)]:
        ln_fp = torch.tensor(eps / (A + B) * 10**decades, dtype=torch.float64).log().requires_grad_()
        p = (ln_fp.exp() / 64).expand(1, 1, *shape)
        value = loss(torch.cat([torch.log1p(-p), p.log()], dim=1), target)
        (slope,) = torch.autograd.grad(value, ln_fp)
        assert value.item() == pytest.approx(expected, rel=1e-9)
        assert slope.item() == pytest.approx(expected * (1 - expected), rel=1e-9)


def test_the_fall_is_the_share_of_empty_regions_and_skip_empty_has_none() -> None:
    # 3 of 4 regions are empty; the filled one is predicted equally well throughout.
    target = torch.zeros(1, 4, 16, dtype=torch.int64)
    target[..., :4] = 1

    def value(p_empty: float, **options: bool) -> float:
        p = torch.full((1, 4, 16), p_empty, dtype=torch.float64)
        p[..., :4] = 0.8
        logits = torch.stack([torch.log1p(-p), p.log()], dim=1)
        return float(arsl((4, 16), classes=2, region_size=4, **options)(logits, target))

    before, after = 1e-2, 1e-10  # 0.16 and 1.6e-9 voxels a region
    assert value(before) - value(after) == pytest.approx(0.75, abs=1e-3)
    assert value(before, skip_empty=True) == pytest.approx(value(after, skip_empty=True), abs=1e-12)


def test_batch_pools_the_counts_of_samples() -> None:
    shape = (6, 6)
    logits, target = example(shape)
    side_by_side = torch.cat([logits[:1], logits[1:]], dim=3)
    pooled = arsl(shape, regions=1, batch=True)(logits, target)
    joined = arsl((6, 12), regions=1)(side_by_side, torch.cat([target[:1], target[1:]], dim=2))
    torch.testing.assert_close(pooled, joined)


def test_coefficients_follow_the_kind_of_error() -> None:
    target = torch.ones(1, 8, 8, dtype=torch.int64)
    logits = torch.zeros(1, 2, 8, 8)
    logits[:, 0] = 4.0  # foreground missed everywhere
    alpha, beta = arsl((8, 8), classes=2, regions=2).coefficients(logits, target)
    assert alpha.shape == beta.shape == (1,)
    assert alpha.item() == pytest.approx(A, abs=1e-4)
    assert beta.item() == pytest.approx(A + B, abs=1e-4)


def test_small_counts_survive_large_sums_in_float32() -> None:
    # The difference of two sums near 65536 would be 0 where 2^-12 is right, and could be negative.
    p = torch.ones(1, 2, 64, 64, 16)
    p[0, 1, 5, 6, 7] = 1 - 2.0**-12
    target = torch.ones(1, 64, 64, 16, dtype=torch.int64)
    tp, fp, fn = soft_counts(p, target, Grid.whole((64, 64, 16)), first=1)
    assert (tp.item(), fp.item(), fn.item()) == (65536, 0, 2.0**-12)
