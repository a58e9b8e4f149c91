"""Recomputation: the same results and gradients as without, what is kept, frozen parameters, autocast, tracing."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightm.nets import create, set_activation_checkpointing, token_layer
from lightm.nets.blocks import RVM, SPM
from lightm.nets.execution import CHECKPOINT_ABOVE, should_checkpoint
from lightm.nets.token_layer import TokenLayer

LAYERS: dict[str, tuple[type[TokenLayer], dict[str, Any]]] = {
    "rvm": (RVM, {}),
    "rvm, released": (RVM, {"inner_norm": False, "one_norm": True, "vector_scale": False}),
    "rvm, mamba2": (RVM, {"ssm": "mamba2"}),
    "rvm, axes": (RVM, {"scan": "axes"}),
    "spm": (SPM, {}),
    "spm, shared": (SPM, {"shared": True}),
    "spm, both ways": (SPM, {"scan": "bidirectional"}),
}


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One or two rows of the first axis at a time."""
    monkeypatch.setattr(token_layer, "_CHUNK", 1)


def _layer(name: str, on: bool | None = True) -> TokenLayer:
    torch.manual_seed(0)
    kind, settings = LAYERS[name]
    layer = kind(16, 24, **settings)
    layer.checkpointing = on
    return layer


def _relative(got: Tensor, expected: Tensor) -> float:
    scale = expected.double().norm().item()
    return (got.double() - expected.double()).norm().item() / (scale if scale > 0 else 1.0)


def _train(module: nn.Module, x: Tensor, *more: Any, grad: bool = True) -> dict[str, Tensor]:
    """The result, the input's gradient and those of all parameters."""
    module.zero_grad()
    x = x.clone().requires_grad_(grad)
    out = module(x, *more)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out.double() * weight).sum().backward()
    found = {"out": out.detach().clone(), **({"x": x.grad} if x.grad is not None else {})}
    return found | {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def _assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    errors = {name: _relative(got[name], expected[name]) for name in expected}
    # the gradient of a single scale is a sum over all numbers that nearly cancel
    single = {name for name, value in expected.items() if value.numel() == 1}
    bad = {name: e for name, e in errors.items() if not e <= (100 * tolerance if name in single else tolerance)}
    assert not bad, bad


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LAYERS))
@pytest.mark.parametrize(("sizes", "pooling"), [((5, 3), None), ((6, 4), "max"), ((4, 2, 4), "add"), ((1, 1), None)])
def test_same_result_and_gradients(name: str, sizes: tuple[int, ...], pooling: str | None) -> None:
    x = torch.randn(2, *sizes, 16, generator=torch.Generator().manual_seed(2))
    for grad in (True, False):
        expected = _train(_layer(name, False), x, pooling, grad=grad)
        _assert_same(_train(_layer(name), x, pooling, grad=grad), expected)
    assert ("x" in expected) == grad
    assert len(expected) == 1 + len(list(_layer(name).parameters()))


