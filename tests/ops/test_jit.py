"""Compiling: a note the first time, kept on disk, silent from then on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
from lightm.ops import max_pool2
print(max_pool2(torch.ones(1, 2, 2, 1)).item())
"""


def test_note_once_and_kept_on_disk(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    outputs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True, timeout=240
        )
        outputs.append(done.stdout.splitlines())
    note = "compiling CPU kernels; they are kept on disk, so this happens once for a machine"
    chosen = "max_pool2: using the cpu implementation"
    assert outputs[0] == [chosen, note, "1.0"]
    assert outputs[1] == [chosen, "1.0"]
    assert list(tmp_path.rglob("*.nbi"))


def test_kernels_depend_on_numbers_only() -> None:
    # a compiled function among the values that a kernel closes over gets a new name in every process, and the kernel
    # would be compiled again each time
    from lightm.ops import conv1d_kernels, depthwise_kernels, jit, resample_kernels
    from lightm.ops.scan import kernels

    made = [factory(4) for factory in (kernels.forward_kernel, kernels.backward_kernel, kernels.sum_kernel)]
    made += [depthwise_kernels.forward_kernel(2), depthwise_kernels.weight_kernel(2)]
    made += [factory(2) for pair in resample_kernels.POOLS.values() for factory in pair]
    made += [conv1d_kernels.conv1d_forward, conv1d_kernels.conv1d_backward]
    made += [resample_kernels.double_forward, resample_kernels.double_backward]
    assert set(made) <= jit._kernels
    for kernel in jit._kernels:
        cells = [cell.cell_contents for cell in kernel.py_func.__closure__ or ()]
        assert all(isinstance(value, int) for value in cells), kernel.__name__
