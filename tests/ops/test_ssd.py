"""The SSD scan: the oracle itself, and both fast forms against it: results, last state and every gradient."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from comparing import Inputs, assert_close, check_against_oracle, run
from ssd_inputs import F64, FAST, make_inputs, scan, single
from torch import Tensor

from lightm.ops import selective_scan_with_state, ssd_scan, ssd_scan_with_state
from lightm.ops.ssd import chunked

CASES = [
    # batch, length, heads, width, states, groups, optional, softplus: every value of each at least once
    (1, 1, 1, 16, 16, 0, "dzbi", True),
    (2, 2, 3, 4, 4, 0, "", False),
    (1, 63, 4, 16, 16, 2, "dz", True),
    (2, 64, 2, 32, 8, 0, "bi", True),
    (1, 65, 5, 24, 16, 5, "zi", False),
    (1, 64, 6, 1, 1, 3, "d", False),
    (1, 1000, 2, 16, 16, 0, "dzbi", True),
    (1, 40, 2, 20, 40, 2, "dzbi", True),
]


@pytest.mark.slow
@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("case", CASES)
def test_against_oracle(case: tuple[int, int, int, int, int, int, str, bool], impl: str) -> None:
    *sizes, optional, softplus = case
    inputs = make_inputs(*sizes, optional)
    dtypes = (torch.float32,) if sizes[1] > 200 else (torch.float32, torch.bfloat16)  # the oracle is slow
    check_against_oracle(scan(impl, softplus), scan("reference", softplus), inputs, dtypes)


def test_chunks_in_float64_are_the_oracle_to_the_last_digits() -> None:
    inputs = make_inputs(2, 100, 4, 3, 5, 2, "dzbi")
    assert_close(run(scan("chunked"), inputs, F64), run(scan("reference"), inputs, F64), 1e-12)


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("impl", FAST)
def test_equals_the_selective_scan_with_one_decay_a_head(impl: str, softplus: bool) -> None:
    inputs = make_inputs(2, 90, 3, 8, 6, 3, "dzbi")

    def by_channel(**x: Tensor) -> tuple[Tensor, ...]:
        heads, width = x["u"].shape[2:]
        repeated = {name: x[name].repeat_interleave(width, -1) for name in ("delta", "d_skip", "delta_bias")}
        A = x["A"].repeat_interleave(width).unsqueeze(-1).expand(-1, 6)
        y, state = selective_scan_with_state(
            x["u"].flatten(2),
            A=A,
            B=x["B"],
            C=x["C"],
            z=x["z"].flatten(2),
            initial_state=x["initial_state"].flatten(1, 2),
            delta_softplus=softplus,
            impl="reference",
            **repeated,
        )
        return y.unflatten(2, (heads, width)), state.unflatten(1, (heads, width))

    check_against_oracle(scan(impl, softplus), by_channel, inputs, (torch.float32,))


def test_one_token_by_hand() -> None:
    # dt = 0.5, h = 0.5 * 3 * 2 = 3, y = 3 * 4 + 10 * 2 = 32, gated by silu(1)
    u, delta, b, c, z = (torch.full((1, 1, 1), value, dtype=F64) for value in (2.0, 0.5, 3.0, 4.0, 1.0))
    u, z = u.unsqueeze(-1), z.unsqueeze(-1)
    rate, skip = torch.full((1,), -1.0, dtype=F64), torch.full((1,), 10.0, dtype=F64)
    for impl in ("reference", "chunked"):
        y = ssd_scan(u, delta, rate, b, c, skip, z, impl=impl)
        assert y.item() == pytest.approx(32.0 / (1 + math.exp(-1.0)), rel=1e-14)


@pytest.mark.parametrize("impl", FAST)
def test_geometric_decay(impl: str) -> None:
    # one impulse at t = 0, B = C = 1, constant dt: h[t] = dt * exp(-a dt t)
    length, dt, rate = 100, 0.1, 1.5
    u = torch.zeros(1, length, 1, 1)
    u[0, 0] = 1.0
    ones = torch.ones(1, length, 1)
    y, state = ssd_scan_with_state(u, dt * ones, torch.tensor([-rate]), ones, ones, impl=impl)
    expected = dt * torch.exp(-rate * dt * torch.arange(length, dtype=F64))
    torch.testing.assert_close(y.flatten().double(), expected, rtol=2e-5, atol=0)
    assert state.item() == pytest.approx(expected[-1].item(), rel=2e-5)


@pytest.mark.parametrize("groups", [0, 2])
def test_gradients_of_the_oracle_are_the_finite_differences(groups: int) -> None:
    inputs = {name: x.requires_grad_() for name, x in make_inputs(2, 4, 2, 2, 3, groups, "dzbi").items()}
    names = list(inputs)

    def call(*x: Tensor) -> tuple[Tensor, Tensor]:
        return scan("reference")(**dict(zip(names, x, strict=True)))  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(call, tuple(inputs.values()))


def test_beyond_one_stretch_of_the_kernel() -> None:
    # the backward pass works in segments of 8192 tokens; a split call shifts them
    inputs = single(make_inputs(1, 8200, 2, 8, 4, 0, "dzbi"))
    whole = run(scan("cpu"), inputs, torch.float32)

    def split(**x: Tensor) -> tuple[Tensor, ...]:
        state, ys = x.pop("initial_state"), []
        fixed = {name: x.pop(name) for name in ("A", "d_skip", "delta_bias")}
        for cut in (slice(0, 5000), slice(5000, None)):
            y, state = scan("cpu")(**{n: v[:, cut] for n, v in x.items()}, **fixed, initial_state=state)
            ys.append(y)
        return torch.cat(ys, dim=1), state

    parts = run(split, inputs, torch.float32)
    assert torch.equal(parts["out0"], whole["out0"])
    assert torch.equal(parts["out1"], whole["out1"])
    assert_close(parts, whole, 1e-5)


def test_segments_of_the_chunked_form_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # 300 tokens in one segment, and in three with recomputation between them
    inputs = make_inputs(1, 300, 2, 4, 4, 0, "dzbi")
    whole = run(scan("chunked"), inputs, F64)
    monkeypatch.setattr(chunked, "SEGMENT", 2 * chunked.CHUNK)
    assert_close(run(scan("chunked"), inputs, F64), whole, 1e-12)


def test_chunked_form_gives_only_the_gradients_asked_for() -> None:
    inputs = make_inputs(1, 40, 2, 4, 4, 0, "dz")
    given_ = {name: x.clone().requires_grad_(name in ("B", "d_skip")) for name, x in inputs.items()}
    y, _ = scan("chunked")(**given_)
    y.sum().backward()
    expected = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    scan("reference")(**expected)[0].sum().backward()
    for name, x in given_.items():
        assert (x.grad is not None) == x.requires_grad
        if x.grad is not None:
            torch.testing.assert_close(x.grad, expected[name].grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", FAST)
def test_half_types_in_and_out(impl: str, dtype: torch.dtype) -> None:
    inputs = {name: x.to(dtype) for name, x in make_inputs(1, 70, 3, 8, 8, 0, "dzbi").items()}
    y, state = scan(impl)(**inputs)
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    full, _ = scan(impl)(**single(inputs))
    assert torch.equal(y, full.to(dtype))  # float32 inside: only the result is rounded


def test_memory_that_nobody_wrote_is_not_read() -> None:
    inputs = single(make_inputs(2, 70, 3, 20, 5, 0, "dzbi"))
    expected = run(scan("cpu"), inputs, torch.float32)
    torch.use_deterministic_algorithms(True)  # PyTorch then fills fresh memory with NaN
    try:
        assert torch.empty(4).isnan().all()
        found = run(scan("cpu"), inputs, torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def grads_as_given(inputs: Inputs) -> Inputs:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    scan("cpu")(**leaves)[0].float().sum().backward()
    return {name: x.grad for name, x in leaves.items() if x.grad is not None}


def test_any_strides() -> None:
    inputs = single(make_inputs(2, 65, 2, 16, 16, 0, "dzbi"))
    expected = run(scan("cpu"), inputs, torch.float32)
    strided = dict(inputs)
    # u with channels far apart; B, C, z and delta cut out of wider tensors, as a projection gives them
    wide = torch.cat((inputs["B"], inputs["C"], inputs["delta"]), dim=-1)
    strided["u"] = inputs["u"].permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    strided["B"], strided["C"], strided["delta"] = wide.split((16, 16, 2), dim=-1)
    strided["z"] = torch.cat((inputs["z"], inputs["z"]), dim=2)[:, :, 2:]
    got = scan("cpu")(**strided)
    assert torch.equal(got[0], expected["out0"])
    assert torch.equal(got[1], expected["out1"])
    grads = grads_as_given(strided)
    for name, grad in grads_as_given(inputs).items():
        assert torch.equal(grads[name], grad), name


def test_mixed_types_as_under_autocast() -> None:
    inputs = single(make_inputs(1, 20, 2, 16, 8, 0, "dz"))
    mixed = {name: x.bfloat16() if name in ("u", "B", "delta") else x for name, x in inputs.items()}
    found = grads_as_given(mixed)
    assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in mixed.items()}
    assert_close(found, grads_as_given({name: x.float() for name, x in mixed.items()}), 1e-2)


@pytest.mark.parametrize("impl", FAST)
def test_two_runs_and_any_thread_count_are_bit_equal(impl: str) -> None:
    inputs = single(make_inputs(2, 300, 4, 24, 16, 2, "dzbi"))
    threads = torch.get_num_threads()
    counts = (threads, threads, 1, 3) if impl == "cpu" else (threads, threads)
    results = []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(run(scan(impl), inputs, torch.float32))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(other[name], value), name


@pytest.mark.parametrize("impl", ["reference", *FAST])
@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (1, 0, 2, 4)])
def test_empty_axes(impl: str, shape: tuple[int, ...]) -> None:
    shared = torch.zeros(*shape[:2], 3)
    begin = torch.ones(shape[0], 2, 4, 3)
    y, state = scan(impl)(
        u=torch.zeros(shape), delta=shared[..., :2], A=-torch.ones(2), B=shared, C=shared, initial_state=begin
    )
    assert y.shape == shape
    assert torch.equal(state, begin)


def test_choice_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightm.ops.checks._used", set())
    caplog.set_level(logging.INFO, logger="lightm.ops")
    ones = torch.ones(1, 1, 1)
    for x in (ones, ones, ones.double()):
        ssd_scan(x.unsqueeze(-1), x, x[0, 0], x, x)
    messages = [record.getMessage() for record in caplog.records if "implementation" in record.getMessage()]
    assert len(messages) == 2
    assert "ssd_scan: using the cpu implementation" in messages[0]
    assert "using the chunked implementation" in messages[1]
    assert "float64" in messages[1]


def test_operator_registration_is_sound() -> None:
    x = {name: t.float() for name, t in make_inputs(1, 5, 2, 16, 8, 1, "dzbi").items()}
    x["u"], x["z"], x["initial_state"] = x["u"].flatten(2), x["z"].flatten(2), x["initial_state"].flatten(1, 2)
    x = {name: t.detach().requires_grad_() for name, t in x.items()}
    first = [x[name] for name in ("u", "delta", "A", "B", "C", "d_skip", "z", "delta_bias")]
    args = (*first, True, x["initial_state"], 64)
    torch.library.opcheck(torch.ops.lightm.ssd_scan.default, args, rtol=1e-4, atol=1e-4)
