"""The Triton scan as one PyTorch operator `lightm::selective_scan_triton`: what compile, export and autograd see."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from lightm.ops.scan.gpu import plan_for, run_backward, run_forward


# "cpu" is for Triton's interpreter alone: `triton_limits` lets no other tensor of a CPU come here
@torch.library.custom_op("lightm::selective_scan_triton", mutates_args=(), device_types=("cuda", "cpu"))
def triton_scan_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    d_skip: Optional[Tensor],  # noqa: UP045  (the schema is read from these annotations)
    z: Optional[Tensor],  # noqa: UP045
    delta_bias: Optional[Tensor],  # noqa: UP045
    delta_softplus: bool,
    initial_state: Optional[Tensor],  # noqa: UP045
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, last state, kept states); checked arguments as in `selective_scan`, B and C (Bt, L, G, N)."""
    plan = plan_for(u, A, B)
    return run_forward(plan, u, delta, A, B, C, d_skip, z, delta_bias, delta_softplus, initial_state)


@triton_scan_op.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    d_skip: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, channels = u.shape
    states = A.shape[1]
    last = u.new_empty((batch, channels, states), dtype=torch.float32)
    chunks = plan_for(u, A, B).chunks
    return u.new_empty(u.shape), last, u.new_empty((batch, chunks, states, channels), dtype=torch.float32)


@torch.library.custom_op("lightm::selective_scan_triton_backward", mutates_args=(), device_types=("cuda", "cpu"))
def triton_scan_backward_op(
    grad_y: Tensor,
    grad_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    d_skip: Optional[Tensor],  # noqa: UP045
    z: Optional[Tensor],  # noqa: UP045
    delta_bias: Optional[Tensor],  # noqa: UP045
    delta_softplus: bool,
    starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (u, delta, A, B, C, d_skip, z, delta_bias, initial_state); empty for absent ones."""
    plan = plan_for(u, A, B)
    return run_backward(plan, grad_y, grad_state, u, delta, A, B, C, d_skip, z, delta_bias, delta_softplus, starts)


@triton_scan_backward_op.register_fake
def _(
    grad_y: Tensor,
    grad_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    d_skip: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    starts: Tensor,
) -> tuple[Tensor, ...]:
    def like(x: Tensor | None) -> Tensor:
        return u.new_empty(0, dtype=torch.float32) if x is None else x.new_empty(x.shape)

    return (*map(like, (u, delta, A, B, C, d_skip, z, delta_bias)), torch.empty_like(grad_state))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, softplus, initial_state = inputs
    ctx.softplus = softplus
    ctx.state_type = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(*tensors, output[2])


def _backward(ctx: Any, grad_y: Tensor, grad_state: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, starts = ctx.saved_tensors
    du, ddelta, dA, dB, dC, dskip, dz, dbias, dbegin = triton_scan_backward_op(
        grad_y, grad_state, *tensors, ctx.softplus, starts
    )
    present = [None if x is None else grad for x, grad in zip(tensors[5:], (dskip, dz, dbias), strict=True)]
    begin = None if ctx.state_type is None else dbegin.to(ctx.state_type)
    return du, ddelta, dA, dB, dC, *present, None, begin


triton_scan_op.register_autograd(_backward, setup_context=_keep)
