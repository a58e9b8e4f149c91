"""The linear layer: by hand, against the oracle, strides, packing, threads, few rows, precision, errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from comparing import Inputs, check_against_oracle, relative, run
from torch import Tensor
from torch.nn import functional

from lightm.ops import linear
from lightm.ops.linear import linear_op, linear_weight_grad

# rows, C, C_out: below, at and above the blocks of rows, the vectors of columns and the blocks of vectors
SIZES = [
    (1, 1, 1), (1, 3, 7), (3, 1, 15), (7, 3, 16), (12, 16, 33), (13, 15, 17), (5, 33, 1), (65, 17, 34), (64, 100, 3),
    (241, 16, 64), (100, 34, 100), (250, 7, 130), (1921, 5, 31), (2049, 33, 48), (4097, 130, 65),
]  # fmt: skip


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _inputs(rows: int, channels: int, columns: int, bias: bool = True) -> Inputs:
    generator = torch.Generator().manual_seed(rows * 1000 + channels)
    inputs = {
        "x": torch.randn(rows, channels, generator=generator),
        "weight": torch.randn(columns, channels, generator=generator),
    }
    if bias:
        inputs["bias"] = torch.randn(columns, generator=generator)
    return inputs


def _call(impl: str) -> Any:
    return lambda **given: (linear(**given, impl=impl),)


@pytest.mark.parametrize("impl", ["cpu", "reference", "auto"])
def test_by_hand(impl: str) -> None:
    x, weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[10.0, 1.0], [0.0, -1.0], [1.0, 1.0]])
    y = linear(x, weight, torch.tensor([0.5, 0.0, -1.0]), impl)
    assert y.tolist() == [[12.5, -2.0, 2.0], [34.5, -4.0, 6.0]]


@pytest.mark.parametrize(("rows", "channels", "columns"), SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_against_oracle(rows: int, channels: int, columns: int, bias: bool) -> None:
    inputs = _inputs(rows, channels, columns, bias)
    check_against_oracle(_call("cpu"), _call("reference"), inputs, (torch.float32,))


@pytest.mark.parametrize("shape", [(16,), (2, 3, 16), (2, 1, 4, 3, 16), (1, 1, 16)])
def test_any_number_of_axes(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(shape), "weight": torch.randn(5, 16), "bias": torch.randn(5)}
    check_against_oracle(_call("cpu"), _call("reference"), inputs, (torch.float32,))
    assert linear(**inputs, impl="cpu").shape == (*shape[:-1], 5)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_empty(impl: str) -> None:
    x, weight, bias = (torch.zeros(size, requires_grad=True) for size in ((2, 0, 4), (3, 4), (3,)))
    y = linear(x, weight, bias, impl)
    assert y.shape == (2, 0, 3)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    for one in (weight, bias):
        assert one.grad is not None
        assert torch.equal(one.grad, torch.zeros_like(one))


def _views(x: Tensor) -> dict[str, Tensor]:
    """Tensors of other strides, 24 channels wide, made of x (4, 40, 48)."""
    return {
        "tokens": x[:, 3::2, :24],
        "channels": x[..., 17:41],
        "every second channel": x[..., ::2],
        "transposed": x[..., :24].transpose(0, 1),
        "channels first": x.transpose(1, 2)[:, :24].transpose(1, 2),
        "channels outermost": x[:, :24, :].movedim(1, -1),
        "repeated rows": x[:1, :1, :24].expand(5, 30, 24),
        "repeated channel": x[..., :1].expand(4, 40, 24),
        "part of a row": x.flatten()[5 : 5 + 24 * 70].view(70, 24),
    }


@pytest.mark.parametrize("name", list(_views(torch.empty(4, 40, 48))))
def test_strides(name: str) -> None:
    torch.manual_seed(0)
    base, weights, biases = torch.randn(4, 40, 48), torch.randn(48, 64), torch.randn(80)
    cuts: list[Callable[[Tensor], Tensor]] = [
        lambda w: w[:24, 3:40].t(), lambda w: w.t()[::2, ::2], lambda w: w[:1, :1].expand(9, 24)
    ]  # fmt: skip
    for cut in cuts:
        found = []
        for impl, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
            x, weight, bias = (given.clone().to(dtype).requires_grad_() for given in (base, weights, biases))
            small = cut(weight)
            y = linear(_views(x)[name], small, bias[::2][: small.shape[0]], impl)
            # the gradient sent back has a stride of 0 along the last axis
            (y.square().sum() + (3 * y).sum()).backward()
            found.append([y.detach(), *(one.grad for one in (x, weight, bias))])
        for got, expected in zip(*found, strict=True):
            assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("parts", [1, 2, 4, 5])
@pytest.mark.parametrize(("rows", "wide", "high"), [(3, 1, 2), (33, 4, 16), (250, 8, 7), (2100, 16, 20)])
def test_parts_are_products_side_by_side(parts: int, rows: int, wide: int, high: int) -> None:
    torch.manual_seed(0)
    shapes = {"x": (rows, parts * wide), "weight": (parts, high, wide), "bias": (parts * high,)}
    inputs = {name: torch.randn(shape) for name, shape in shapes.items()}

    def one_by_one(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        each = zip(x.chunk(parts, -1), weight, bias.chunk(parts), strict=True)
        return (torch.cat([functional.linear(*given) for given in each], dim=-1),)

    for impl in ("cpu", "reference"):
        check_against_oracle(_call(impl), one_by_one, inputs, (torch.float32,))


@pytest.mark.parametrize(("parts", "wide", "high"), [(1, 20, 50), (2, 7, 16), (4, 16, 8), (3, 5, 40), (8, 4, 5)])
def test_packed_blocks_are_the_dense_product(parts: int, wide: int, high: int) -> None:
    from lightm.ops.bounds import address
    from lightm.ops.matmul_cpu import SCRATCH, Packed, matmul_kernel

    torch.manual_seed(0)
    x, bias = torch.randn(50, parts * wide), torch.randn(parts * high + 4 * parts + parts)
    # three segments of columns one after the other, each block diagonal over all rows
    blocks = [torch.block_diag(*torch.randn(parts, wide, columns)) for columns in (high, 4, 1)]
    dense = torch.cat(blocks, dim=1)
    packed = Packed(dense, bias, spans=[(block.shape[1], parts) for block in blocks])
    assert packed.weight.numel() <= Packed(dense, bias).weight.numel()
    out, scratch = torch.full((51, packed.columns), 7.0), torch.empty(SCRATCH // 4)
    plan, count, weight, shift = packed.arguments
    row = 4 * packed.columns
    matmul_kernel(plan, count, address(x), 4 * x.shape[1], weight, shift, address(out), row, 50, address(scratch))
    assert relative(out[:50], x.double() @ dense.double() + bias) < 1e-6
    assert torch.equal(out[50], torch.full_like(out[50], 7.0))  # nothing beyond the rows is written
    single = Packed(blocks[0], groups=parts)
    wanted = Packed(blocks[0])
    if wide * parts >= 32 and high % 16 == 0:
        assert single.weight.numel() * parts == wanted.weight.numel()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("rows", "channels", "columns"), [(20000, 24, 33), (7000, 64, 128)])
def test_bit_equal_on_any_number_of_threads(rows: int, channels: int, columns: int) -> None:
    inputs = _inputs(rows, channels, columns)
    found = []
    for count in (1, 2, 4, 4):
        torch.set_num_threads(count)
        found.append(run(_call("cpu"), inputs, torch.float32))
    for name in found[0]:
        assert all(torch.equal(found[0][name], other[name]) for other in found[1:]), name


def test_memory_that_nobody_wrote_does_not_matter() -> None:
    inputs = _inputs(2100, 20, 35)
    expected = run(_call("cpu"), inputs, torch.float32)
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    try:
        assert torch.empty(4).isnan().all()
        got = run(_call("cpu"), inputs, torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def test_few_rows_and_other_types_go_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    # not the package's `linear`, which is the function
    module = sys.modules["lightm.ops.linear"]
    monkeypatch.setattr(module, "linear_op", lambda *given: calls.append(1) or functional.linear(*given))
    weight = torch.randn(5, 8)
    linear(torch.randn(4, 15, 8), weight)
    linear(torch.randn(100, 8).bfloat16(), weight.bfloat16())
    linear(torch.randn(100, 8).double(), weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(100, 8), weight).dtype == torch.bfloat16
    assert not calls
    linear(torch.randn(4, 16, 8), weight)
    assert calls == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    given = {name: value.to(dtype) for name, value in _inputs(100, 20, 30).items()}
    y = linear(**given)
    assert y.dtype == dtype
    assert relative(y, linear(**{name: value.double() for name, value in given.items()})) < 1e-2


def test_gradients_are_the_finite_differences() -> None:
    inputs = [x.double().requires_grad_() for x in _inputs(5, 6, 4).values()]
    assert torch.autograd.gradcheck(linear, inputs)
    assert torch.autograd.gradgradcheck(linear, inputs)


@pytest.mark.parametrize("parts", [0, 2])
def test_second_derivatives(parts: int) -> None:
    torch.manual_seed(0)
    given = (torch.randn(70, 12), torch.randn(parts, 4, 12 // parts) if parts else torch.randn(8, 12), torch.randn(8))
    found = []
    for impl, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        leaves = [x.clone().to(dtype).requires_grad_() for x in given]
        first = torch.autograd.grad(linear(*leaves, impl).square().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(torch.stack([g.square().mean() for g in first]).sum(), leaves))
    for got, expected in zip(*found, strict=True):
        assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_gradients_that_are_asked_for(needed: tuple[bool, ...]) -> None:
    given = [x.requires_grad_(on) for x, on in zip(_inputs(70, 8, 6).values(), needed, strict=True)]
    linear(*given, impl="cpu").sum().backward()
    assert tuple(x.grad is not None for x in given) == needed


@pytest.mark.slow
@pytest.mark.parametrize("parts", [0, 3])
def test_registered_operators(parts: int) -> None:
    x, grad = torch.randn(9, 6, requires_grad=True), torch.randn(9, 12, requires_grad=True)
    weight = torch.randn(parts, 4, 2) if parts else torch.randn(12, 6)
    weight.requires_grad_()
    for bias in (torch.randn(12, requires_grad=True), None):
        torch.library.opcheck(torch.ops.lightm.linear.default, (x, weight, bias))
    torch.library.opcheck(torch.ops.lightm.linear_weight_grad.default, (x, grad, parts or 1))


def test_shapes_without_memory() -> None:
    x, weight = torch.empty(2, 100, 6, device="meta"), torch.empty(4, 6, device="meta")
    assert linear(x, weight, impl="cpu").shape == (2, 100, 4)
    assert linear_op(x, torch.empty(3, 5, 2, device="meta"), None).shape == (2, 100, 15)
    assert linear_weight_grad(x, torch.empty(2, 100, 4, device="meta"), 2).shape == (2, 2, 3)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "impl", "message"),
    [
        (torch.ones(2, 3), torch.ones(4, 5), None, "auto", r"x \(2, 3\) and weight \(4, 5\): expected \(..., C\)"),
        (torch.ones(2, 3), torch.ones(2, 4, 3), None, "auto", r"\(G, C_out / G, C / G\)"),
        (torch.ones(2, 3), torch.ones(3), None, "auto", r"weight \(3,\)"),
        (torch.tensor(1.0), torch.ones(3, 1), None, "auto", r"x \(\)"),
        (torch.ones(2, 3), torch.ones(4, 3), torch.ones(3), "auto", r"bias has shape \(3,\), expected \(4,\)"),
        (torch.ones(2, 3), torch.ones(4, 3).double(), None, "auto", "float64 does not mix"),
        (torch.ones(2, 3), torch.ones(4, 3, dtype=torch.int64), None, "auto", "expected float32"),
        (torch.ones(2, 3), torch.ones(4, 3), None, "cuda", "impl is 'cuda'"),
        (torch.ones(2, 3), torch.ones(4, 3), None, "triton", "impl is 'triton'"),
        (torch.ones(2, 3).double(), torch.ones(4, 3).double(), None, "cpu", "impl='cpu' is not possible"),
        (torch.ones(2, 3).half(), torch.ones(4, 3).half(), None, "cpu", "the kernels multiply float32 only"),
    ],
)
def test_errors(x: Tensor, weight: Tensor, bias: Tensor | None, impl: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear(x, weight, bias, impl)


@pytest.mark.parametrize(("channels", "columns"), [(0, 3), (4, 0), (0, 0)])
def test_no_channels(channels: int, columns: int) -> None:
    bias = torch.arange(float(columns))
    y = linear(torch.randn(100, channels), torch.randn(columns, channels), bias)
    assert y.shape == (100, columns)
    if channels == 0:
        assert torch.equal(y, bias.expand(100, columns))
    with pytest.raises(ValueError, match="there are no channels"):
        linear(torch.randn(100, channels), torch.randn(columns, channels), bias, "cpu")
