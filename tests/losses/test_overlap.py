"""Cross-entropy, Dice and Tversky: values by hand, gradients, ignored voxels, empty masks, half precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lightm.errors import InputError
from lightm.losses import NAMES, create_loss


def logits_of(probabilities: list[list[float]]) -> Tensor:
    """Logits (1, K, 1, voxels) whose softmax is the given table of one row per class."""
    return torch.tensor(probabilities, dtype=torch.float64).log()[None, :, None]


# Two classes, four voxels: foreground probabilities and labels 1, 1, 0, 0.
FOREGROUND = [0.9, 0.5, 0.2, 0.1]
LOGITS = logits_of([[1 - p for p in FOREGROUND], FOREGROUND])
TARGET = torch.tensor([[[1, 1, 0, 0]]])
TP, FP, FN = 1.4, 0.3, 0.6


def make(name: str, *, dims: int = 2, classes: int = 2, **options: object) -> torch.nn.Module:
    return create_loss(name, spatial_dims=dims, num_classes=classes, **options)


def test_dice_by_hand() -> None:
    smooth = 0.25
    expected = 1 - (2 * TP + smooth) / (2 * TP + FP + FN + smooth)
    assert make("dice", smooth=smooth)(LOGITS, TARGET).item() == pytest.approx(expected, rel=1e-12)


def test_dice_with_background_averages_both_classes() -> None:
    background = (1.7, 0.6, 0.3)
    expected = sum(1 - 2 * tp / (2 * tp + fp + fn) for tp, fp, fn in [background, (TP, FP, FN)]) / 2
    loss = make("dice", include_background=True, smooth=1e-12)
    assert loss(LOGITS, TARGET).item() == pytest.approx(expected, rel=1e-9)


def test_tversky_by_hand() -> None:
    expected = 1 - (TP + 0.1) / (TP + 0.3 * FP + 0.7 * FN + 0.1)
    loss = make("tversky", alpha=0.3, beta=0.7, eps=0.1)
    assert loss(LOGITS, TARGET).item() == pytest.approx(expected, rel=1e-12)


def test_cross_entropy_by_hand() -> None:
    expected = -(math.log(0.9) + math.log(0.5) + math.log(0.8) + math.log(0.9)) / 4
    assert make("ce")(LOGITS, TARGET).item() == pytest.approx(expected, rel=1e-12)
    weighted = -(math.log(0.9) + math.log(0.5) + 3 * (math.log(0.8) + math.log(0.9))) / 8
    assert make("ce", class_weights=[3, 1])(LOGITS, TARGET).item() == pytest.approx(weighted, rel=1e-12)


def test_batch_pools_counts_and_sample_averages_ratios() -> None:
    logits, target = torch.cat([LOGITS, -LOGITS]), torch.cat([TARGET, TARGET])
    other = (0.6, 1.7, 1.4)
    tp, fp, fn = (a + b for a, b in zip((TP, FP, FN), other, strict=True))
    pooled = 1 - 2 * tp / (2 * tp + fp + fn)
    mean = sum(1 - 2 * a / (2 * a + b + c) for a, b, c in [(TP, FP, FN), other]) / 2
    assert make("dice", batch=True, smooth=1e-12)(logits, target).item() == pytest.approx(pooled, rel=1e-9)
    assert make("dice", smooth=1e-12)(logits, target).item() == pytest.approx(mean, rel=1e-9)


def test_sum_weighs_its_parts() -> None:
    both = make("ce+dice", weights=(0.5, 2))(LOGITS, TARGET)
    assert both.item() == pytest.approx(
        0.5 * make("ce")(LOGITS, TARGET).item() + 2 * make("dice")(LOGITS, TARGET).item(), rel=1e-12
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 4)])
def test_gradient_against_finite_differences(name: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, *shape, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 3, (2, *shape), generator=generator)
    target[0, 0] = 255
    options = {"regions": 2} if "arsl" in name else {}
    loss = make(name, dims=len(shape), classes=3, **options)
    assert torch.autograd.gradcheck(lambda x: loss(x, target), (logits,), fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_ignored_voxels_count_for_nothing(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 12, generator=generator)
    target = torch.randint(0, 3, (2, 4, 12), generator=generator)
    options = {"region_size": (4, 4)} if "arsl" in name else {}
    loss = make(name, classes=3, **options)
    masked, hidden = logits.clone(), target.clone()
    masked[..., 8:] = torch.nan
    hidden[..., 8:] = 255
    masked.requires_grad_()
    value = loss(masked, hidden)
    value.backward()
    assert masked.grad is not None
    torch.testing.assert_close(value, loss(logits[..., :8], target[..., :8]))
    assert (masked.grad[..., 8:] == 0).all()
    assert (masked.grad[..., :8] != 0).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fill", [0, 2, 255])
@pytest.mark.parametrize("scale", [0.0, 60.0, -60.0])
def test_finite_on_masks_of_one_value(name: str, fill: int, scale: float) -> None:
    logits = torch.zeros(1, 3, 6, 6)
    logits[:, 1] = scale
    logits.requires_grad_()
    value = make(name, classes=3)(logits, torch.full((1, 6, 6), fill))
    value.backward()
    assert logits.grad is not None
    assert torch.isfinite(value)
    assert value >= 0
    assert torch.isfinite(logits.grad).all()


def test_absent_class() -> None:
    target = torch.zeros(1, 8, 8, dtype=torch.int64)
    logits = torch.zeros(1, 2, 8, 8)
    logits[:, 0] = 50.0
    assert make("dice")(logits, target).item() == pytest.approx(0, abs=1e-6)
    # Whatever its probability, the gradient of a class that is not in the label stays bounded.
    for shift in range(-30, 31, 3):
        logits = torch.zeros(1, 2, 8, 8)
        logits[:, 1] = float(shift)
        logits.requires_grad_()
        make("dice")(logits, target).backward()
        assert logits.grad is not None
        assert logits.grad[:, 1].abs().sum() <= 0.25 + 1e-6
    three = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(2, 8, 8, dtype=torch.int64)
    target[0, 2:5] = 1
    target[1, 2:5] = 1
    only_first = make("dice", classes=3, skip_absent=True)(three, target)
    merged = [1 - tversky_index(three[i].softmax(0)[1], target[i] == 1) for i in range(2)]
    torch.testing.assert_close(only_first, torch.stack(merged).mean())


def tversky_index(p: Tensor, g: Tensor) -> Tensor:
    return (2 * (p * g).sum() + 1e-5) / (p.sum() + g.sum() + 1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 2, 64, 64, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(0, 2, (1, 64, 64), generator=generator)
    loss = make(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(logits, target)
    value.backward()
    assert value.dtype == torch.float32
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(value, loss(logits.float(), target))


def test_cross_entropy_agrees_with_pytorch() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 4, 3, 4, 5, generator=generator)
    target = torch.randint(0, 4, (2, 3, 4, 5), generator=generator)
    target[:, 1] = 255
    expected = functional.cross_entropy(logits, target, ignore_index=255)
    torch.testing.assert_close(make("ce", dims=3, classes=4)(logits, target), expected)


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64), "expected .batch, 2 classes"),
        (torch.zeros(1, 2, 4, 4, 4), torch.zeros(1, 4, 4, 4, dtype=torch.int64), "2 spatial axes"),
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.int64), "without a channel axis"),
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4), "expected integer class indices"),
        (torch.zeros(1, 2, 4, 4), torch.full((1, 4, 4), 2), r"class index 2; expected 0\.\.1"),
        (torch.zeros(1, 2, 4, 4), torch.full((1, 4, 4), -1), "class index -1"),
    ],
)
def test_tensors_that_do_not_fit(logits: Tensor, target: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make("ce+dice")(logits, target)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ce+arls", {}, "did you mean 'arsl'"),
        ("dise", {}, "did you mean 'dice'"),
        ("", {}, "unknown loss"),
        ("ce+ce", {}, "twice"),
        ("ce+dice", {"smoth": 1}, "did you mean 'smooth'"),
        ("ce", {"smooth": 1}, "no option 'smooth'"),
        ("dice", {"weights": (1,)}, "nothing to weigh"),
        ("ce+dice", {"weights": (1, 2, 3)}, "expected a list of 2"),
        ("ce+dice", {"weights": (1, -2)}, "not negative"),
        ("dice", {"smooth": 0}, "positive number"),
        ("tversky", {"alpha": "much"}, "finite number"),
        ("ce", {"class_weights": [1]}, "expected a list of 2"),
        ("ce", {"ignore_index": 1}, "one of the 2 classes"),
        ("arsl", {"regions": 0}, "positive integer"),
        ("arsl", {"regions": (4, 4, 4)}, "2 of them"),
        ("arsl", {"regions": 4, "region_size": 8}, "not both"),
        ("arsl", {"reduction": "max"}, "'mean' or 'sum'"),
    ],
)
def test_create_loss_refuses(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(name, **options)


def test_text_is_no_number() -> None:
    with pytest.raises(InputError, match="smooth='1e-5'; expected a positive number"):
        make("dice", smooth="1e-5")


@pytest.mark.parametrize("options", [{"dims": 4}, {"classes": 1}])
def test_create_loss_refuses_dimensions(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="expected"):
        make("dice", **options)
