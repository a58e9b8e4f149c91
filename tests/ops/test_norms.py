"""The fused norms: by hand, against the oracles, strides, threads, precision, errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comparing import Inputs, check_against_oracle, relative, run
from torch import Tensor
from torch.nn import functional

from lightm.ops import gated_norm, group_norm_relu

# (E, parts): parts of 8 and 16 channels have a path of their own; others are padded to vectors
WIDTHS = [(8, 1), (32, 4), (40, 5), (12, 1), (48, 4), (16, 1), (64, 4), (24, 1), (96, 4), (64, 1), (128, 1), (256, 2)]
ODD_WIDTHS = [(5, 1), (9, 3), (33, 3), (100, 4)]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _gated_inputs(batch: int, length: int, channels: int) -> Inputs:
    torch.manual_seed(0)
    tokens, vector = (batch, length, channels), (channels,)
    inputs = {"y": 2 * torch.randn(tokens) + 0.5, "z": 2 * torch.randn(tokens)}
    return {**inputs, "weight": torch.randn(vector), "bias": torch.randn(vector)}


def _group_inputs(shape: tuple[int, ...]) -> Inputs:
    torch.manual_seed(0)
    return {"x": 2 * torch.randn(shape) + 1, "weight": torch.randn(shape[-1]), "bias": torch.randn(shape[-1])}


def _gated(parts: int, impl: str) -> Any:
    return lambda **given: (gated_norm(**given, parts=parts, impl=impl),)


def _group(groups: int, impl: str) -> Any:
    return lambda **given: (group_norm_relu(**given, groups=groups, impl=impl),)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_by_hand(impl: str) -> None:
    y, one = torch.tensor([[[1.0, 3.0, 10.0, 10.0]]]), torch.ones(4)
    out = gated_norm(y, torch.full((1, 1, 4), 50.0), 2 * one, one, parts=2, impl=impl)
    assert out.flatten().tolist() == pytest.approx([-50.0, 150.0, 50.0, 50.0], rel=1e-4)  # silu(50) = 50
    x = torch.tensor([[1.0, 10.0], [3.0, 10.0]]).reshape(1, 2, 2)
    out = group_norm_relu(x, 2, torch.tensor([2.0, 2.0]), torch.tensor([1.0, -1.0]), impl=impl)
    assert out.flatten().tolist() == pytest.approx([0.0, 0.0, 3.0, 0.0], rel=1e-4)


def test_references_are_pytorchs() -> None:
    y, z, weight, bias = (x.double() for x in _gated_inputs(2, 7, 12).values())
    parts = [functional.layer_norm(part, (4,)) for part in y.split(4, dim=-1)]
    expected = (torch.cat(parts, -1) * weight + bias) * functional.silu(z)
    torch.testing.assert_close(gated_norm(y, z, weight, bias, parts=3), expected)
    x, weight, bias = (x.double() for x in _group_inputs((2, 3, 4, 5, 12)).values())
    expected = functional.relu(functional.group_norm(x.movedim(-1, 1), 3, weight, bias)).movedim(1, -1)
    torch.testing.assert_close(group_norm_relu(x, 3, weight, bias), expected)


def test_gradients_are_the_finite_differences() -> None:
    gated = [x.double().requires_grad_() for x in _gated_inputs(1, 3, 6).values()]
    assert torch.autograd.gradcheck(lambda *x: gated_norm(*x, parts=2), gated)
    group = [x.double().requires_grad_() for x in _group_inputs((2, 3, 2, 4)).values()]
    assert torch.autograd.gradcheck(lambda x, w, b: group_norm_relu(x, 2, w, b), group)


@pytest.mark.parametrize(("channels", "parts"), WIDTHS + ODD_WIDTHS)
@pytest.mark.parametrize(("batch", "length"), [(2, 1), (3, 63), (2, 1000)])
def test_gated_against_oracle(batch: int, length: int, channels: int, parts: int) -> None:
    check_against_oracle(_gated(parts, "cpu"), _gated(parts, "reference"), _gated_inputs(batch, length, channels))


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 1, 1, 16), 2),
        ((2, 7, 9, 8), 8),
        ((2, 5, 7, 9, 16), 8),
        ((1, 257, 32), 8),
        ((3, 3, 5, 7, 12), 3),
        ((2, 21, 17, 24), 1),
        ((1, 9, 11, 13, 64), 8),
        ((2, 40, 128), 16),
        ((1, 31, 33, 5), 5),
        ((1, 40, 60, 7), 1),
    ],
)
def test_group_against_oracle(shape: tuple[int, ...], groups: int) -> None:
    check_against_oracle(_group(groups, "cpu"), _group(groups, "reference"), _group_inputs(shape))


def test_strided_halves_and_strided_gradients() -> None:
    torch.manual_seed(1)
    both = torch.randn(2, 300, 64)
    weight, bias = torch.randn(32), torch.randn(32)
    results = []
    for copy in (False, True):
        leaf = both.clone().requires_grad_()
        y, z = (x.contiguous() if copy else x for x in leaf.chunk(2, dim=-1))
        out = gated_norm(y, z, weight, bias, parts=4)
        wide = torch.cat([out, out], -1)[..., 16:48]  # hands a strided gradient back
        (wide * both[..., :32]).sum().backward()
        assert leaf.grad is not None
        results.append((out.detach(), leaf.grad))
    assert all(map(torch.equal, *results))
    turned = both.transpose(1, 2).contiguous().transpose(1, 2)[..., :32]
    assert torch.equal(gated_norm(turned, turned, weight, bias), gated_norm(*[both[..., :32]] * 2, weight, bias))
    x = torch.randn(2, 16, 6, 7).movedim(1, -1)
    assert torch.equal(
        group_norm_relu(x, 4, weight[:16], bias[:16]), group_norm_relu(x.contiguous(), 4, weight[:16], bias[:16])
    )


def test_memory_beside_the_rows_is_left_alone() -> None:
    """Parts that do not fill a vector: numbers beside them, here NaN, are not read."""
    base = torch.full((1, 20, 40), float("nan"))
    base[..., 8:20] = torch.randn(1, 20, 12)
    inner = base[..., 8:20]
    out = gated_norm(inner, inner, torch.ones(12), torch.zeros(12))
    assert out.isfinite().all()
    torch.testing.assert_close(out, gated_norm(inner, inner, torch.ones(12), torch.zeros(12), impl="reference"))


@pytest.mark.usefixtures("threads")
def test_same_bits_for_any_number_of_threads() -> None:
    cases: list[tuple[Any, Inputs]] = [
        (_gated(4, "cpu"), _gated_inputs(2, 5000, 32)),
        (_gated(1, "cpu"), _gated_inputs(2, 3000, 48)),
        (_group(8, "cpu"), _group_inputs((2, 9, 20, 33, 32))),
    ]
    for call, inputs in cases:
        found = []
        for number in (1, 2, 3, 1):
            torch.set_num_threads(number)
            found.append(run(call, inputs, torch.float32))
        for other in found[1:]:
            assert all(torch.equal(value, other[name]) for name, value in found[0].items())


def test_large_image_far_from_zero() -> None:
    """float32 stays accurate over many voxels when the mean is large against the deviation."""
    torch.manual_seed(2)
    x = torch.randn(1, 64, 64, 64, 8) + 30
    weight, bias = torch.randn(8), torch.randn(8)
    expected = group_norm_relu(x.double(), 8, weight.double(), bias.double())
    assert relative(group_norm_relu(x, 8, weight, bias), expected) < 1e-5
    y = (torch.randn(1, 1000, 32) + 30).requires_grad_()
    one = torch.ones(32)
    expected = gated_norm(y.double(), y.double(), one.double(), one.double(), parts=4)
    assert relative(gated_norm(y, y, one, one, parts=4).detach(), expected.detach()) < 1e-5


def test_constant_channels_and_strong_gates_stay_finite() -> None:
    y = torch.full((1, 5, 32), 3.0, requires_grad=True)
    z = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4]).reshape(1, 5, 1).expand(1, 5, 32).clone().requires_grad_()
    out = gated_norm(y, z, torch.ones(32), torch.ones(32), parts=4)
    out.sum().backward()
    assert out.isfinite().all()
    assert out[0, 0].abs().max() < 1e-6
    for tensor in (y, z):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


def test_not_a_number_is_not_hidden() -> None:
    x = torch.zeros(1, 3, 3, 4)
    x[0, 1, 1, 0] = float("nan")
    out = group_norm_relu(x, 2, torch.ones(4), torch.ones(4))
    assert out[..., :2].isnan().all()
    assert out[..., 2:].isfinite().all()


def test_no_tokens() -> None:
    inputs = {"y": torch.ones(2, 0, 8), "z": torch.ones(2, 0, 8), "weight": torch.ones(8), "bias": torch.ones(8)}
    found = run(_gated(1, "cpu"), inputs, torch.float32)
    assert found["out0"].shape == (2, 0, 8)
    assert found["dweight"].tolist() == [0.0] * 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_result_types(dtype: torch.dtype) -> None:
    y = torch.randn(1, 3, 8).to(dtype).requires_grad_()
    weight = torch.ones(8, requires_grad=True)  # parameters may stay in float32
    for out in (gated_norm(y, y, weight, weight), group_norm_relu(y, 2, weight, weight)):
        assert out.dtype == dtype
        out.sum().backward()
        assert y.grad is not None
        assert y.grad.dtype == dtype


def test_operator_registration_is_sound() -> None:
    y, z, weight, bias = (x.requires_grad_() for x in _gated_inputs(1, 5, 16).values())
    torch.library.opcheck(torch.ops.lightm.gated_norm.default, (y, z, weight, bias, 2, 1e-5), rtol=1e-4, atol=1e-5)
    torch.library.opcheck(torch.ops.lightm.group_norm_relu.default, (y, 4, weight, bias, 1e-5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.ones(3, 4)}, r"y has shape \(3, 4\), expected \(Bt, L, E\)"),
        ({"z": torch.ones(1, 3, 8)}, r"z has shape \(1, 3, 8\), expected \(1, 3, 4\)"),
        ({"weight": torch.ones(2)}, r"weight has shape \(2,\), expected \(4,\) .* repeat it when parts share it"),
        ({"bias": torch.ones(1, 4)}, r"bias has shape \(1, 4\), expected \(4,\)"),
        ({"parts": 3}, "parts is 3, expected a divisor of the 4 channels"),
        ({"parts": 0}, "parts is 0, expected a divisor"),
        ({"eps": -1.0}, "eps is -1.0, expected 0 or more"),
        ({"y": torch.ones(1, 3, 4).int()}, "dtype torch.int32"),
        ({"z": torch.ones(1, 3, 4).double()}, "float64 does not mix"),
        ({"impl": "gpu"}, "impl is 'gpu'"),
    ],
)
def test_gated_refused(change: dict[str, Any], message: str) -> None:
    tokens, vector = torch.ones(1, 3, 4), torch.ones(4)
    given: dict[str, Any] = {"y": tokens, "z": tokens, "weight": vector, "bias": vector, **change}
    with pytest.raises(ValueError, match=message):
        gated_norm(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 4)}, r"x has shape \(3, 4\), expected \(Bt, \*spatial, C\)"),
        ({"x": torch.ones(1, 0, 4)}, "no empty axis"),
        ({"weight": torch.ones(2)}, r"weight has shape \(2,\), expected \(4,\)"),
        ({"bias": torch.ones(3)}, r"bias has shape \(3,\), expected \(4,\)"),
        ({"groups": 3}, "groups is 3, expected a divisor of the 4 channels"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"x": torch.ones(1, 3, 4).int()}, "dtype torch.int32"),
    ],
)
def test_group_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"x": torch.ones(1, 3, 4), "groups": 2, "weight": torch.ones(4), "bias": torch.ones(4)}
    with pytest.raises(ValueError, match=message):
        group_norm_relu(**{**given, **change})


def test_float64_takes_the_reference() -> None:
    x: Tensor = torch.ones(1, 3, 4).double()
    vector = torch.ones(4).double()
    assert gated_norm(x, x, vector, vector).dtype == torch.float64
    with pytest.raises(ValueError, match="impl='cpu' is not possible"):
        group_norm_relu(x, 2, vector, vector, impl="cpu")
