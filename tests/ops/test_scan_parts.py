"""The scan cut into parts of its tokens: when, where, and that the result is the same."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from comparing import assert_close, relative, run
from scan_inputs import make_inputs, scan

from lightm.ops.scan import cpu
from lightm.ops.scan.cpu import SHORTEST, carry_states, cut, part_count


@pytest.fixture
def threads() -> Iterator[None]:
    """Four threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("items", "threads", "parts"),
    [(4, 2, 1), (1, 1, 1), (2, 2, 1), (1, 2, 3), (2, 3, 1), (2, 4, 3), (1, 3, 4), (1, 16, 17), (4, 16, 5), (0, 2, 3)],
)
def test_number_of_parts(items: int, threads: int, parts: int) -> None:
    assert part_count(items, threads, 1 << 20) == parts
    assert part_count(items, threads, SHORTEST * parts) == parts
    fewer = parts - 1 if parts > 3 else 1  # two parts would save nothing
    assert part_count(items, threads, SHORTEST * parts - 1) == fewer


@pytest.mark.parametrize(("tokens", "parts"), [(64 * 5, 5), (6400 + 1, 3), (6400 - 1, 4), (10000, 7)])
def test_borders(tokens: int, parts: int) -> None:
    borders = cut(tokens, parts, 64)
    assert (len(borders), borders[0], borders[-1]) == (parts + 1, 0, tokens)
    assert all(border % 64 == 0 for border in borders[:-1])
    lengths = [after - before for before, after in pairwise(borders)]
    assert min(lengths) > 0
    assert max(lengths) - min(lengths) <= 2 * 64


def test_carried_states_follow_the_recurrence() -> None:
    torch.manual_seed(0)
    first, alone, steps = torch.randn(2, 3, 4, 16), torch.randn(3, 2, 3, 4, 16), torch.rand(3, 2, 3, 1, 16)
    decay = -torch.rand(3, 4, 16)
    states = carry_states(first, alone, steps, decay)
    assert torch.equal(states[0], first)
    for part in range(3):
        expected = 2 ** (decay * steps[part]) * states[part] + alone[part]
        torch.testing.assert_close(states[part + 1], expected)


@pytest.mark.parametrize(
    ("batch", "channels", "states", "groups", "optional", "softplus"),
    [(1, 16, 16, 0, "dzbi", True), (1, 16, 8, 2, "i", True), (2, 12, 4, 0, "", False), (1, 16, 16, 0, "b", False)],
)
def test_the_same_result_as_uncut(
    batch: int, channels: int, states: int, groups: int, optional: str, softplus: bool, threads: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    inputs = {name: x.float() for name, x in make_inputs(batch, 8192, channels, states, groups, optional).items()}
    inputs["A"] *= 0.02  # slow decay: what a part begins with matters to its end
    cuts = []
    monkeypatch.setattr(cpu, "cut", lambda *args: cuts.append(args) or cut(*args))
    parts = run(scan("cpu", softplus), inputs, torch.float32)
    again = run(scan("cpu", softplus), inputs, torch.float32)
    assert {args[1] for args in cuts} == ({3} if batch == 2 else {4})
    monkeypatch.setattr(cpu, "part_count", lambda *args: 1)
    whole = run(scan("cpu", softplus), inputs, torch.float32)
    assert relative(parts["out0"], whole["out0"]) < 1e-6
    assert relative(parts["out1"], whole["out1"]) < 1e-6
    assert_close(parts, whole, 1e-5)  # gradients too: the kept states come from the parts
    for name, value in parts.items():
        assert torch.equal(again[name], value), name


def test_states_without_decay(threads: None) -> None:
    # a = 0 and dt = 1: the state counts the tokens, which float32 does exactly
    ones = torch.ones(1, 20000, 16)
    y, state = scan("cpu", False)(u=ones, delta=ones, A=torch.zeros(16, 4), B=ones[..., :4], C=ones[..., :4])
    assert torch.equal(y[0, :, 3], 4.0 * torch.arange(1, 20001))
    assert (state == 20000).all()
