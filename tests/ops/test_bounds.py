"""What kernels touch: declarations held against buffers, and against the hardware between pages without access."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightm.ops import bounds
from lightm.ops.bounds import Address, KernelBoundsError

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
USES = [
    "linear", "linear, odd", "conv1d", "depthwise 2D", "depthwise 3D", "max_pool2 2D", "max_pool2 3D", "avg_pool2 2D",
    "avg_pool2 3D", "upsample_linear2 2D", "upsample_linear2 3D", "group norm", "gated norm, 16 wide",
    "gated norm, 8 wide", "gated norm, 24 wide", "scan, 4 states, 1 groups", "scan, 8 states, 4 groups",
    "scan, 16 states, 1 groups", "scan, 16 states, 4 groups", "scan, many threads", "ssd, 4 states", "ssd, 16 states",
    "layer rvm, bidirectional, inference", "layer spm, axes, inference", "layer rvm, 8 states, raster, training",
    "lightm-small 3D, inference", "lightm-small 2D, training", "lightm-unet-mamba2 2D, training",
]  # fmt: skip


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "LIGHTM_CHECK_KERNELS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.skipif(os.name == "nt", reason="no mprotect")
@pytest.mark.parametrize("where", ["start", "end"])
def test_every_kernel_stays_within_what_it_declares(where: str) -> None:
    done = _run(str(HERE / "guard_pages.py"), where, *USES)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-500:]}\n{done.stderr[-2000:]}"
    *errors, kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(value < 1e-3 for line in errors for value in line.values()), errors
    assert len(errors) == len(USES)
    assert kernels["kernels run"] == kernels["kernels"]  # none was left out


PLANTED = """
import sys, torch
sys.path.insert(0, {here!r})
import guard_pages
from lightm.ops import bounds, jit
from lightm.ops.bounds import address
from lightm.ops.vector import load, store

@jit.kernel(lambda x, count: {{"x": (0, 4 * (count - {less}))}})
def double(x, count):
    for i in range(count):
        store(x + 4 * i, load(x + 4 * i, 1) + load(x + 4 * i, 1))

bounds.execute = guard_pages.Guarded(at_end=True)
numbers = torch.arange(8.0)
double(address(numbers), 8)
print(numbers.tolist())
"""


@pytest.mark.skipif(os.name == "nt", reason="no mprotect")
def test_a_kernel_that_touches_more_than_it_declares_is_found(tmp_path: Path) -> None:
    for less in (0, 1):
        script = tmp_path / f"planted{less}.py"
        script.write_text(PLANTED.format(here=str(HERE), less=less), encoding="utf-8")
        done = _run(str(script), NUMBA_CACHE_DIR=str(tmp_path))
        if less:
            assert done.returncode < 0, done.stdout  # ended by the system
        else:
            assert done.stdout.strip() == str([2.0 * i for i in range(8)]), done.stderr


def _checked() -> tuple[Any, list[tuple[int, ...]]]:
    called: list[tuple[int, ...]] = []

    def kernel(x: int, y: int, rows: int) -> None:
        called.append((x, y, rows))

    return bounds.checked(kernel, lambda rows: {"x": (0, 16 * rows), "y": (-8, 4 * rows)}), called


def test_calls_that_would_leave_a_buffer_are_refused() -> None:
    call, called = _checked()
    x, y = torch.zeros(4, 4), torch.zeros(8)
    at = {"x": bounds._checked_address(x), "y": bounds._checked_address(y)}
    call(at["x"], at["y"] + 8, 4)
    assert called == [(x.data_ptr(), y.data_ptr() + 8, 4)]
    assert all(type(value) is int for value in called[0])
    for name, shift, message in (
        ("x", 4, "'x' touches bytes 4 to 68 of a buffer of 64 bytes"),
        ("x", -4, "'x' touches bytes -4 to 60 of a buffer of 64 bytes"),
        ("y", -8, "'y' touches bytes -8 to 16 of a buffer of 32 bytes"),
        ("y", 1, "'y' is not aligned to 4 bytes"),
    ):
        moved = {"x": at["x"], "y": at["y"] + 8}
        moved[name] = moved[name] + shift
        with pytest.raises(KernelBoundsError, match=message):
            call(moved["x"], moved["y"], 4)
    with pytest.raises(KernelBoundsError, match=r"'x' = .* is the address of no known buffer"):
        call(x.data_ptr(), at["y"] + 8, 4)
    with pytest.raises(KernelBoundsError, match="'x' = 0x0 is the address of no known buffer"):
        call(0, at["y"] + 8, 4)
    with pytest.raises(KernelBoundsError, match="the extent of 'rows' is not declared"):
        call(at["x"], at["y"] + 8, at["x"])
    assert len(called) == 1


def test_addresses_keep_their_buffer_through_sums_and_know_strides() -> None:
    x = torch.zeros(6, 10)[1:4, 2:5]
    at = bounds._checked_address(x)
    assert isinstance(at, Address)
    assert (at.low, at.high) == (x.data_ptr(), x.data_ptr() + 4 * (2 * 10 + 3))
    for moved in (at + 8, 8 + at, at - -8):
        assert isinstance(moved, Address)
        assert (int(moved), moved.low, moved.high) == (int(at) + 8, at.low, at.high)
    empty = bounds._checked_address(torch.zeros(0, 3))
    assert isinstance(empty, Address)
    assert empty.low == empty.high


def test_rows() -> None:
    assert bounds.rows(2, 5, 40, 12) == (80, 172)
    assert bounds.rows(3, 3, 40, 12) == bounds.NOTHING
    assert bounds.each((0, 4), "x", "y") == {"x": (0, 4), "y": (0, 4)}


def test_the_checks_cost_nothing_unless_asked_for() -> None:
    script = "from lightm.ops import bounds, conv1d_cpu; print(bounds.address, conv1d_cpu.conv1d_forward)"
    off = _run("-c", script, LIGHTM_CHECK_KERNELS="0").stdout
    assert "_checked_address" not in off
    assert "CPUDispatcher" in off
    on = _run("-c", script).stdout
    assert "_checked_address" in on
    assert "CPUDispatcher" not in on


def test_this_run_checks_its_kernels() -> None:
    assert bounds.CHECKS or os.environ["LIGHTM_CHECK_KERNELS"] == "0"
