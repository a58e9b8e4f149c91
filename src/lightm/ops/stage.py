"""The decoder's stages and the head, slab by slab: with few tensors of the stage's size, or none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightm.ops.checks import check_shape
from lightm.ops.norms import GroupNormParameters


def stage_runs_fused(*tensors: Tensor) -> bool:
    """Whether these tensors can go through `decoder_stage` and `decoder_head`: float32 on the CPU, not traced."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    return all(
        isinstance(x, Tensor) and type(x).__name__ in ("Tensor", "Parameter") and x.device.type == "cpu"
        and x.dtype == torch.float32 and x.numel() > 0
        for x in tensors
    )  # fmt: skip


def decoder_stage(
    low: Tensor,
    skip: Tensor,
    norm1: GroupNormParameters,
    depthwise: Tensor,
    pointwise: Tensor,
    scale: Tensor,
    norm2: GroupNormParameters,
    *,
    overwrite_skip: bool = False,
) -> Tensor:
    """x = upsample(low) + skip; relu(norm2(pointwise(depthwise(relu(norm1(x)))) + scale * x)).

    Source: the decoder of LightM-UNet, arXiv 2403.05246, section 2.4.

    Arguments: low (B, *S, C), skip (B, *2S, C), depthwise (3, .., C), pointwise (C, C), scale (C) or (1), all
    float32 on the CPU. With `overwrite_skip`, without gradients only, the memory of a contiguous `skip` is used for
    x: its content is lost.
    Raises ValueError for other shapes, types or devices, and for groups that do not divide C.
    Returns (B, *2S, C). Memory: the result, x unless it takes the skip's place, and some planes a thread. For the
    backward pass only low and skip are kept; it computes the rest again and needs about five tensors of skip's size.
    """
    tensors = (low, skip, norm1.weight, norm1.bias, depthwise, pointwise, scale, norm2.weight, norm2.bias)
    _check_image("decoder_stage", "low", low)
    sizes, channels = low.shape[1:-1], low.shape[-1]
    doubled = (low.shape[0], *(2 * size for size in sizes), channels)
    check_shape("decoder_stage", "skip", skip, doubled, "(B, *2S, C) for low (B, *S, C)")
    _check_weights(
        "decoder_stage",
        channels,
        {"norm1": norm1, "norm2": norm2},
        depthwise=(depthwise, ((3,) * len(sizes) + (channels,))),
        pointwise=(pointwise, (channels, channels)),
        scale=(scale, (1,) if scale.numel() == 1 else (channels,)),
        skip=(skip, doubled),
    )
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        result: Tensor = _Stage.apply(norm1, norm2, *tensors)
        return result
    from lightm.ops.stage_cpu import run_stage

    with torch.no_grad():
        return run_stage(low, skip, norm1, depthwise, pointwise, scale, norm2, overwrite_skip)


def _check_image(operator: str, name: str, x: Tensor) -> None:
    if x.dim() not in (4, 5) or x.numel() == 0:
        raise ValueError(
            f"{operator}: {name} has shape {tuple(x.shape)}, expected (B, Y, X, C) or (B, Z, Y, X, C), none of them 0"
        )
    _check_kind(operator, name, x)


def _check_kind(operator: str, name: str, x: Tensor) -> None:
    """The kernels read memory as it lies: anything else than they expect must not reach them."""
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise ValueError(f"{operator}: {name} is {x.dtype} on {x.device}, expected float32 on the CPU")


def _check_weights(
    operator: str, channels: int, norms: dict[str, GroupNormParameters], **given: tuple[Tensor, tuple[int, ...]]
) -> None:
    for name, norm in norms.items():
        if norm.groups < 1 or channels % norm.groups:
            raise ValueError(f"{operator}: {name}'s groups={norm.groups} do not divide the {channels} channels")
        given |= {f"{name}.weight": (norm.weight, (channels,)), f"{name}.bias": (norm.bias, (channels,))}
    for name, (tensor, shape) in given.items():
        check_shape(operator, name, tensor, shape, f"C = {channels} of the image")
        _check_kind(operator, name, tensor)


class _Stage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, norm1: GroupNormParameters, norm2: GroupNormParameters, *tensors: Tensor) -> Tensor:
        from lightm.ops.stage_cpu import run_stage

        low, skip, _, _, depthwise, pointwise, scale, _, _ = tensors
        ctx.norms = (norm1.groups, norm1.eps, norm2.groups, norm2.eps)
        ctx.save_for_backward(*tensors)
        return run_stage(low, skip, norm1, depthwise, pointwise, scale, norm2, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from lightm.ops.stage_cpu import run_stage_backward

        return None, None, *run_stage_backward(grad, *ctx.saved_tensors, *ctx.norms)


def decoder_head(
    x: Tensor, norm: GroupNormParameters, scale: Tensor, offset: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """(relu(norm(x)) * scale + offset) @ weight.T + bias: the head's norm, ReLU and separable convolution of 1.

    Arguments: x (B, *S, C), scale and offset (C), weight (classes, C), bias (classes), all float32 on the CPU.
    Returns (B, *S, classes); without gradients nothing but the result is ever whole. For the backward pass only x is
    kept; it needs about three tensors of x's size.
    Raises ValueError for other shapes, types or devices, and for groups that do not divide C.
    """
    _check_image("decoder_head", "x", x)
    channels = x.shape[-1]
    _check_weights(
        "decoder_head",
        channels,
        {"norm": norm},
        scale=(scale, (channels,)),
        offset=(offset, (channels,)),
        weight=(weight, (*weight.shape[:1], channels)),
        bias=(bias, tuple(weight.shape[:1])),
    )
    tensors = (x, norm.weight, norm.bias, scale, offset, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        result: Tensor = _Head.apply(norm.groups, norm.eps, *tensors)
        return result
    from lightm.ops.stage_cpu import run_head

    with torch.no_grad():
        return run_head(x, norm, scale, offset, weight, bias)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, groups: int, eps: float, *tensors: Tensor) -> Tensor:
        from lightm.ops.stage_cpu import run_head

        x, norm_weight, norm_bias, scale, offset, weight, bias = tensors
        ctx.groups, ctx.eps = groups, eps
        ctx.save_for_backward(x, norm_weight, norm_bias, scale, offset, weight)
        return run_head(x, GroupNormParameters(norm_weight, norm_bias, groups, eps), scale, offset, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from lightm.ops.stage_cpu import run_head_backward

        x, norm_weight, norm_bias, scale, offset, weight = ctx.saved_tensors
        given = (grad, x, norm_weight, norm_bias, scale, offset, weight, ctx.groups, ctx.eps)
        return None, None, *run_head_backward(*given)
