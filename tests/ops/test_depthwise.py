"""The depthwise convolution: against PyTorch's own, against the oracle, one channel, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparing import check_against_oracle
from torch.nn import functional

from lightm.ops import depthwise_conv


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_by_hand(impl: str) -> None:
    x = torch.zeros(1, 3, 3, 1)
    x[0, 1, 0, 0] = 2.0
    weight = torch.arange(9.0).reshape(3, 3, 1)
    # y[p] = sum_k w[k] x[p + k - 1]: the impulse at (1, 0) meets weight (2 - y, 1 - x)
    expected = torch.tensor([[14.0, 12.0, 0.0], [8.0, 6.0, 0.0], [2.0, 0.0, 0.0]])
    assert torch.equal(depthwise_conv(x, weight, impl)[0, ..., 0], expected)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_is_torchs_convolution(impl: str) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 5, 4, 20), torch.randn(20, 1, 3, 3, 3)
    expected = functional.conv3d(x.movedim(-1, 1), weight, padding=1, groups=20).movedim(1, -1)
    got = depthwise_conv(x, weight.squeeze(1).movedim(0, -1), impl)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_the_finite_differences() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((1, 3, 2, 2), (3, 3, 2))]
    assert torch.autograd.gradcheck(depthwise_conv, inputs)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 5, 6, 7, 32),
        (2, 1, 4, 1, 20),
        (1, 1, 1, 1, 3),
        (1, 6, 6, 6, 1),
        (2, 9, 8, 16),
        (1, 33, 3, 100),
        (3, 1, 1, 1),
    ],
)
def test_against_oracle(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    inputs = {"x": torch.randn(shape), "weight": torch.randn(*(3,) * (len(shape) - 2), shape[-1])}

    def call(impl: str) -> Any:
        return lambda **given: (depthwise_conv(**given, impl=impl),)

    check_against_oracle(call("cpu"), call("reference"), inputs)


def test_strides_and_repeats() -> None:
    torch.manual_seed(2)
    first = torch.randn(1, 16, 4, 5, 6, requires_grad=True)
    weight = torch.randn(3, 3, 3, 16, requires_grad=True)
    results = []
    for x in (first.movedim(1, -1), first.movedim(1, -1).contiguous()):
        y = depthwise_conv(x, weight)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (first, weight))))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


def test_operator_registration_is_sound() -> None:
    args = (torch.randn(1, 3, 4, 16, requires_grad=True), torch.randn(3, 3, 16, requires_grad=True))
    torch.library.opcheck(torch.ops.lightm.depthwise_conv.default, args, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(3, 4, 2), torch.ones(3, 3, 2), r"x has shape \(3, 4, 2\), expected \(Bt, Y, X, C\)"),
        (torch.ones(1, 3, 4, 2), torch.ones(2, 1, 3, 3), r"weight has shape \(2, 1, 3, 3\), expected \(3, 3, 2\)"),
        (torch.ones(1, 3, 4, 2), torch.ones(3, 3, 2).double(), "float64 does not mix"),
    ],
)
def test_refused(x: torch.Tensor, weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        depthwise_conv(x, weight)
