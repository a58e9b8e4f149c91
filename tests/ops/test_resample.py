"""Pooling and interpolation by 2: by hand, against PyTorch's own in float64, odd sizes, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparing import check_against_oracle
from torch import Tensor

from lightm.ops import avg_pool2, max_pool2, upsample_linear2

OPERATORS = [max_pool2, avg_pool2, upsample_linear2]
SHAPES = [(1, 4, 6, 8, 32), (2, 5, 3, 4, 20), (2, 9, 8, 16), (2, 40, 2, 3), (1, 6, 6, 6, 1), (1, 2, 2, 2, 3)]


def test_pooling_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 9.0], [4.0, 5.0, 9.0]]).reshape(1, 2, 3, 1)
    assert max_pool2(x).flatten().tolist() == [5.0]
    assert avg_pool2(x).flatten().tolist() == [3.0]


def test_interpolation_by_hand() -> None:
    x = torch.tensor([[0.0, 4.0]]).reshape(1, 1, 2, 1)
    expected = [[0.0, 1.0, 3.0, 4.0]] * 2
    assert upsample_linear2(x)[0, ..., 0].tolist() == expected


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_oracle(operator: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)

    def call(impl: str) -> Any:
        return lambda x: (operator(x, impl),)

    # in bfloat16 equal numbers meet in a block, and which of them gets the gradient is a matter of definition
    dtypes = (torch.float32,) if operator is max_pool2 else (torch.float32, torch.bfloat16)
    check_against_oracle(call("cpu"), call("reference"), {"x": x}, dtypes)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 16), (1, 1, 3, 2)])
def test_single_voxels_double(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    torch.testing.assert_close(upsample_linear2(x, "cpu"), upsample_linear2(x, "reference"))


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradient_sums_are_kept(operator: Callable[..., Tensor]) -> None:
    # every output hands its whole gradient to inputs: max 1 voxel, mean 8 eighths, interpolation weights sum to 1
    x = torch.randn(1, 4, 6, 8, 16, requires_grad=True)
    y = operator(x)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.double().sum().item() == pytest.approx(y.numel(), rel=1e-6)


def test_ties_go_to_the_first() -> None:
    x = torch.ones(1, 2, 2, 1, requires_grad=True)
    max_pool2(x).sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [1.0, 0.0, 0.0, 0.0]


def test_not_a_number_is_not_hidden() -> None:
    for k in range(4):
        x = torch.zeros(1, 2, 2, 16)
        x[0, k // 2, k % 2, 3] = float("nan")
        pooled = max_pool2(x).flatten()
        assert pooled.isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("operator", OPERATORS)
def test_strides_and_repeats(operator: Callable[..., Tensor]) -> None:
    x = torch.randn(2, 16, 4, 4, 6).movedim(1, -1)
    assert torch.equal(operator(x), operator(x.contiguous()))


@pytest.mark.parametrize("kind", ["max", "avg"])
def test_pool_registration_is_sound(kind: str) -> None:
    args = (torch.randn(1, 4, 4, 16, requires_grad=True), kind)
    torch.library.opcheck(torch.ops.lightm.pool2.default, args)


def test_upsample_registration_is_sound() -> None:
    args = (torch.randn(1, 4, 4, 16, requires_grad=True),)
    torch.library.opcheck(torch.ops.lightm.upsample_linear2.default, args)


@pytest.mark.parametrize("operator", OPERATORS)
def test_refused(operator: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"x has shape \(3, 4, 2\), expected \(Bt, Y, X, C\)"):
        operator(torch.ones(3, 4, 2))
    with pytest.raises(ValueError, match=r"dtype torch\.int64"):
        operator(torch.ones(1, 4, 4, 2).long())


@pytest.mark.parametrize("operator", [max_pool2, avg_pool2])
def test_too_small_to_halve(operator: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="expected 2 voxels or more along every spatial axis"):
        operator(torch.ones(1, 4, 1, 2))
