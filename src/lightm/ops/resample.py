"""Halving and doubling channels-last images: max and mean pooling by 2, linear interpolation by 2."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor
from torch.nn import functional

from lightm.ops.checks import check_kinds, choose
from lightm.ops.register import Operator, differentiable
from lightm.ops.threads import doubled, halved


def max_pool2(x: Tensor, impl: str = "auto") -> Tensor:
    """Keep the largest of every 2x2 (2x2x2) voxels.

    Args:
        x: (Bt, Y, X, C) or (Bt, Z, Y, X, C); a last odd row, column or plane is left out.
        impl: "cpu" (Numba kernel), "reference" (PyTorch's own), or "auto" as in `selective_scan`.

    Returns: (Bt, *(spatial // 2), C) in x's dtype. Where several voxels are largest, the gradient goes to the first.
    Raises ValueError for a shape, dtype or `impl` that does not fit.
    Cost: x is read once and is what the backward pass keeps (no indices).
    """
    return _pool("max_pool2", "max", x, impl)


def avg_pool2(x: Tensor, impl: str = "auto") -> Tensor:
    """Average every 2x2 (2x2x2) voxels; arguments, result and errors as in `max_pool2`."""
    return _pool("avg_pool2", "avg", x, impl)


def upsample_linear2(x: Tensor, impl: str = "auto") -> Tensor:
    """Double every spatial axis by (bi-, tri-)linear interpolation with samples at voxel centres.

    Along every axis out[2i] = 3/4 x[i] + 1/4 x[i-1] and out[2i+1] = 3/4 x[i] + 1/4 x[i+1], clamped at the border:
    PyTorch's `interpolate(scale_factor=2, align_corners=False)`.

    Args:
        x: (Bt, Y, X, C) or (Bt, Z, Y, X, C).
        impl: "cpu" (Numba kernel), "reference" (PyTorch's own), or "auto" as in `selective_scan`.

    Returns: (Bt, *(spatial * 2), C) in x's dtype.
    Raises ValueError for a shape, dtype or `impl` that does not fit.
    Cost: about one multiply-add per output and axis; nothing is kept for the backward pass.
    """
    _check("upsample_linear2", x)
    if choose("upsample_linear2", impl, x) == "reference":
        mode = "bilinear" if x.dim() == 4 else "trilinear"
        return functional.interpolate(x.movedim(-1, 1), scale_factor=2, mode=mode).movedim(1, -1).contiguous()
    return upsample_op(x)


def _check(name: str, x: Tensor) -> None:
    check_kinds(name, {"x": x})
    if x.dim() not in (4, 5) or 0 in x.shape[1:]:
        raise ValueError(
            f"{name}: x has shape {tuple(x.shape)}, expected (Bt, Y, X, C) or (Bt, Z, Y, X, C), channels last, with "
            "no empty axis"
        )


def _pool(name: str, kind: str, x: Tensor, impl: str) -> Tensor:
    _check(name, x)
    if min(x.shape[1:-1]) < 2:
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}, expected 2 voxels or more along every spatial axis")
    if choose(name, impl, x) == "reference":
        run: Callable[..., Tensor] = getattr(functional, f"{kind}_pool{x.dim() - 2}d")
        return run(x.movedim(-1, 1), 2).movedim(1, -1).contiguous()
    return pool_op(x, kind)


@cache
def _cpu() -> Any:
    from lightm.ops import resample_cpu

    return resample_cpu


pool_op = differentiable(
    "pool2",
    "Tensor x, str kind",
    lambda: (_cpu().pool_forward, _cpu().pool_backward),
    lambda x, kind: x.new_empty(halved(x)),
)
upsample_op = Operator(
    "upsample_linear2",
    "(Tensor x) -> Tensor",
    lambda x: _cpu().upsample_forward(x),
    lambda x: x.new_empty(doubled(x)),
)
upsample_backward_op = Operator(
    "upsample_linear2_backward",
    "(Tensor grad_y) -> Tensor",
    lambda grad_y: _cpu().upsample_backward(grad_y),
    lambda grad_y: grad_y.new_empty(halved(grad_y)),
)
upsample_op.register_autograd(lambda ctx, grad_y: upsample_backward_op(grad_y))
