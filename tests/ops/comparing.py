"""Compare an operator's fast implementation with its float64 oracle: results and every gradient by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Inputs = dict[str, Tensor]


def relative(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected tensor."""
    scale = expected.double().norm().item()
    return (got.double() - expected.double()).norm().item() / (scale if scale > 0 else 1.0)


def run(call: Callable[..., tuple[Tensor, ...]], inputs: Inputs, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Results "out0".. and gradients "d<name>" of a random weighted sum of the results."""
    given = {name: value.detach().to(dtype).requires_grad_() for name, value in inputs.items()}
    outputs = call(**given)
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros((), dtype=torch.float64)
    for out in outputs:
        # numbers that every tested type holds exactly, so that the same gradient is sent back
        weight = torch.randn(out.shape, generator=generator).bfloat16().double()
        loss = loss + (out.double() * weight).sum()
    loss.backward()
    found = {f"out{i}": out.detach() for i, out in enumerate(outputs)}
    for name, value in given.items():
        assert value.grad is not None, name
        found[f"d{name}"] = value.grad
    return found


def assert_close(got: Inputs, expected: Inputs, tolerance: float) -> None:
    """Every tensor within `tolerance` of its counterpart, norm-wise."""
    assert got.keys() == expected.keys()
    errors = {name: relative(got[name], expected[name]) for name in expected}
    bad = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not bad, f"beyond {tolerance}: {bad}"


def check_against_oracle(
    fast: Callable[..., tuple[Tensor, ...]],
    oracle: Callable[..., tuple[Tensor, ...]],
    inputs: Inputs,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
) -> None:
    """float32 within 1e-5 and bfloat16 within 1e-2 of the float64 oracle on the same (rounded) numbers."""
    for dtype in dtypes:
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        rounded = {name: value.to(dtype).double() for name, value in inputs.items()}
        assert_close(run(fast, rounded, dtype), run(oracle, rounded, torch.float64), tolerance)
