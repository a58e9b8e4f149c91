"""A plain Mamba layer made of the operators reproduces a recorded one: output and all gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comparing import relative
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from lightm.ops import causal_conv1d, selective_scan


def mamba(x: Tensor, p: dict[str, Tensor], impl: str) -> Tensor:
    """in_proj -> conv + SiLU -> x_proj, dt_proj -> scan gated by z -> out_proj; no inner normalisation."""
    inner, z = functional.linear(x, p["in_proj.weight"]).chunk(2, dim=-1)
    inner = causal_conv1d(inner, p["conv1d.weight"].squeeze(1), p["conv1d.bias"], "silu", impl)
    rank, states = p["dt_proj.weight"].shape[1], p["A_log"].shape[1]
    low, b, c = functional.linear(inner, p["x_proj.weight"]).split((rank, states, states), dim=-1)
    delta = functional.linear(low, p["dt_proj.weight"])
    y = selective_scan(
        inner, delta, -torch.exp(p["A_log"]), b, c, p["D"], z, p["dt_proj.bias"], delta_softplus=True, impl=impl
    )
    assert isinstance(y, Tensor)
    return functional.linear(y, p["out_proj.weight"])


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_recorded_layer(shared: Path, impl: str) -> None:
    record = load_file(shared / "fixtures" / "mamba_s6_layer.safetensors")
    weights = {
        name.removeprefix("state."): value.requires_grad_()
        for name, value in record.items()
        if name.startswith("state.")
    }
    x = record["input"].requires_grad_()
    y = mamba(x, weights, impl)
    (y * record["output_weight"]).sum().backward()
    assert relative(y.detach(), record["output"]) < 1e-5
    assert x.grad is not None
    assert relative(x.grad, record["grad_input"]) < 1e-5
    assert len(weights) == 9
    for name, weight in weights.items():
        assert weight.grad is not None
        assert relative(weight.grad, record[f"grad.{name}"]) < 1e-5, name
