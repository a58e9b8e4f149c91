"""Random inputs of the scan, and the scan as a function of them, for the tests of its implementations."""

from __future__ import annotations

import torch
from comparing import Inputs
from torch import Tensor

from lightm.ops import selective_scan_with_state


def make_inputs(batch: int, length: int, channels: int, states: int, groups: int = 0, optional: str = "") -> Inputs:
    """Random inputs; `optional` names the optional ones by first letter: d, z, b(ias), i."""
    generator = torch.Generator().manual_seed(length * 1000 + channels)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shared = (batch, length, groups, states) if groups else (batch, length, states)
    inputs = {
        "u": random(batch, length, channels),
        "delta": random(batch, length, channels).abs() * 0.3 + 1e-3,
        "A": -torch.rand(channels, states, generator=generator, dtype=torch.float64) * 4 - 0.05,
        "B": random(*shared),
        "C": random(*shared),
        "d_skip": random(channels),
        "z": random(batch, length, channels),
        "delta_bias": random(channels).abs() * 0.1,
        "initial_state": random(batch, channels, states),
    }
    letters = {"d_skip": "d", "z": "z", "delta_bias": "b", "initial_state": "i"}
    return {name: value for name, value in inputs.items() if name not in letters or letters[name] in optional}


def scan(impl: str, softplus: bool):  # type: ignore[no-untyped-def]
    def call(**inputs: Tensor) -> tuple[Tensor, ...]:
        return selective_scan_with_state(**inputs, delta_softplus=softplus, impl=impl)  # type: ignore[arg-type]

    return call
