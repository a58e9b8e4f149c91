"""Times and memory."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from lightm import memory
from lightm.errors import LightMError
from lightm.lab.bench import measure
from lightm.lab.bench.kernels import STATES, BareScan
from lightm.lab.bench.measure import OutOfMemoryError, peak_in_child
from lightm.lab.bench.records import commit, cpu_model, versions
from lightm.lab.bench.roofline import Throughput, measure_throughput
from lightm.ops import selective_scan

MEASURABLE = memory.resident() is not None


def test_cases_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SHORTEST", 0.0)
    seen: list[str] = []
    times = measure.alternate({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 3)
    assert [len(times[name]) for name in "ab"] == [3, 3]
    assert "".join(seen[-6:]) == "ababab"


def test_short_calls_are_repeated() -> None:
    assert measure.calls_needed(1.0) == 1
    assert measure.calls_needed(0.005) == 4
    assert measure.calls_needed(0.0) == 1000
    assert measure.seconds(lambda: time.sleep(0.002), 3) >= 0.002


def test_ratios_are_taken_round_by_round() -> None:
    # the machine is slow in the second round: the ratio of the medians would be 0.75
    assert measure.median_ratio([1.0, 30.0, 1.5], [2.0, 60.0, 2.0]) == 0.5


@pytest.mark.slow
@pytest.mark.skipif(not MEASURABLE, reason="the system does not say how much memory a process has")
@pytest.mark.parametrize("fresh", [True, False])
def test_memory_sees_an_allocation(fresh: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.ones(150_000_000)  # an earlier, larger peak of the process must not hide the call's
    if not fresh:  # as on systems that cannot reset the mark: samples must do
        monkeypatch.setattr(memory, "reset_high_water", lambda: False)

    def call() -> None:
        held = torch.ones(50_000_000)
        time.sleep(0.05)
        assert held[-1] == 1

    peak = memory.peak_of(call)
    assert peak is not None
    assert peak == pytest.approx(200e6, rel=0.1)


def test_memory_is_not_measured_where_nothing_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "resident", lambda: None)
    monkeypatch.setattr(memory, "high_water", lambda: None)
    assert memory.peak_of(lambda: torch.ones(10)) is None


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [(-9, OutOfMemoryError, "out of memory"), (1, LightMError, "unetr: RuntimeError: broken")],
)
def test_failures_of_that_process_are_told(
    code: int, error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(*args: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(args, code, "", "Traceback\nRuntimeError: broken\n")

    monkeypatch.setattr(subprocess, "run", failed)
    with pytest.raises(error, match=words):
        peak_in_child({"case": {"name": "unetr"}, "threads": 1})


def test_throughputs_are_positive_and_the_best_of_two_counts() -> None:
    peak = measure_throughput(1, small=True)
    assert min(peak.matmul, peak.registers, peak.bytes, peak.exps, peak.updates) > 0
    assert peak.flops == max(peak.matmul, peak.registers)
    assert Throughput(1, 5, 3, 4, 1).best(Throughput(2, 4, 3, 1, 6)) == Throughput(2, 5, 3, 4, 6)
    assert "GB/s" in peak.describe()


def test_the_bare_scan_computes_the_scan() -> None:
    scan = BareScan(100, 32)
    rates = -torch.arange(1, STATES + 1, dtype=torch.float32).repeat(32, 1)
    u, dt, b, c = (x.unsqueeze(0) for x in (scan.u, scan.dt, scan.b, scan.c))
    expected = selective_scan(u, dt, rates, b, c, impl="reference")[0]
    torch.testing.assert_close(scan.run(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="multiple of"):
        BareScan(4, 3)


def test_what_a_number_depends_on_is_recorded() -> None:
    assert {"lightm", "torch", "numba", "monai", "python"} == set(versions())
    assert versions()["torch"] == torch.__version__.split("+")[0] or versions()["torch"] == torch.__version__
    assert commit()
    assert cpu_model()
    assert versions()["python"] == ".".join(map(str, sys.version_info[:3]))
