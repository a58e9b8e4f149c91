"""What must hold whatever the numbers: causality, linearity, cutting, groups, finite results."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightm.ops import selective_scan, selective_scan_with_state


def parts(seed: int, length: int, channels: int = 8, states: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "u": random(1, length, channels),
        "delta": random(1, length, channels).abs() * 0.2,
        "A": -random(channels, states).abs(),
        "B": random(1, length, states),
        "C": random(1, length, states),
    }


def scan(**inputs: Tensor) -> Tensor:
    y = selective_scan(**inputs, impl="cpu")  # type: ignore[arg-type]
    assert isinstance(y, Tensor)
    return y


seeds = st.integers(0, 2**31)
few = settings(max_examples=20, deadline=None)


@few
@given(seeds, st.integers(2, 130), st.data())
def test_the_past_does_not_see_the_future(seed: int, length: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, length - 1))
    x = parts(seed, length)
    changed = {name: value.clone() for name, value in x.items()}
    for name in ("u", "delta", "B", "C"):
        changed[name][:, cut:] += 1.0
    assert torch.equal(scan(**x)[:, :cut], scan(**changed)[:, :cut])


@few
@given(seeds, st.integers(1, 100), st.floats(-3, 3))
def test_linear_in_u(seed: int, length: int, factor: float) -> None:
    x = parts(seed, length)
    other = parts(seed + 1, length)["u"]
    rest = {name: value for name, value in x.items() if name != "u"}
    both = scan(u=x["u"] + factor * other, **rest)
    apart = scan(**x) + factor * scan(u=other, **rest)
    torch.testing.assert_close(both, apart, rtol=1e-4, atol=1e-4)


@few
@given(seeds, st.integers(2, 200), st.data())
def test_cut_with_the_state_carried_equals_whole(seed: int, length: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, length - 1))
    x = parts(seed, length)
    fixed = x.pop("A")
    whole, last = selective_scan_with_state(**x, A=fixed)  # type: ignore[arg-type]
    first = {name: value[:, :cut] for name, value in x.items()}
    second = {name: value[:, cut:] for name, value in x.items()}
    y1, state = selective_scan_with_state(**first, A=fixed)  # type: ignore[arg-type]
    y2, state = selective_scan_with_state(**second, A=fixed, initial_state=state)  # type: ignore[arg-type]
    assert torch.equal(torch.cat((y1, y2), dim=1), whole)
    assert torch.equal(state, last)


def test_groups_are_separate_scans() -> None:
    x = parts(3, 40, channels=24)
    b, c = torch.randn(2, 1, 40, 3, 4, generator=torch.Generator().manual_seed(1))
    together = scan(u=x["u"], delta=x["delta"], A=x["A"], B=b, C=c)
    for group in range(3):
        own = slice(8 * group, 8 * group + 8)
        alone = scan(u=x["u"][..., own], delta=x["delta"][..., own], A=x["A"][own], B=b[:, :, group], C=c[:, :, group])
        assert torch.equal(together[..., own], alone)


def test_padding_lanes_do_not_leak() -> None:
    # NaN in one channel stays in that channel, although channels share vectors
    x = parts(5, 30, channels=19)
    clean = scan(**x)
    x["u"][..., 7] = float("nan")
    y = scan(**x)
    assert y[..., 7].isnan().all()
    others = [e for e in range(19) if e != 7]
    assert torch.equal(y[..., others], clean[..., others])


@pytest.mark.parametrize(
    ("value", "softplus"),
    [(value, False) for value in (0.0, 1e-8, 30.0, 1e3)]
    + [(value, True) for value in (-1e3, -88.0, 0.0, 1e-8, 30.0, 1e3)],
)
def test_extreme_steps_stay_finite(value: float, softplus: bool) -> None:
    x = parts(7, 70)
    x["delta"] = torch.full_like(x["delta"], value)
    x["z"] = torch.randn(1, 70, 8) * 100
    given_ = {name: tensor.requires_grad_() for name, tensor in x.items()}
    y = selective_scan(**given_, delta_softplus=softplus)  # type: ignore[arg-type]
    assert isinstance(y, Tensor)
    y.sum().backward()
    assert y.isfinite().all()
    for name, tensor in given_.items():
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all(), name
    doubles = {name: tensor.detach().double() for name, tensor in given_.items()}
    expected = selective_scan(**doubles, delta_softplus=softplus)  # type: ignore[arg-type]
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(
        y.detach().double(), expected, rtol=1e-4, atol=1e-5 * max(1.0, expected.abs().max().item())
    )


def test_not_a_number_is_not_hidden() -> None:
    x = parts(9, 10)
    x["delta"][0, 4, 2] = float("nan")
    y = scan(**x)
    assert y[0, 4:, 2].isnan().all()
    assert y[0, :4].isfinite().all()
