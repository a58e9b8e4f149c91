"""The selective scan on the CPU and in Triton as PyTorch operators: what compile, export and autograd see."""

from __future__ import annotations

from typing import Any

from lightm.ops.scan.gpu import plan_for
from lightm.ops.scan.inputs import ScanInputs, declare_scan


def _cpu() -> Any:
    from lightm.ops.scan.cpu import run_backward, run_forward

    return run_forward, run_backward


def _cpu_saved(inputs: ScanInputs, chunk: int) -> tuple[int, ...]:
    from lightm.ops.scan.cpu import layout_of

    return layout_of(inputs).saved_shape(chunk)


def _triton() -> Any:
    from lightm.ops.scan.gpu import run_backward, run_forward

    return run_forward, run_backward


scan_op = declare_scan("lightm::selective_scan", _cpu, _cpu_saved)
# "CPU" is for Triton's interpreter alone: `triton_limits` lets no other tensor of a CPU come here
triton_scan_op = declare_scan(
    "lightm::selective_scan_triton", _triton, lambda x: plan_for(x).starts_shape, more="", devices=("CPU", "CUDA")
)
