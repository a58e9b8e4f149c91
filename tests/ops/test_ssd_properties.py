"""The SSD scan: what must hold whatever the numbers are, and every wrong argument refused with a message."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparing import check_against_oracle, run
from hypothesis import given, settings
from hypothesis import strategies as st
from ssd_inputs import F64, FAST, make_inputs, scan, single

from lightm.ops import ssd_scan, ssd_scan_with_state


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 200), st.data())
def test_cut_with_the_state_carried_equals_whole(seed: int, length: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, length - 1))
    torch.manual_seed(seed)
    x = single(make_inputs(1, length, 2, 8, 4))
    rate = x.pop("A")
    for impl in FAST:
        whole, last = ssd_scan_with_state(**x, A=rate, impl=impl)  # type: ignore[call-overload]
        state, ys = None, []
        for part in (slice(0, cut), slice(cut, None)):
            some = {name: value[:, part] for name, value in x.items()}
            y, state = ssd_scan_with_state(**some, A=rate, initial_state=state, impl=impl)  # type: ignore[call-overload]
            ys.append(y)
        if impl == "cpu":  # the same operations in the same order
            assert torch.equal(torch.cat(ys, dim=1), whole)
            assert torch.equal(state, last)
        else:
            torch.testing.assert_close(torch.cat(ys, dim=1), whole, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", FAST)
def test_the_past_does_not_see_the_future(impl: str) -> None:
    x = single(make_inputs(1, 130, 2, 8, 4))
    changed = {name: value.clone() for name, value in x.items()}
    for name in ("u", "delta", "B", "C"):
        changed[name][:, 70:] += 1.0
    (y, _), (other, _) = scan(impl)(**x), scan(impl)(**changed)
    assert torch.equal(y[:, :70], other[:, :70])
    assert not torch.equal(y[:, 70:], other[:, 70:])


def test_small_steps_after_a_huge_one_are_not_lost() -> None:
    # running sums reach 1e4; the decays of 1e-3 after it need their differences
    x = make_inputs(1, 60, 1, 4, 4)
    x["delta"] = torch.full_like(x["delta"], 1e-3)
    x["delta"][:, 3] = 1e4
    x["A"] = torch.tensor([-1.0], dtype=F64)
    for impl in FAST:
        check_against_oracle(scan(impl, False), scan("reference", False), x, (torch.float32,))


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize(
    ("value", "softplus"),
    [(value, False) for value in (0.0, 1e-8, 30.0, 1e3)]
    + [(value, True) for value in (-1e3, -88.0, 0.0, 1e-8, 30.0, 1e3)],
)
def test_extreme_steps_stay_finite(impl: str, value: float, softplus: bool) -> None:
    x = single(make_inputs(1, 70, 2, 8, 4, 0, "z"))
    x["delta"] = torch.full_like(x["delta"], value)
    x["z"] = x["z"] * 100
    leaves = {name: tensor.requires_grad_() for name, tensor in x.items()}
    y, _ = scan(impl, softplus)(**leaves)
    y.sum().backward()
    assert y.isfinite().all()
    for name, tensor in leaves.items():
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all(), name
    expected, _ = scan("reference", softplus)(**{name: tensor.detach().double() for name, tensor in leaves.items()})
    torch.testing.assert_close(
        y.detach().double(), expected, rtol=1e-4, atol=1e-5 * max(1.0, expected.abs().max().item())
    )


def test_all_zeros() -> None:
    x = {name: torch.zeros_like(value) for name, value in single(make_inputs(1, 40, 2, 8, 4, 0, "dzbi")).items()}
    for impl in FAST:
        found = run(scan(impl, False), x, torch.float32)
        assert all(value.isfinite().all() for value in found.values())
        assert found["out0"].count_nonzero() == found["out1"].count_nonzero() == 0


@pytest.mark.parametrize("impl", FAST)
def test_not_a_number_stays_in_its_channel(impl: str) -> None:
    x = single(make_inputs(1, 30, 2, 5, 4))
    clean, _ = scan(impl)(**x)
    x["u"][:, 10, 1, 3] = float("nan")
    y, _ = scan(impl)(**x)
    assert y[:, 10:, 1, 3].isnan().all()
    y[:, :, 1, 3] = clean[:, :, 1, 3]
    assert torch.equal(y, clean)


def good() -> dict[str, Any]:
    x, shared = torch.ones(2, 5, 4, 3), torch.ones(2, 5, 6)
    return {"u": x, "delta": torch.ones(2, 5, 4), "A": -torch.ones(4), "B": shared, "C": shared}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"u": torch.ones(2, 5, 12)}, r"u has shape \(2, 5, 12\), expected \(Bt, L, H, P\).*unflatten"),
    ({"delta": torch.ones(2, 5, 12)}, r"delta has shape \(2, 5, 12\), expected \(2, 5, 4\) = \(Bt, L, H\)"),
    ({"A": -torch.ones(4, 6)}, r"A has shape \(4, 6\), expected \(4,\) = \(H,\)"),
    ({"B": torch.ones(2, 4, 6)}, r"B has shape \(2, 4, 6\), expected \(2, 5, N\)"),
    ({"B": torch.ones(2, 5, 3, 6), "C": torch.ones(2, 5, 3, 6)}, "G = 3 groups, which do not divide the H = 4 heads"),
    ({"C": torch.ones(2, 5, 2)}, r"C has shape \(2, 5, 2\), expected \(2, 5, 6\)"),
    ({"d_skip": torch.ones(12)}, r"d_skip has shape \(12,\), expected \(4,\)"),
    ({"delta_bias": torch.ones(1)}, r"delta_bias has shape \(1,\), expected \(4,\)"),
    ({"z": torch.ones(2, 5, 12)}, r"z has shape \(2, 5, 12\), expected \(2, 5, 4, 3\)"),
    ({"initial_state": torch.ones(2, 4, 6, 3)}, r"initial_state has shape \(2, 4, 6, 3\), expected \(2, 4, 3, 6\)"),
    ({"u": torch.ones(2, 5, 4, 3, dtype=torch.int64)}, r"u has dtype torch\.int64, expected float32"),
    ({"A": -torch.ones(4, dtype=F64)}, "float64 does not mix"),
    ({"C": torch.ones(2, 5, 6, device="meta")}, "C is on meta and u on cpu"),
    ({"impl": "triton"}, "impl is 'triton', expected one of 'auto', 'reference', 'chunked', 'cpu'"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ssd_scan(**{**good(), **change})


def test_explicit_cpu_does_not_fall_back() -> None:
    doubles = {name: x.double() for name, x in good().items()}
    with pytest.raises(ValueError, match=r"impl='cpu' is not possible: the tensors are torch\.float64"):
        ssd_scan(**doubles, impl="cpu")


def test_not_a_tensor() -> None:
    with pytest.raises(TypeError, match=r"A is list, expected a torch\.Tensor"):
        ssd_scan(**{**good(), "A": [-1.0] * 4})
