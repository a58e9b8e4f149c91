"""The vectors' elementary functions against float64, and kernels for processors without AVX-512."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


def table(name: str, lanes: int, x: np.ndarray) -> np.ndarray:
    """Values of a function of `lightm.ops.vector_math` computed with vectors of `lanes` numbers."""
    from numba import njit

    from lightm.ops import vector_math
    from lightm.ops.vector import load, store

    function = getattr(vector_math, name)
    if name == "exp2":

        @njit
        def run(source, target, count):  # type: ignore[no-untyped-def]
            for i in range(0, count, lanes):
                store(target + 4 * i, function(load(source + 4 * i, lanes)))
    else:

        @njit
        def run(source, target, count):  # type: ignore[no-untyped-def]
            for i in range(0, count, lanes):
                store(target + 4 * i, function(load(source + 4 * i, lanes), lanes))

    x = np.ascontiguousarray(x, np.float32)
    y = np.empty_like(x)
    run(x.ctypes.data, y.ctypes.data, x.size)
    return y


TRUTH = {
    "exp2": np.exp2,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softplus": lambda x: np.logaddexp(0, x),
}


@pytest.mark.parametrize("lanes", [16, 8, 1])
@pytest.mark.parametrize(("name", "bound"), [("exp2", 1.8e-7), ("sigmoid", 1.5e-6), ("softplus", 1.5e-6)])
def test_accuracy(name: str, bound: float, lanes: int) -> None:
    x = np.linspace(-20, 20, 1 << 14, dtype=np.float32)
    expected = TRUTH[name](x.astype(np.float64))
    assert np.abs(table(name, lanes, x) / expected - 1).max() < bound


@pytest.mark.parametrize("lanes", [16, 8])
def test_far_out(lanes: int) -> None:
    x = np.array([-np.inf, -1e30, -200, -1e-30, 0, 90, 1e30, np.nan] * 2, np.float32)
    found = {name: table(name, lanes, x)[:8] for name in TRUTH}
    for name, values in found.items():
        assert np.isnan(values[7]), name
    np.testing.assert_allclose(found["exp2"][:6], [0, 0, 0, 1, 1, 2.0**90], rtol=1e-6, atol=1.2e-38)
    assert found["exp2"][6] >= 2.0**126
    np.testing.assert_allclose(found["sigmoid"][:7], [0, 0, 0, 0.5, 0.5, 1, 1], rtol=1e-6, atol=1e-37)
    log2 = np.log(2)
    np.testing.assert_allclose(found["softplus"][1:7], [0, 0, log2, log2, 90, 1e30], rtol=1e-6, atol=1e-37)


SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_scan_cpu as scans
from comparing import check_against_oracle
from lightm.ops import depthwise_conv
from lightm.ops.jit import LANES
assert LANES == 8, LANES
for case in ((1, 65, 24, 16, 0, "dzbi"), (1, 3, 20, 4, 2, "z")):
    check_against_oracle(scans.scan("cpu", True), scans.scan("reference", True), scans.make_inputs(*case))
x, w = torch.randn(1, 3, 4, 12), torch.randn(3, 3, 12)
torch.testing.assert_close(depthwise_conv(x, w, "cpu"), depthwise_conv(x, w, "reference"))
print("right")
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not any(word in os.uname().machine for word in ("x86_64", "AMD64")) if hasattr(os, "uname") else True,
    reason="names x86 processors",
)
@pytest.mark.parametrize(("processor", "features"), [("haswell", "+avx2,+fma"), ("nehalem", "+sse4.2")])
def test_without_avx512(processor: str, features: str, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": processor,
        "NUMBA_CPU_FEATURES": features,
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    script = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "right"
