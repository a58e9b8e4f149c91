"""The SSD scan on the CPU as a PyTorch operator: what compile, export and autograd see."""

from __future__ import annotations

from typing import Any

from lightm.ops.scan.inputs import ScanInputs, declare_scan


def _cpu() -> Any:
    from lightm.ops.ssd.cpu import run_backward, run_forward

    return run_forward, run_backward


def _saved(inputs: ScanInputs, chunk: int) -> tuple[int, ...]:
    from lightm.ops.ssd.cpu import layout_of

    return layout_of(inputs).saved_shape(chunk)


ssd_op = declare_scan("lightm::ssd_scan", _cpu, _saved)
