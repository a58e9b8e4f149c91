"""Mamba's causal depthwise convolution over tokens, channels last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightm.ops.checks import check_kinds, check_shape, choose
from lightm.ops.register import differentiable

_NAME = "causal_conv1d"


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, impl: str = "auto"
) -> Tensor:
    """Convolve every channel over this and the K - 1 tokens before, with a kernel of size K.

    y[t,e] = act(bias[e] + sum_k weight[e,k] * x[t-K+1+k, e]), x being 0 before the first token
    (Mamba, arXiv 2312.00752, figure 3).

    Args:
        x: (Bt, L, E), any strides; float32, bfloat16, float16, or float64 for the reference.
        weight: (E, K). bias: (E,) or None.
        activation: None or "silu".
        impl: "cpu" (Numba kernel), "reference" (plain PyTorch), or "auto" as in `selective_scan`.

    Returns:
        (Bt, L, E) in x's dtype; arithmetic in float32 inside (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown activation, an impossible `impl`.

    Cost: K multiply-adds per element; the kernel reads x and writes y once; x is what the backward pass keeps.
    """
    check_kinds(_NAME, {"x": x, "weight": weight, "bias": bias})
    if x.dim() != 3:
        raise ValueError(f"{_NAME}: x has shape {tuple(x.shape)}, expected (Bt, L, E), channels last")
    if weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 1:
        raise ValueError(
            f"{_NAME}: weight has shape {tuple(weight.shape)}, expected ({x.shape[2]}, K) = (E, K), E from x's last "
            "axis; a Conv1d weight (E, 1, K) needs .squeeze(1)"
        )
    if bias is not None:
        check_shape(_NAME, "bias", bias, (x.shape[2],), "(E,), E from x's last axis")
    if activation not in (None, "silu"):
        raise ValueError(f"{_NAME}: activation is {activation!r}, expected None or 'silu'")
    silu = activation == "silu"
    if choose(_NAME, impl, x) == "reference":
        return reference_conv1d(x, weight, bias, silu)
    return conv1d_op(x, weight, bias, silu)


def reference_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """`causal_conv1d` in plain PyTorch, one offset after the other: the oracle."""
    inner = torch.float64 if x.dtype == torch.float64 else torch.float32
    kernel_size = weight.shape[1]
    padded = functional.pad(x.to(inner), (0, 0, kernel_size - 1, 0))
    y = torch.zeros_like(x, dtype=inner) if bias is None else bias.to(inner).expand(x.shape)
    for k in range(kernel_size):
        y = y + weight[:, k].to(inner) * padded[:, k : k + x.shape[1]]
    return (functional.silu(y) if silu else y).to(x.dtype)


def _cpu() -> Any:
    from lightm.ops.conv1d_cpu import run_backward, run_forward

    return run_forward, run_backward


conv1d_op = differentiable("lightm::causal_conv1d", "Tensor x, Tensor weight, Tensor? bias, bool silu", _cpu)
