"""Halving and doubling channels-last images: max and mean pooling by 2, linear interpolation by 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional

from lightm.ops.checks import check_kinds, choose
from lightm.ops.register import differentiable, operator


def max_pool2(x: Tensor, impl: str = "auto") -> Tensor:
    """Keep the largest of every 2x2 (2x2x2) voxels.

    Args:
        x: (Bt, Y, X, C) or (Bt, Z, Y, X, C); a last odd row, column or plane is left out.
        impl: "cpu" (Numba kernel), "reference" (PyTorch's own), or "auto" as in `selective_scan`.

    Returns:
        (Bt, *(spatial // 2), C) in x's dtype. Where several voxels are largest, the gradient goes to the first.

    Raises:
        ValueError: a shape, dtype or `impl` that does not fit.

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

    Returns:
        (Bt, *(spatial * 2), C) in x's dtype.

    Raises:
        ValueError: a shape, dtype or `impl` that does not fit.

    Cost: about one multiply-add an output and axis; nothing is kept for the backward pass.
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
        pools: dict[tuple[str, int], Callable[..., Tensor]] = {
            ("max", 4): functional.max_pool2d,
            ("max", 5): functional.max_pool3d,
            ("avg", 4): functional.avg_pool2d,
            ("avg", 5): functional.avg_pool3d,
        }
        return pools[kind, x.dim()](x.movedim(-1, 1), 2).movedim(1, -1).contiguous()
    return pool_op(x, kind)


def _pooling() -> Any:
    from lightm.ops.resample_cpu import pool_backward, pool_forward

    return pool_forward, pool_backward


def _fake_pool(x: Tensor, kind: str) -> Tensor:
    return x.new_empty((x.shape[0], *(size // 2 for size in x.shape[1:-1]), x.shape[-1]))


pool_op = differentiable("lightm::pool2", "Tensor x, str kind", _pooling, _fake_pool)


@operator("lightm::upsample_linear2")
def upsample_op(x: Tensor) -> Tensor:
    """The CPU interpolation kernel as a PyTorch operator."""
    from lightm.ops.resample_cpu import upsample_forward

    return upsample_forward(x)


@upsample_op.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], *(size * 2 for size in x.shape[1:-1]), x.shape[-1]))


@operator("lightm::upsample_linear2_backward")
def upsample_backward_op(grad_y: Tensor) -> Tensor:
    """Gradient of the interpolated tensor."""
    from lightm.ops.resample_cpu import upsample_backward

    return upsample_backward(grad_y)


@upsample_backward_op.register_fake
def _(grad_y: Tensor) -> Tensor:
    return grad_y.new_empty((grad_y.shape[0], *(size // 2 for size in grad_y.shape[1:-1]), grad_y.shape[-1]))


def _upsample_grad(ctx: Any, grad_y: Tensor) -> Tensor:
    return upsample_backward_op(grad_y)


upsample_op.register_autograd(_upsample_grad)
