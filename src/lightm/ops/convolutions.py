"""Depthwise convolutions, channels last: Mamba's causal one over tokens, and kernel size 3 on images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightm.ops.checks import check_kinds, check_shape, choose, inner_type
from lightm.ops.register import differentiable

_CAUSAL = "causal_conv1d"
_DEPTHWISE = "depthwise_conv"


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

    Returns: (Bt, L, E) in x's dtype; arithmetic in float32 inside (float64 for float64).
    Raises ValueError for shapes, dtypes or devices that do not fit, an unknown activation, an impossible `impl`.
    Cost: K multiply-adds per element; the kernel reads x and writes y once; x is what the backward pass keeps.
    """
    check_kinds(_CAUSAL, {"x": x, "weight": weight, "bias": bias})
    if x.dim() != 3:
        raise ValueError(f"{_CAUSAL}: x has shape {tuple(x.shape)}, expected (Bt, L, E), channels last")
    if weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 1:
        raise ValueError(
            f"{_CAUSAL}: weight has shape {tuple(weight.shape)}, expected ({x.shape[2]}, K) = (E, K), E from x's last "
            "axis; a Conv1d weight (E, 1, K) needs .squeeze(1)"
        )
    if bias is not None:
        check_shape(_CAUSAL, "bias", bias, (x.shape[2],), "(E,), E from x's last axis")
    if activation not in (None, "silu"):
        raise ValueError(f"{_CAUSAL}: activation is {activation!r}, expected None or 'silu'")
    run = reference_conv1d if choose(_CAUSAL, impl, x) == "reference" else conv1d_op
    return run(x, weight, bias, activation == "silu")


def reference_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """`causal_conv1d` in plain PyTorch, one offset after the other: the oracle."""
    inner, kernel_size = inner_type(x), weight.shape[1]
    padded = functional.pad(x.to(inner), (0, 0, kernel_size - 1, 0))
    y = torch.zeros_like(x, dtype=inner) if bias is None else bias.to(inner).expand(x.shape)
    for k in range(kernel_size):
        y = y + weight[:, k].to(inner) * padded[:, k : k + x.shape[1]]
    return (functional.silu(y) if silu else y).to(x.dtype)


def depthwise_conv(x: Tensor, weight: Tensor, impl: str = "auto") -> Tensor:
    """Convolve every channel with its own 3x3 (3x3x3) kernel; stride 1, zero padding of 1.

    y[p,c] = sum_k weight[k,c] * x[p+k-1,c] over the offsets k of all axes (cross-correlation, as in PyTorch).

    Args:
        x: (Bt, Y, X, C) or (Bt, Z, Y, X, C); contiguous tensors are used in place, others copied.
        weight: (3, 3, C) or (3, 3, 3, C); of a Conv3d weight (C, 1, 3, 3, 3): w.squeeze(1).movedim(0, -1).
        impl: "cpu" (Numba kernel), "reference" (plain PyTorch), or "auto" as in `selective_scan`.

    Returns: the shape and dtype of x; arithmetic in float32 inside (float64 for float64).
    Raises ValueError for shapes, dtypes or devices that do not fit, an impossible `impl`.
    Cost: 9 or 27 multiply-adds per element; x is what the backward pass keeps. Deterministic.
    """
    check_kinds(_DEPTHWISE, {"x": x, "weight": weight})
    if x.dim() not in (4, 5):
        raise ValueError(
            f"{_DEPTHWISE}: x has shape {tuple(x.shape)}, expected (Bt, Y, X, C) or (Bt, Z, Y, X, C), channels last"
        )
    hint = "for a convolution module's weight (C, 1, 3, ...) give weight.squeeze(1).movedim(0, -1)"
    check_shape(_DEPTHWISE, "weight", weight, (3,) * (x.dim() - 2) + x.shape[-1:], "3 per axis, then C of x", hint)
    return reference_depthwise(x, weight) if choose(_DEPTHWISE, impl, x) == "reference" else depthwise_op(x, weight)


def reference_depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """`depthwise_conv` in plain PyTorch, one offset after the other: the oracle."""
    inner, sizes = inner_type(x), x.shape[1:-1]
    padded = functional.pad(x.to(inner), (0, 0) + (1, 1) * len(sizes))
    y = torch.zeros_like(x, dtype=inner)
    for offset in torch.cartesian_prod(*[torch.arange(3)] * len(sizes)).tolist():
        window = (slice(None), *(slice(k, k + size) for k, size in zip(offset, sizes, strict=True)))
        y = y + weight[tuple(offset)].to(inner) * padded[window]
    return y.to(x.dtype)


def _causal() -> Any:
    from lightm.ops.conv1d_cpu import run_backward, run_forward

    return run_forward, run_backward


def _depthwise() -> Any:
    from lightm.ops.depthwise_cpu import run_backward, run_forward

    return run_forward, run_backward


conv1d_op = differentiable("causal_conv1d", "Tensor x, Tensor weight, Tensor? bias, bool silu", _causal)
depthwise_op = differentiable("depthwise_conv", "Tensor x, Tensor weight", _depthwise)
