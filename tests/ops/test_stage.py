"""The fused decoder stage and head: against float64, all gradients, slabs, overwriting the skip, threads, errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comparing import Inputs, assert_close, relative, run
from torch import Tensor
from torch.nn import functional

from lightm.nets.blocks import DecoderStage
from lightm.ops import GroupNormParameters, decoder_head, decoder_stage, stage_cpu, stage_runs_fused

# (sizes of the low image, channels, groups)
SIZES = [
    ((1, 1), 8, 2), ((1, 5), 16, 8), ((3, 5), 24, 3), ((9, 2), 33, 3), ((1, 1, 1), 8, 4), ((1, 3, 2), 16, 8),
    ((3, 5, 1), 20, 5), ((5, 3, 7), 16, 1),
]  # fmt: skip


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _inputs(batch: int, sizes: tuple[int, ...], channels: int, scalar: bool = False) -> Inputs:
    torch.manual_seed(0)
    doubled = tuple(2 * size for size in sizes)
    shapes = {
        "low": (batch, *sizes, channels), "skip": (batch, *doubled, channels), "weight1": (channels,),
        "bias1": (channels,), "depthwise": ((3,) * len(sizes) + (channels,)), "pointwise": (channels, channels),
        "scale": (1,) if scalar else (channels,), "weight2": (channels,), "bias2": (channels,),
    }  # fmt: skip
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def _fused(groups: int, **options: Any) -> Any:
    def call(weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, **given: Tensor) -> tuple[Tensor]:
        norms = {
            "norm1": GroupNormParameters(weight1, bias1, groups, 1e-5),
            "norm2": GroupNormParameters(weight2, bias2, groups, 1e-4),
        }
        return (decoder_stage(**given, **norms, **options),)  # type: ignore[arg-type]

    return call


def _plain(groups: int) -> Any:
    """The same of PyTorch's own functions."""

    def call(
        low: Tensor, skip: Tensor, weight1: Tensor, bias1: Tensor, depthwise: Tensor, pointwise: Tensor, scale: Tensor,
        weight2: Tensor, bias2: Tensor,
    ) -> tuple[Tensor]:  # fmt: skip
        axes, channels = low.dim() - 2, low.shape[-1]
        mode, convolve = ("bilinear", functional.conv2d) if axes == 2 else ("trilinear", functional.conv3d)
        x = functional.interpolate(low.movedim(-1, 1), scale_factor=2, mode=mode) + skip.movedim(-1, 1)
        y = functional.relu(functional.group_norm(x, groups, weight1, bias1, 1e-5))
        y = convolve(y, depthwise.movedim(-1, 0)[:, None], padding=1, groups=channels)
        y = functional.linear(y.movedim(1, -1), pointwise) + scale * x.movedim(1, -1)
        y = functional.group_norm(y.movedim(-1, 1), groups, weight2, bias2, 1e-4)
        return (functional.relu(y).movedim(1, -1),)

    return call


@pytest.mark.parametrize(("sizes", "channels", "groups"), SIZES)
@pytest.mark.parametrize("scalar", [False, True])
def test_result_and_nine_gradients(sizes: tuple[int, ...], channels: int, groups: int, scalar: bool) -> None:
    inputs = _inputs(2, sizes, channels, scalar)
    got = run(_fused(groups), inputs, torch.float32)
    assert_close(got, run(_plain(groups), inputs, torch.float64), 2e-5)
    with torch.no_grad():
        assert torch.equal(_fused(groups)(**inputs)[0], got["out0"])


@pytest.mark.parametrize("sizes", [(5, 7), (5, 3, 4)])
def test_slabs_do_not_matter(monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]) -> None:
    inputs = _inputs(2, sizes, 24)
    whole = run(_fused(3), inputs, torch.float32)
    for slab, flat in ((1, 1), (3 * 24 * 2 * sizes[-1], 1000)):
        monkeypatch.setattr(stage_cpu, "_SLAB", slab)
        monkeypatch.setattr(stage_cpu, "_FLAT", flat)
        got = run(_fused(3), inputs, torch.float32)
        assert torch.equal(got["out0"], whole["out0"])
        assert_close(got, whole, 1e-6)  # sums over voxels are cut elsewhere


