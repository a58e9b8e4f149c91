"""The decoder's stages and the head, slab by slab: with few tensors of the stage's size, or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class GroupNormParameters:
    """GroupNorm's tensors: weight and bias (C), groups, eps."""

    weight: Tensor
    bias: Tensor
    groups: int
    eps: float


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
    Returns (B, *2S, C). Memory: the result, x unless it takes the skip's place, and some planes a thread. For the
    backward pass only low and skip are kept; it computes the rest again and needs about seven tensors of skip's size.
    """
    tensors = (low, skip, norm1.weight, norm1.bias, depthwise, pointwise, scale, norm2.weight, norm2.bias)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        result: Tensor = _Stage.apply(norm1, norm2, *tensors)
        return result
    from lightm.ops.stage_cpu import run_stage

    with torch.no_grad():
        return run_stage(low, skip, norm1, depthwise, pointwise, scale, norm2, overwrite_skip)


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
    Returns (B, *S, classes). No gradient is recorded; nothing but the result is ever whole.
    """
    from lightm.ops.stage_cpu import run_head

    with torch.no_grad():
        return run_head(x, norm, scale, offset, weight, bias)
