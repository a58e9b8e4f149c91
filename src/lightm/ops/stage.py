"""The decoder's stages and the head, slab by slab: with few tensors of the stage's size, or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightm.ops.checks import check_shape, note_use, wants_grad
from lightm.ops.norms import GroupNormParameters
from lightm.ops.threads import doubled


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
    Returns (B, *2S, C). Memory: the result, x unless it takes the skip's place, and some planes per thread. For the
    backward pass only low and skip are kept; it computes the rest again and needs about five tensors of skip's size.
    """
    tensors = (low, skip, norm1.weight, norm1.bias, depthwise, pointwise, scale, norm2.weight, norm2.bias)
    _check_image("decoder_stage", "low", low)
    channels, kernel = low.shape[-1], (3,) * (low.dim() - 2)
    check_shape("decoder_stage", "skip", skip, doubled(low), "(B, *2S, C) for low (B, *S, C)")
    _check_weights(
        "decoder_stage",
        channels,
        {"norm1": norm1, "norm2": norm2},
        depthwise=(depthwise, (*kernel, channels)),
        pointwise=(pointwise, (channels, channels)),
        scale=(scale, (1,) if scale.numel() == 1 else (channels,)),
        skip=(skip, doubled(low)),
    )
    from lightm.ops.stage_cpu import run_stage, run_stage_backward

    note_use("decoder_stage", "cpu, fused")
    settings = (norm1.groups, norm1.eps, norm2.groups, norm2.eps)
    if wants_grad(*tensors):
        result: Tensor = _Recomputed.apply(run_stage, run_stage_backward, settings, *tensors)
        return result
    with torch.no_grad():
        return run_stage(tensors, *settings, overwrite_skip)


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


class _Recomputed(torch.autograd.Function):
    """run(tensors, *settings), whose backward pass `back` starts from the tensors."""

    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., Tensor], back: Callable[..., Any], settings: tuple[Any, ...], *tensors: Tensor
    ) -> Tensor:
        ctx.back, ctx.settings = back, settings
        ctx.save_for_backward(*tensors)
        return run(tensors, *settings)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *ctx.back(grad, ctx.saved_tensors, *ctx.settings)


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
    from lightm.ops.stage_cpu import run_head, run_head_backward

    note_use("decoder_head", "cpu, fused")
    if wants_grad(*tensors):
        result: Tensor = _Recomputed.apply(run_head, run_head_backward, (norm.groups, norm.eps), *tensors)
        return result
    with torch.no_grad():
        return run_head(tensors, norm.groups, norm.eps)
