"""A linear layer over channels-last data: many rows, small weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightm.ops.checks import check_kinds, check_shape, choose
from lightm.ops.register import Operator

_NAME = "linear"
_FEW_ROWS = 64  # below this many, packing the weights costs more than it saves


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, impl: str = "auto") -> Tensor:
    """Multiply every row with a small matrix: y = x @ weight.T + bias; or parts of it with one matrix each.

    As `torch.nn.functional.linear`, for many rows (tokens or voxels) of few channels, where general matmul
    libraries leave most of the processor idle.

    Args:
        x: (..., C), any strides; float32, bfloat16, float16, or float64 for the reference.
        weight: (C_out, C), or (G, C_out / G, C / G): matrix g takes the g-th of G equal parts of the channels to the
            g-th part of the result. bias: (C_out,) or None.
        impl: "cpu" (own kernels, float32), "reference" (PyTorch's), or "auto": "cpu" for float32 on the CPU.

    Returns: (..., C_out) in x's dtype.
    Raises ValueError for shapes, dtypes or devices that do not fit, or an impossible `impl`.
    Cost: C * C_out multiply-adds per row (a G-th of it with parts) forward, twice that backward, which keeps x.
    """
    check_kinds(_NAME, {"x": x, "weight": weight, "bias": bias})
    if weight.dim() not in (2, 3) or x.dim() < 1 or x.shape[-1] != _parts(weight) * weight.shape[-1]:
        raise ValueError(
            f"{_NAME}: x {tuple(x.shape)} and weight {tuple(weight.shape)}: expected (..., C) and (C_out, C), or "
            "(G, C_out / G, C / G)"
        )
    check_shape(_NAME, "bias", bias, (_width(weight),), "(C_out,), C_out from weight's shape")
    limits, autocast = None, x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or autocast:
        limits = "the kernels multiply float32 only"
    elif 0 in weight.shape:
        limits = "there are no channels"
    elif x.shape[:-1].numel() < _FEW_ROWS and impl == "auto":
        limits = "only a few rows"
    if choose(_NAME, impl, x, limits) == "reference":
        if weight.dim() == 2:
            return functional.linear(x, weight, bias)
        y = torch.einsum("...gi,goi->...go", x.unflatten(-1, (weight.shape[0], -1)), weight).flatten(-2)
        return y if bias is None else y + bias
    return linear_op(x, weight, bias)


def _parts(weight: Tensor) -> int:
    return 1 if weight.dim() == 2 else weight.shape[0]


def _width(weight: Tensor) -> int:
    """Channels of the result."""
    return _parts(weight) * weight.shape[-2]


@cache
def _cpu() -> Any:
    from lightm.ops import matmul_cpu

    return matmul_cpu


linear_op = Operator(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    lambda x, weight, bias: _cpu().run_matmul(x, weight, bias),
    lambda x, weight, bias: x.new_empty((*x.shape[:-1], _width(weight))),
)
# the weight's gradient (parts, C_out / parts, C / parts), summed over all rows in a fixed order
linear_weight_grad = Operator(
    "linear_weight_grad",
    "(Tensor x, Tensor grad_y, int parts) -> Tensor",
    lambda x, grad_y, parts: _cpu().run_weight_gradient(grad_y, x, parts),
    lambda x, grad_y, parts: x.new_empty((parts, grad_y.shape[-1] // parts, x.shape[-1] // parts)),
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx = linear_op(grad_y, weight.mT, None) if ctx.needs_input_grad[0] else None
    dweight = None
    if ctx.needs_input_grad[1]:
        dweight = linear_weight_grad(x, grad_y, _parts(weight)).view(weight.shape)
    dbias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
    return dx, dweight, dbias


def _backward_of_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, grad_y = ctx.saved_tensors
    dx = linear_op(grad_y, grad.mT, None) if ctx.needs_input_grad[0] else None
    dgrad_y = linear_op(x, grad, None) if ctx.needs_input_grad[1] else None
    return dx, dgrad_y, None


linear_op.register_autograd(_backward, _keep)
linear_weight_grad.register_autograd(_backward_of_gradient, _keep)
