"""A Mamba layer made of the operators agrees with a plain one and a recorded one: output, gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comparing import relative
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from lightm.ops import causal_conv1d, selective_scan
from tests.plain_mamba import Mamba, randomise


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


@pytest.mark.parametrize(
    ("impl", "dtype", "allowed"), [("reference", torch.float64, 1e-12), ("cpu", torch.float32, 2e-5)]
)
@pytest.mark.parametrize(("channels", "length"), [(8, 1), (20, 65), (32, 130)])
def test_a_plain_layer(impl: str, dtype: torch.dtype, allowed: float, channels: int, length: int) -> None:
    torch.manual_seed(length)
    plain = Mamba(channels)
    randomise(plain, length)
    plain.double()
    x, weight = torch.randn(2, 2, length, channels).double()
    x.requires_grad_()
    expected = plain(x)
    (expected * weight).sum().backward()

    weights = {name: value.detach().to(dtype).requires_grad_() for name, value in plain.state_dict().items()}
    seen = x.detach().to(dtype).requires_grad_()
    y = mamba(seen, weights, impl)
    (y * weight.to(dtype)).sum().backward()
    assert relative(y.detach(), expected.detach()) < allowed
    assert seen.grad is not None
    assert x.grad is not None
    assert relative(seen.grad, x.grad) < allowed
    assert len(weights) == 9
    for name, parameter in plain.named_parameters():
        got = weights[name].grad
        assert got is not None
        assert parameter.grad is not None
        assert relative(got, parameter.grad) < allowed, name


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