@pytest.mark.parametrize("sizes", [(6, 5), (3, 4, 5)])
def test_overwriting_the_skip(sizes: tuple[int, ...]) -> None:
    inputs = _inputs(2, sizes, 16)
    expected = _fused(4)(**inputs)[0]
    kept = inputs["skip"].clone()
    assert torch.equal(_fused(4, overwrite_skip=False)(**inputs)[0], expected)
    assert torch.equal(inputs["skip"], kept)
    assert torch.equal(_fused(4, overwrite_skip=True)(**inputs)[0], expected)
    assert not torch.equal(inputs["skip"], kept)
    # not where a gradient will need it, nor in memory of another layout
    graded = {**inputs, "skip": kept.clone(), "low": inputs["low"].clone().requires_grad_()}
    assert torch.equal(_fused(4, overwrite_skip=True)(**graded)[0], expected)
    assert torch.equal(graded["skip"], kept)
    turned = kept.movedim(-1, 1).contiguous().movedim(1, -1)
    assert torch.equal(_fused(4, overwrite_skip=True)(**{**inputs, "skip": turned})[0], expected)
    assert torch.equal(turned, kept)


def test_strides() -> None:
    inputs = _inputs(2, (3, 4), 16)
    expected = run(_fused(4), inputs, torch.float32)

    def turned(**given: Tensor) -> tuple[Tensor]:
        other = {name: x.movedim(-1, 0).contiguous().movedim(0, -1) for name, x in given.items()}
        assert not other["low"].is_contiguous()
        return _fused(4)(**other)

    assert_close(run(turned, inputs, torch.float32), expected, 1e-6)
    # the gradient of a sum is one number repeated
    found = []
    for call, dtype in ((_fused(4), torch.float32), (_plain(4), torch.float64)):
        given = {name: x.clone().to(dtype).requires_grad_() for name, x in inputs.items()}
        call(**given)[0].sum().backward()
        found.append({name: x.grad for name, x in given.items() if x.grad is not None})
    found = [{name: grad for name, grad in part.items() if name not in ("low", "skip")} for part in found]
    assert_close(*found, 1e-4)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("sizes", [(40, 30), (10, 12, 14)])
def test_bit_equal_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]) -> None:
    monkeypatch.setattr(stage_cpu, "_SLAB", 1 << 13)
    inputs = _inputs(2, sizes, 16)
    found = []
    for count in (1, 2, 4, 4):
        torch.set_num_threads(count)
        found.append(run(_fused(4), inputs, torch.float32))
    for name in found[0]:
        assert all(torch.equal(found[0][name], other[name]) for other in found[1:]), name


def test_memory_that_nobody_wrote_does_not_matter() -> None:
    for sizes in ((5, 3), (3, 2, 5)):
        inputs = _inputs(2, sizes, 20)
        expected = run(_fused(4), inputs, torch.float32)
        torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
        try:
            assert torch.empty(4).isnan().all()
            got = run(_fused(4), inputs, torch.float32)
        finally:
            torch.use_deterministic_algorithms(False)
        for name in expected:
            assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("axes", [2, 3])
def test_module_with_and_without_recomputation(vector: bool, axes: int) -> None:
    torch.manual_seed(0)
    stage = DecoderStage(32, axes, groups=4, vector_scale=vector)
    x, skip = torch.randn(2, *(3, 5, 2)[:axes], 32), torch.randn(2, *(6, 10, 4)[:axes], 16)
    found = []
    for on in (True, False):
        stage.checkpointing = on
        stage.zero_grad()
        given = [one.clone().requires_grad_() for one in (x, skip)]
        out = stage(*given)
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        found.append({"out": out.detach(), **{f"d{i}": one.grad for i, one in enumerate(given)}})
        found[-1] |= {name: one.grad for name, one in stage.named_parameters()}
    assert_close(*found, 2e-5)


@pytest.mark.parametrize("frozen", range(9))
def test_a_frozen_tensor_gets_no_gradient(frozen: int) -> None:
    inputs = _inputs(1, (3, 2), 8)
    given = {name: x.requires_grad_(index != frozen) for index, (name, x) in enumerate(inputs.items())}
    _fused(2)(**given)[0].square().sum().backward()
    assert [x.grad is None for x in given.values()] == [index == frozen for index in range(9)]


