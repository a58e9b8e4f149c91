"""Depthwise convolution with kernel size 3 on channels-last images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightm.ops.checks import check_kinds, choose
from lightm.ops.register import differentiable

_NAME = "depthwise_conv"


def depthwise_conv(x: Tensor, weight: Tensor, impl: str = "auto") -> Tensor:
    """Convolve every channel with its own 3x3 (3x3x3) kernel; stride 1, zero padding of 1.

    y[p,c] = sum_k weight[k,c] * x[p+k-1,c] over the offsets k of all axes (cross-correlation, as in PyTorch).

    Args:
        x: (Bt, Y, X, C) or (Bt, Z, Y, X, C); contiguous tensors are used in place, others copied.
        weight: (3, 3, C) or (3, 3, 3, C); of a Conv3d weight (C, 1, 3, 3, 3): w.squeeze(1).movedim(0, -1).
        impl: "cpu" (Numba kernel), "reference" (plain PyTorch), or "auto" as in `selective_scan`.

    Returns:
        The shape and dtype of x; arithmetic in float32 inside (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an impossible `impl`.

    Cost: 9 or 27 multiply-adds per element; x is what the backward pass keeps. Deterministic.
    """
    check_kinds(_NAME, {"x": x, "weight": weight})
    if x.dim() not in (4, 5):
        raise ValueError(
            f"{_NAME}: x has shape {tuple(x.shape)}, expected (Bt, Y, X, C) or (Bt, Z, Y, X, C), channels last"
        )
    axes = x.dim() - 2
    expected = (3,) * axes + (x.shape[-1],)
    if tuple(weight.shape) != expected:
        raise ValueError(
            f"{_NAME}: weight has shape {tuple(weight.shape)}, expected {expected} = 3 per axis, then C of x; "
            "for a convolution module's weight (C, 1, 3, ...) give weight.squeeze(1).movedim(0, -1)"
        )
    if choose(_NAME, impl, x) == "reference":
        return reference_depthwise(x, weight)
    return depthwise_op(x, weight)


def reference_depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """`depthwise_conv` in plain PyTorch, one offset after the other: the oracle."""
    inner = torch.float64 if x.dtype == torch.float64 else torch.float32
    sizes = x.shape[1:-1]
    padded = functional.pad(x.to(inner), (0, 0) + (1, 1) * len(sizes))
    y = torch.zeros_like(x, dtype=inner)
    for offset in torch.cartesian_prod(*[torch.arange(3)] * len(sizes)).tolist():
        window = (slice(None), *(slice(k, k + size) for k, size in zip(offset, sizes, strict=True)))
        y = y + weight[tuple(offset)].to(inner) * padded[window]
    return y.to(x.dtype)


def _cpu() -> Any:
    from lightm.ops.depthwise_cpu import run_backward, run_forward

    return run_forward, run_backward


depthwise_op = differentiable("lightm::depthwise_conv", "Tensor x, Tensor weight", _cpu)
