"""The oracle itself: closed forms by hand and float64 gradients against finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from lightm.ops import selective_scan, selective_scan_with_state

F64 = torch.float64


def test_one_token_by_hand() -> None:
    # dt = 0.5, h = 0.5 * 3 * 2 = 3, y = 3 * 4 + 10 * 2 = 32, gated by silu(0) = 0 or silu(1)
    values = {"u": 2.0, "delta": 0.5, "B": 3.0, "C": 4.0, "z": 1.0}
    t = {name: torch.full((1, 1, 1), value, dtype=F64) for name, value in values.items()}
    y = selective_scan(
        t["u"],
        t["delta"],
        torch.full((1, 1), -1.0, dtype=F64),
        t["B"],
        t["C"],
        torch.full((1,), 10.0, dtype=F64),
        t["z"],
    )
    assert y.item() == pytest.approx(32.0 / (1 + math.exp(-1.0)), rel=1e-14)


@pytest.mark.parametrize(("impl", "dtype"), [("reference", F64), ("cpu", torch.float32)])
def test_geometric_decay(impl: str, dtype: torch.dtype) -> None:
    # one impulse at t = 0, B = C = 1, constant dt: h[t] = dt * exp(-a dt t)
    length, dt, rate = 50, 0.1, 1.5
    u = torch.zeros(1, length, 1, dtype=dtype)
    u[0, 0, 0] = 1.0
    ones = torch.ones(1, length, 1, dtype=dtype)
    y, state = selective_scan_with_state(u, dt * ones, torch.full((1, 1), -rate, dtype=dtype), ones, ones, impl=impl)
    expected = dt * torch.exp(-rate * dt * torch.arange(length, dtype=F64))
    torch.testing.assert_close(y[0, :, 0].double(), expected, rtol=1e-5, atol=0)
    assert state.item() == pytest.approx(expected[-1].item(), rel=1e-5)


@pytest.mark.parametrize(("impl", "dtype"), [("reference", F64), ("cpu", torch.float32)])
def test_no_decay_is_a_running_sum(impl: str, dtype: torch.dtype) -> None:
    u = torch.arange(1, 9, dtype=dtype).reshape(1, 8, 1)
    ones = torch.ones(1, 8, 1, dtype=dtype)
    y = selective_scan(u, ones, torch.zeros(1, 1, dtype=dtype), ones, ones, impl=impl)
    assert y[0, :, 0].tolist() == [1, 3, 6, 10, 15, 21, 28, 36]


def test_softplus_and_bias() -> None:
    # softplus(log(e - 1)) = 1; with u = B = C = 1 and no decay y = dt
    one = torch.ones(1, 1, 1, dtype=F64)
    bias = torch.full((1,), math.log(math.e - 1) - 0.25, dtype=F64)
    y = selective_scan(one, 0.25 * one, torch.zeros(1, 1, dtype=F64), one, one, delta_bias=bias, delta_softplus=True)
    assert y.item() == pytest.approx(1.0, rel=1e-14)


@pytest.mark.parametrize("groups", [0, 2])
def test_gradients_are_the_finite_differences(groups: int) -> None:
    torch.manual_seed(0)
    batch, length, channels, states = 2, 4, 4, 3

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=F64, requires_grad=True)

    shared = (batch, length, groups, states) if groups else (batch, length, states)
    inputs = (
        random(batch, length, channels),
        random(batch, length, channels),
        random(channels, states),
        random(*shared),
        random(*shared),
        random(channels),
        random(batch, length, channels),
        random(channels),
        random(batch, channels, states),
    )

    def call(*x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return selective_scan_with_state(*x[:8], delta_softplus=True, initial_state=x[8], impl="reference")

    assert torch.autograd.gradcheck(call, inputs)
