"""The CPU scan against the float64 oracle: output, last state and every gradient."""

from __future__ import annotations

import logging

import pytest
import torch
from comparing import Inputs, assert_close, check_against_oracle, run
from scan_inputs import make_inputs, scan
from torch import Tensor

from lightm.ops import selective_scan

CASES = [
    # batch, length, channels, states, groups, optional, softplus: every value of each at least once
    (1, 1, 16, 16, 0, "dzbi", True),
    (2, 2, 4, 4, 0, "", False),
    (1, 63, 24, 8, 0, "dz", True),
    (2, 64, 64, 16, 0, "b", True),
    (1, 65, 100, 16, 0, "zi", False),
    (2, 65, 64, 8, 4, "dzbi", True),
    (1, 64, 24, 16, 2, "d", False),
    (1, 1000, 16, 4, 0, "dzbi", True),
    (1, 130, 100, 5, 5, "i", True),
    (2, 63, 4, 1, 0, "z", False),
    (1, 64, 20, 40, 0, "dzbi", True),
]


@pytest.mark.parametrize(("batch", "length", "channels", "states", "groups", "optional", "softplus"), CASES)
def test_against_oracle(
    batch: int, length: int, channels: int, states: int, groups: int, optional: str, softplus: bool
) -> None:
    inputs = make_inputs(batch, length, channels, states, groups, optional)
    dtypes = (torch.float32,) if length > 200 else (torch.float32, torch.bfloat16)  # the oracle is slow
    check_against_oracle(scan("cpu", softplus), scan("reference", softplus), inputs, dtypes)


def test_beyond_one_stretch() -> None:
    # the backward pass works in segments of 8192 tokens; the kernel's own float32 forward and a split call agree
    inputs = {name: x.float() for name, x in make_inputs(1, 8200, 16, 4, 0, "dzbi").items()}
    whole = run(scan("cpu", True), inputs, torch.float32)

    def split(**given: Tensor) -> tuple[Tensor, ...]:
        state, parts = given.pop("initial_state"), []
        fixed = {name: given.pop(name) for name in ("A", "d_skip", "delta_bias")}
        for cut in (slice(0, 5000), slice(5000, None)):
            y, state = scan("cpu", True)(**{n: x[:, cut] for n, x in given.items()}, **fixed, initial_state=state)
            parts.append(y)
        return torch.cat(parts, dim=1), state

    parts = run(split, inputs, torch.float32)
    assert torch.equal(parts["out0"], whole["out0"])
    assert torch.equal(parts["out1"], whole["out1"])
    assert_close(parts, whole, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_in_and_out(dtype: torch.dtype) -> None:
    inputs = {name: x.to(dtype) for name, x in make_inputs(1, 70, 24, 8, 0, "dzbi").items()}
    y, state = scan("cpu", True)(**inputs)
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    single, _ = scan("cpu", True)(**{name: x.float() for name, x in inputs.items()})
    assert torch.equal(y, single.to(dtype))  # float32 inside: only the result is rounded


def test_mixed_types_as_under_autocast() -> None:
    inputs = {name: x.float() for name, x in make_inputs(1, 20, 16, 8, 0, "dz").items()}
    mixed = {name: x.bfloat16() if name in ("u", "B", "C") else x for name, x in inputs.items()}
    found = run_as_given(mixed)
    assert found["u"].dtype == torch.bfloat16
    assert found["delta"].dtype == torch.float32


def run_as_given(inputs: Inputs) -> Inputs:
    given = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    scan("cpu", True)(**given)[0].float().sum().backward()
    return {name: x.grad for name, x in given.items() if x.grad is not None}


def test_any_strides() -> None:
    inputs = {name: x.float() for name, x in make_inputs(2, 65, 32, 16, 0, "dzbi").items()}
    expected = run(scan("cpu", True), inputs, torch.float32)
    # u with channels far apart; B and C cut out of one wider tensor, as a projection gives them
    wide = torch.cat((inputs["B"], inputs["C"], inputs["B"]), dim=-1)
    strided = dict(inputs)
    strided["u"] = inputs["u"].transpose(1, 2).contiguous().transpose(1, 2)
    strided["B"], strided["C"] = wide[..., :16], wide[..., 16:32]
    strided["z"] = torch.cat((inputs["z"], inputs["z"]), dim=-1)[..., 32:]
    assert not strided["B"].is_contiguous()
    got = scan("cpu", True)(**strided)
    assert torch.equal(got[0], expected["out0"])
    assert torch.equal(got[1], expected["out1"])
    grads = run_as_given(strided)
    for name, grad in run_as_given(inputs).items():
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=0)


def test_gradient_of_an_expanded_tensor() -> None:
    # sum() sends back a gradient whose strides are all zero
    inputs = {name: x.float().requires_grad_() for name, x in make_inputs(1, 10, 16, 8).items()}
    scan("cpu", False)(**inputs)[0].sum().backward()
    oracle = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    scan("reference", False)(**oracle)[0].sum().backward()
    for name in inputs:
        torch.testing.assert_close(inputs[name].grad.double(), oracle[name].grad, rtol=1e-4, atol=1e-5)


def test_two_runs_and_any_thread_count_are_bit_equal() -> None:
    inputs = {name: x.float() for name, x in make_inputs(2, 300, 64, 16, 2, "dzbi").items()}
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (threads, threads, 1, 3):
            torch.set_num_threads(count)
            results.append(run(scan("cpu", True), inputs, torch.float32))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(other[name], value), name


def test_empty_axes() -> None:
    for shape in ((0, 3, 4), (1, 0, 4)):
        u = torch.zeros(shape)
        shared = torch.zeros(*shape[:2], 2)
        y, state = scan("cpu", True)(u=u, delta=u, A=torch.zeros(4, 2), B=shared, C=shared)
        assert y.shape == shape
        assert state.tolist() == torch.zeros(shape[0], 4, 2).tolist()


def test_choice_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightm.ops.checks._used", set())
    caplog.set_level(logging.INFO, logger="lightm.ops")
    ones = torch.ones(1, 1, 1)
    for x in (ones, ones, ones.double()):
        selective_scan(x, x, x[0], x, x)
    messages = [record.getMessage() for record in caplog.records if "implementation" in record.getMessage()]
    assert len(messages) == 2
    assert "selective_scan: using the cpu implementation" in messages[0]
    assert "reference" in messages[1]
    assert "float64" in messages[1]


def test_compile_and_export_see_one_operator() -> None:
    inputs = {name: x.float() for name, x in make_inputs(1, 8, 16, 8, 0, "dzb").items()}

    class Layer(torch.nn.Module):
        def forward(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
            result = selective_scan(u, delta, A, B, C, delta_softplus=True)
            assert isinstance(result, Tensor)
            return result

    args = tuple(inputs[name] for name in ("u", "delta", "A", "B", "C"))
    program = torch.export.export(Layer(), args)
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.lightm.selective_scan.default in called
    assert torch.equal(program.module()(*args), Layer()(*args))


def test_operator_registration_is_sound() -> None:
    inputs = {name: x.float().requires_grad_() for name, x in make_inputs(1, 5, 16, 8, 0, "dzbi").items()}
    args = (
        *(inputs[name] for name in ("u", "delta", "A")),
        *(inputs[name].detach().unsqueeze(2).requires_grad_() for name in ("B", "C")),
        *(inputs[name] for name in ("d_skip", "z", "delta_bias")),
        True,
        inputs["initial_state"],
        64,
    )
    torch.library.opcheck(torch.ops.lightm.selective_scan.default, args, rtol=1e-4, atol=1e-4)