@pytest.mark.slow
def test_gradients_are_the_finite_differences() -> None:
    torch.manual_seed(0)
    layer = RVM(4, 3, state_size=2).double()
    layer.checkpointing = True
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *weights: layer(x), (x, *layer.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rvm", "spm", "rvm, axes"])
@pytest.mark.parametrize("frozen", ["proj", "vss", "norm", "all but one", "all"])
@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_frozen_parameters(name: str, frozen: str, on: bool, grad: bool) -> None:
    x = torch.randn(1, 4, 3, 16, generator=torch.Generator().manual_seed(2))
    expected = _train(_layer(name, False), x)
    layer = _layer(name, on)
    for key, parameter in layer.named_parameters():
        keep = key == "skip_scale" and frozen == "all but one"
        parameter.requires_grad_(not (key.startswith(frozen) or frozen.startswith("all")) or keep)
    left = {key for key, parameter in layer.named_parameters() if parameter.requires_grad}
    if not left and not grad:
        assert not layer(x).requires_grad
        return
    wanted = left | {"out"} | ({"x"} if grad else set())
    _assert_same(_train(layer, x, grad=grad), {key: expected[key] for key in wanted})


@pytest.mark.parametrize("name", ["rvm", "spm", "rvm, mamba2", "spm, both ways"])
@pytest.mark.parametrize("inside", [False, True])
def test_autocast(name: str, inside: bool) -> None:
    x = torch.randn(1, 4, 5, 16, generator=torch.Generator().manual_seed(2))
    exact = _train(_layer(name, False), x)
    found = []
    for on in (True, False):
        layer, given = _layer(name, on), x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (layer(given).float() * torch.randn(1, 4, 5, 24, generator=torch.Generator().manual_seed(1))).sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append({key: p.grad for key, p in layer.named_parameters() if p.grad is not None} | {"x": given.grad})
    for part in found:
        _assert_same(part, {key: value for key, value in exact.items() if key != "out"}, 0.05)


def _kept(module: nn.Module, x: Tensor) -> int:
    """Bytes of the tensors, other than parameters, that autograd keeps."""
    parameters = {p.data_ptr() for p in module.parameters()}
    seen: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        if saved.data_ptr() not in parameters:
            seen[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        out = module(x)
    assert out.requires_grad
    return sum(seen.values())


@pytest.mark.parametrize("name", list(LAYERS))
def test_only_the_input_is_kept(name: str) -> None:
    x = torch.randn(1, 8, 9, 16)
    assert _kept(_layer(name), x) == x.numel() * 4
    assert _kept(_layer(name, False), x) > 10 * x.numel() * 4


def test_a_network_keeps_less() -> None:
    network, x = create("lightm-small", 2, 1, 2), torch.randn(1, 1, 32, 32)
    more, less = (_kept(set_activation_checkpointing(network, on), x) for on in (False, True))
    assert less < 0.35 * more


def test_choice_by_size() -> None:
    assert [should_checkpoint(None, CHECKPOINT_ABOVE), should_checkpoint(None, CHECKPOINT_ABOVE + 1)] == [False, True]
    assert [should_checkpoint(True, 1), should_checkpoint(False, 2 * CHECKPOINT_ABOVE)] == [True, False]
    network = create("lightm-unet-small", 2, 1, 2)
    chosen = [module for module in network.modules() if hasattr(module, "checkpointing")]
    assert len(chosen) > 5
    for on in (True, False, None):
        assert set_activation_checkpointing(network, on) is network
        assert all(module.checkpointing is on for module in chosen)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lightm-small", "lightm-unet-small", "lightm-unet-released-small"])
def test_networks_and_accumulated_gradients(name: str) -> None:
    torch.manual_seed(0)
    network, image = create(name, 2, 1, 3), torch.randn(2, 1, 16, 16)
    expected, got = (_train(set_activation_checkpointing(network, on), image) for on in (False, True))
    _assert_same(got, expected, 1e-4)
    network.zero_grad()
    for _ in range(2):
        network(image).sum().backward()
    twice = {key: p.grad.clone() for key, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    network(image).sum().backward()
    once = {key: 2 * p.grad for key, p in network.named_parameters() if p.grad is not None}
    _assert_same(twice, once, 1e-6)


def test_copies_and_states_know_nothing_of_it() -> None:
    layer, x = _layer("spm"), torch.randn(1, 4, 3, 16)
    expected = _train(layer, x)
    assert layer.state_dict().keys() == _layer("spm", False).state_dict().keys()
    file = io.BytesIO(pickle.dumps(layer))
    for other in (copy.deepcopy(layer), pickle.load(file)):
        _assert_same(_train(other, x), expected, 0)


def test_hooks_fire() -> None:
    layer, calls = _layer("rvm"), []
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    _train(layer, torch.randn(1, 4, 3, 16))
    assert calls == ["forward", "backward"]


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(1, 4, 3, 16, requires_grad=True)
    (first,) = torch.autograd.grad(_layer("rvm")(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_changed_parameter_is_noticed() -> None:
    layer = _layer("rvm")
    out = layer(torch.randn(1, 4, 3, 16))
    with torch.no_grad():
        layer.proj.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("name", list(LAYERS))
def test_modes_without_gradients(name: str) -> None:
    layer, x = _layer(name), torch.randn(2, 4, 6, 16)
    trained = layer(x).detach()
    with torch.no_grad():
        out = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), out)
    assert _relative(trained, out) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend: str) -> None:
    layer, x = _layer("spm"), torch.randn(1, 4, 6, 16)
    expected = _train(layer, x)
    torch._dynamo.reset()
    _assert_same(_train(torch.compile(layer, backend=backend, fullgraph=True), x), {
        key if key in ("out", "x") else f"_orig_mod.{key}": value for key, value in expected.items()
    })  # fmt: skip


def test_exported() -> None:
    torch.manual_seed(0)
    network = set_activation_checkpointing(
        create("lightm-unet-small", 2, 1, 2, encoder_layers=(1,), bottleneck_layers=1), True
    ).eval()
    image = torch.randn(1, 1, 8, 8)
    program = torch.export.export(network, (image,))
    with torch.no_grad():
        assert _relative(program.module()(image), network(image)) < 1e-5
