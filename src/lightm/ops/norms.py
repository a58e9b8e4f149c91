"""Two normalizations fused with what follows them, channels last: LayerNorm with a gate, GroupNorm with ReLU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightm.ops.checks import check_kinds, check_shape, choose, inner_type
from lightm.ops.register import differentiable

_GATED = "gated_norm"
_GROUP = "group_norm_relu"


@dataclass(frozen=True)
class GroupNormParameters:
    """GroupNorm's tensors: weight and bias (C), groups, eps."""

    weight: Tensor
    bias: Tensor
    groups: int
    eps: float


def gated_norm(
    y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, parts: int = 1, eps: float = 1e-5, impl: str = "auto"
) -> Tensor:
    """Normalize every token's channels, part by part, and gate them: (layer_norm(y) * weight + bias) * silu(z).

    The E channels are `parts` groups of E / parts neighbours, each with its own mean and (biased) variance.

    Args:
        y: (Bt, L, E), any strides; float32, bfloat16, float16, or float64 for the reference.
        z: (Bt, L, E) like y, e.g. one half of a chunk: only its channels must be neighbours, or it is copied.
        weight, bias: (E,).
        parts: a divisor of E.
        eps: added to the variance.
        impl: "cpu" (Numba kernel), "reference" (plain PyTorch), or "auto" as in `selective_scan`.

    Returns: (Bt, L, E) in y's dtype; arithmetic in float32 inside (float64 for float64).
    Raises ValueError for shapes, dtypes or devices that do not fit, `parts` not dividing E, an impossible `impl`.
    Cost: one exponential per element; y and z are read and the result written once, and y and z are what the
    backward pass keeps; it reads them and the gradient and writes two. Deterministic.
    """
    check_kinds(_GATED, {"y": y, "z": z, "weight": weight, "bias": bias})
    if y.dim() != 3 or y.shape[2] < 1:
        raise ValueError(f"{_GATED}: y has shape {tuple(y.shape)}, expected (Bt, L, E), channels last, E >= 1")
    check_shape(_GATED, "z", z, y.shape, "(Bt, L, E), the shape of y")
    for name, vector in (("weight", weight), ("bias", bias)):
        check_shape(_GATED, name, vector, (y.shape[2],), "(E,), E from y's last axis", "repeat it when parts share it")
    _check_numbers(_GATED, "parts", parts, y.shape[2], eps)
    run = reference_gated_norm if choose(_GATED, impl, y) == "reference" else gated_norm_op
    return run(y, z, weight, bias, parts, eps)


def group_norm_relu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5, impl: str = "auto"
) -> Tensor:
    """relu(GroupNorm(x)): every group of C / groups channels normalized over all voxels of its image.

    Args:
        x: (Bt, *spatial, C); contiguous tensors are used in place, others copied.
        groups: a divisor of C.
        weight, bias: (C,).
        eps: added to the (biased) variance.
        impl: "cpu" (Numba kernel), "reference" (PyTorch's own), or "auto" as in `selective_scan`.

    Returns: the shape and dtype of x; arithmetic in float32 inside, sums over an image in float64 (all float64 for
    float64).
    Raises ValueError for shapes, dtypes or devices that do not fit, `groups` not dividing C, an impossible `impl`.
    Cost: x is read twice and the result written once; x and 2 numbers per group are what the backward pass keeps; it
    reads x and the gradient twice and writes one. Deterministic.
    """
    check_kinds(_GROUP, {"x": x, "weight": weight, "bias": bias})
    if x.dim() < 3 or 0 in x.shape[1:]:
        raise ValueError(
            f"{_GROUP}: x has shape {tuple(x.shape)}, expected (Bt, *spatial, C), channels last, with one spatial axis "
            "or more and no empty axis"
        )
    for name, vector in (("weight", weight), ("bias", bias)):
        check_shape(_GROUP, name, vector, (x.shape[-1],), "(C,), C from x's last axis")
    _check_numbers(_GROUP, "groups", groups, x.shape[-1], eps)
    if choose(_GROUP, impl, x) == "reference":
        return reference_group_norm_relu(x, groups, weight, bias, eps)
    return group_norm_op(x, groups, weight, bias, eps)[0]


def _check_numbers(operator: str, name: str, divisor: int, channels: int, eps: float) -> None:
    if divisor < 1 or channels % divisor:
        raise ValueError(f"{operator}: {name} is {divisor}, expected a divisor of the {channels} channels")
    if not eps >= 0:
        raise ValueError(f"{operator}: eps is {eps}, expected 0 or more, e.g. 1e-5")


def reference_gated_norm(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, parts: int, eps: float) -> Tensor:
    """`gated_norm` in plain PyTorch: the oracle."""
    inner, width = inner_type(y), y.shape[2] // parts
    normed = functional.layer_norm(y.to(inner).unflatten(-1, (parts, width)), (width,), eps=eps).flatten(-2)
    gated = torch.addcmul(bias.to(inner), normed, weight.to(inner)) * functional.silu(z.to(inner))
    return gated.to(y.dtype)


def reference_group_norm_relu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`group_norm_relu` in plain PyTorch: the oracle."""
    inner = inner_type(x)
    normed = functional.group_norm(x.to(inner).movedim(-1, 1), groups, weight.to(inner), bias.to(inner), eps)
    return functional.relu(normed).movedim(1, -1).contiguous().to(x.dtype)


@cache
def _cpu() -> Any:
    from lightm.ops import norms_cpu

    return norms_cpu


def _fake_group(x: Tensor, groups: int, *_: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *(x.new_empty((x.shape[0], groups), dtype=torch.float32) for _ in range(2))


gated_norm_op = differentiable(
    _GATED,
    "Tensor y, Tensor z, Tensor weight, Tensor bias, int parts, float eps",
    lambda: (_cpu().gated_norm_forward, _cpu().gated_norm_backward),
)
# also gives the groups' (mean, 1 / standard deviation), float32, (Bt, G), which its backward pass needs
group_norm_op = differentiable(
    _GROUP,
    "Tensor x, int groups, Tensor weight, Tensor bias, float eps",
    lambda: (_cpu().group_norm_forward, _cpu().group_norm_backward),
    _fake_group,
    outputs=3,
)
