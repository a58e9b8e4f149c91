"""The CPU scan against the float64 oracle over lengths, channels and states: output, last state, every gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from comparing import check_against_oracle, run
from scan_inputs import make_inputs, scan

from lightm.ops.scan import cpu

LENGTHS = (1, 2, 63, 64, 65, 1000, 4097)
CHANNELS = (4, 16, 24, 64, 100)
STATES = (4, 8, 16)
# every length with every number of channels; the numbers of states and the optional inputs take turns
CASES = [
    (length, channels, STATES[(i + j) % 3], ("dzbi", "", "zb", "di")[(i + 2 * j) % 4])
    for (i, length), (j, channels) in itertools.product(enumerate(LENGTHS), enumerate(CHANNELS))
]


@pytest.mark.slow
@pytest.mark.parametrize(("length", "channels", "states", "optional"), CASES)
def test_against_oracle(length: int, channels: int, states: int, optional: str) -> None:
    inputs = make_inputs(1, length, channels, states, 0, optional)
    # at the greatest length one type a case: the oracle takes most of the time
    dtypes = (torch.float32, torch.bfloat16) if length < 4097 else (torch.float32,)
    check_against_oracle(scan("cpu", True), scan("reference", True), inputs, dtypes)


def test_long_in_bfloat16() -> None:
    inputs = make_inputs(1, 4097, 24, 16, 0, "dzbi")
    check_against_oracle(scan("cpu", True), scan("reference", True), inputs, (torch.bfloat16,))


@pytest.mark.parametrize(("channels", "groups"), [(64, 0), (24, 0), (32, 4), (12, 2)])
def test_memory_that_nothing_was_written_to_is_not_read(
    channels: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # an uninitialised tensor of the operator holds NaN, in its scratch, its shares of sums and its results
    inputs = {name: x.float() for name, x in make_inputs(2, 130, channels, 8, groups, "dzbi").items()}
    expected = run(scan("cpu", True), inputs, torch.float32)
    empty, empty_result = torch.empty, cpu.RESULTS.empty
    touched = []

    def poison(x: torch.Tensor) -> torch.Tensor:
        touched.append(x.numel())
        return x.fill_(float("nan")) if x.dtype == torch.float32 else x

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
        patch.setattr(cpu.RESULTS, "empty", lambda *args: poison(empty_result(*args)))
        got = run(scan("cpu", True), inputs, torch.float32)
    assert len(touched) > 10
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
