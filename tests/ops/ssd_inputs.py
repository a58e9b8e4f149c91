"""Random inputs for the tests of the SSD scan, and the scan as `compare` calls it."""

from __future__ import annotations

import torch
from comparing import Inputs
from torch import Tensor

from lightm.ops import ssd_scan_with_state

F64 = torch.float64
FAST = ["cpu", "chunked"]


def make_inputs(
    batch: int, length: int, heads: int, width: int, states: int, groups: int = 0, optional: str = ""
) -> Inputs:
    """Random inputs; `optional` names the optional ones by first letter: d, z, b(ias), i."""
    generator = torch.Generator().manual_seed(length * 1000 + heads)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    shared = (batch, length, groups, states) if groups else (batch, length, states)
    inputs = {
        "u": random(batch, length, heads, width),
        "delta": random(batch, length, heads).abs() * 0.3 + 1e-3,
        "A": -torch.rand(heads, generator=generator, dtype=F64) * 4 - 0.05,
        "B": random(*shared),
        "C": random(*shared),
        "d_skip": random(heads),
        "z": random(batch, length, heads, width),
        "delta_bias": random(heads).abs() * 0.1,
        "initial_state": random(batch, heads, width, states),
    }
    letters = {"d_skip": "d", "z": "z", "delta_bias": "b", "initial_state": "i"}
    return {name: value for name, value in inputs.items() if name not in letters or letters[name] in optional}


def scan(impl: str, softplus: bool = True):  # type: ignore[no-untyped-def]
    def call(**inputs: Tensor) -> tuple[Tensor, Tensor]:
        return ssd_scan_with_state(**inputs, delta_softplus=softplus, impl=impl)  # type: ignore[arg-type]

    return call


def single(inputs: Inputs) -> Inputs:
    return {name: x.float() for name, x in inputs.items()}
