"""The causal convolution: by hand, against the oracle, causality, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparing import check_against_oracle
from torch import Tensor
from torch.nn import functional

from lightm.ops import causal_conv1d


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_by_hand(impl: str) -> None:
    x = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1)
    y = causal_conv1d(x, torch.tensor([[10.0, 1.0]]), torch.tensor([0.5]), impl=impl)
    assert y.flatten().tolist() == [1.5, 12.5, 23.5]  # 10 * previous + 1 * this + 0.5


def test_reference_is_torchs_convolution() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 9, 5).double(), torch.randn(5, 4).double(), torch.randn(5).double()
    expected = functional.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=3, groups=5)[..., :9]
    torch.testing.assert_close(causal_conv1d(x, weight, bias), expected.transpose(1, 2))


def test_gradients_are_the_finite_differences() -> None:
    torch.manual_seed(0)
    shapes = ((1, 5, 3), (3, 2), (3,))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *x: causal_conv1d(*x, activation="silu"), inputs)


@pytest.mark.parametrize(
    ("shape", "kernel_size", "bias", "activation"),
    [
        ((1, 1, 16), 4, True, "silu"),
        ((2, 2, 4), 4, False, None),
        ((1, 3, 100), 3, True, None),
        ((2, 511, 24), 4, False, "silu"),
        ((1, 514, 64), 4, True, "silu"),
        ((1, 1030, 20), 1, True, "silu"),
    ],
)
def test_against_oracle(shape: tuple[int, int, int], kernel_size: int, bias: bool, activation: str | None) -> None:
    torch.manual_seed(1)
    inputs = {"x": torch.randn(shape), "weight": torch.randn(shape[2], kernel_size)}
    if bias:
        inputs["bias"] = torch.randn(shape[2])

    def call(impl: str) -> Any:
        return lambda **given: (causal_conv1d(**given, activation=activation, impl=impl),)

    check_against_oracle(call("cpu"), call("reference"), inputs)


def test_strides_and_repeats() -> None:
    torch.manual_seed(2)
    wide = torch.randn(2, 600, 80)
    weight = torch.randn(40, 4)
    half = wide[..., 40:]
    expected = causal_conv1d(half.contiguous(), weight, activation="silu")
    assert torch.equal(causal_conv1d(half, weight, activation="silu"), expected)
    turned = half.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(causal_conv1d(turned, weight, activation="silu"), expected)


def test_the_past_does_not_see_the_future() -> None:
    x = torch.randn(1, 50, 16)
    changed = x.clone()
    changed[:, 30:] += 1
    weight = torch.randn(16, 4)
    assert torch.equal(causal_conv1d(x, weight)[:, :30], causal_conv1d(changed, weight)[:, :30])


def test_operator_registration_is_sound() -> None:
    args = (torch.randn(1, 5, 16, requires_grad=True), torch.randn(16, 4, requires_grad=True), None, True)
    torch.library.opcheck(torch.ops.lightm.causal_conv1d.default, args, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 4)}, r"x has shape \(3, 4\), expected \(Bt, L, E\)"),
        ({"weight": torch.ones(4, 1, 2)}, r"weight has shape \(4, 1, 2\), expected \(4, K\)"),
        ({"bias": torch.ones(3)}, r"bias has shape \(3,\), expected \(4,\)"),
        ({"activation": "relu"}, "activation is 'relu', expected None or 'silu'"),
        ({"x": torch.ones(1, 3, 4).int()}, "dtype torch.int32"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"x": torch.ones(1, 3, 4), "weight": torch.ones(4, 2), **change}
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**given)


def test_bfloat16_result() -> None:
    y: Tensor = causal_conv1d(torch.ones(1, 3, 4, dtype=torch.bfloat16), torch.ones(4, 2))
    assert y.dtype == torch.bfloat16