@pytest.mark.parametrize("flat", [1, 100, 1 << 16])
@pytest.mark.parametrize(("shape", "classes"), [((2, 5, 7, 16), 3), ((1, 3, 4, 5, 24), 17), ((2, 1, 1, 8), 2)])
def test_head(monkeypatch: pytest.MonkeyPatch, flat: int, shape: tuple[int, ...], classes: int) -> None:
    monkeypatch.setattr(stage_cpu, "_FLAT", flat)
    torch.manual_seed(0)
    channels = shape[-1]
    x, scale, offset, weight, bias = (
        torch.randn(size) for size in (shape, (channels,), (channels,), (classes, channels), (classes,))
    )
    norm = GroupNormParameters(torch.randn(channels), torch.randn(channels), 4, 1e-5)
    leaves = [x, norm.weight, norm.bias, scale, offset, weight, bias]
    wide = [leaf.double().requires_grad_() for leaf in leaves]
    normed = functional.group_norm(wide[0].movedim(-1, 1), 4, wide[1], wide[2], 1e-5)
    expected = functional.linear(functional.relu(normed).movedim(1, -1) * wide[3] + wide[4], wide[5], wide[6])
    grad = torch.randn(expected.shape)
    gradients = torch.autograd.grad(expected, wide, grad.double())
    for given in (x, x.movedim(-1, 1).contiguous().movedim(1, -1)):
        out = decoder_head(given, norm, scale, offset, weight, bias)
        assert out.shape == (*shape[:-1], classes)
        assert relative(out, expected.detach()) < 1e-5
        assert not out.requires_grad
        with torch.enable_grad():
            own = [given.detach().requires_grad_(), *(leaf.clone().requires_grad_() for leaf in leaves[1:])]
            again = decoder_head(own[0], GroupNormParameters(own[1], own[2], 4, 1e-5), *own[3:])
            found = torch.autograd.grad(again, own, grad.movedim(-1, 1).contiguous().movedim(1, -1))
        assert torch.equal(again, out)
        names = ["x", "norm weight", "norm bias", "scale", "offset", "weight", "bias"]
        for name, one, other in zip(names, found, gradients, strict=True):
            assert relative(one, other) < 2e-5, name


def test_who_can_run() -> None:
    x = torch.randn(1, 4, 4, 8)
    assert stage_runs_fused(x, torch.nn.Parameter(x))
    for other in (x.double(), x.bfloat16(), x.to("meta"), x[:0], None):
        assert not stage_runs_fused(x, other)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        assert not stage_runs_fused(x)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("skip", (1, 6, 6, 8), r"decoder_stage: skip has shape \(1, 6, 6, 8\), expected \(1, 6, 4, 8\)"),
        ("skip", (2, 6, 4, 8), "skip has shape"),
        ("low", (1, 3, 8), r"low has shape \(1, 3, 8\), expected \(B, Y, X, C\)"),
        ("depthwise", (3, 3, 3, 8), r"depthwise has shape \(3, 3, 3, 8\), expected \(3, 3, 8\)"),
        ("pointwise", (8, 4), r"pointwise has shape \(8, 4\), expected \(8, 8\)"),
        ("scale", (4,), r"scale has shape \(4,\), expected \(8,\)"),
        ("weight1", (4,), r"norm1.weight has shape \(4,\), expected \(8,\)"),
        ("bias2", (9,), r"norm2.bias has shape \(9,\), expected \(8,\)"),
    ],
)
@pytest.mark.parametrize("graded", [False, True])
def test_errors(name: str, shape: tuple[int, ...], message: str, graded: bool) -> None:
    inputs = {**_inputs(1, (3, 2), 8), name: torch.ones(shape)}
    with pytest.raises(ValueError, match=message):
        _fused(2)(**{key: value.requires_grad_(graded) for key, value in inputs.items()})


def test_errors_of_types_and_groups() -> None:
    inputs = _inputs(1, (3, 2), 8)
    with pytest.raises(ValueError, match="groups=3 do not divide the 8 channels"):
        _fused(3)(**inputs)
    with pytest.raises(ValueError, match=r"pointwise is torch\.float64 on cpu, expected float32 on the CPU"):
        _fused(2)(**{**inputs, "pointwise": inputs["pointwise"].double()})
    head = [torch.ones(size) for size in ((1, 3, 3, 8), (8,), (8,), (2, 8), (2,))]
    norm = GroupNormParameters(torch.ones(8), torch.ones(8), 2, 1e-5)
    shapes = [(3, 8), (4,), (4,), (2, 4), (3,)]
    for index, (name, shape) in enumerate(zip(("x", "scale", "offset", "weight", "bias"), shapes, strict=True)):
        wrong = [torch.ones(shape) if at == index else one for at, one in enumerate(head)]
        with pytest.raises(ValueError, match=f"decoder_head: {name} has shape"):
            decoder_head(wrong[0], norm, *wrong[1:])
