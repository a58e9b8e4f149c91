"""The CPU form of the SSD scan as one PyTorch operator `lightm::ssd_scan`: what compile, export and autograd see."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from lightm.ops.register import operator

CHUNK = 64
"""Tokens between kept states: the backward pass recomputes the states of one such chunk at a time."""


@operator("lightm::ssd_scan")
def ssd_op(
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
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, last state, kept states); checked arguments, u, z, y (Bt, L, H * P), states (Bt, H * P, N)."""
    from lightm.ops.ssd.cpu import run_forward

    return run_forward(u, delta, A, B, C, d_skip, z, delta_bias, delta_softplus, initial_state, chunk)


@ssd_op.register_fake
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
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from lightm.ops.jit import LANES
    from lightm.ops.scan.layout import Layout

    layout = Layout(u.shape[0], u.shape[1], u.shape[2], A.shape[0], B.shape[3])
    number = -(-u.shape[1] // chunk) if chunk else 0
    state = u.new_empty((u.shape[0], u.shape[2], B.shape[3]), dtype=torch.float32)
    saved = (u.shape[0], layout.tiles, number, layout.kernel_states, LANES)
    return u.new_empty(u.shape), state, u.new_empty(saved, dtype=torch.float32)


@operator("lightm::ssd_scan_backward")
def ssd_backward_op(
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
    saved: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (u, delta, A, B, C, d_skip, z, delta_bias, initial_state); empty for absent ones."""
    from lightm.ops.ssd.cpu import run_backward

    return run_backward(grad_y, grad_state, u, delta, A, B, C, d_skip, z, delta_bias, delta_softplus, saved, chunk)


@ssd_backward_op.register_fake
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
    saved: Tensor,
    chunk: int,
) -> tuple[Tensor, ...]:
    def like(x: Tensor | None) -> Tensor:
        return u.new_empty(0, dtype=torch.float32) if x is None else x.new_empty(x.shape)

    return (*map(like, (u, delta, A, B, C, d_skip, z, delta_bias)), torch.empty_like(grad_state))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, initial_state, chunk = inputs
    ctx.softplus = tensors.pop()
    ctx.chunk = chunk
    ctx.state_type = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(*tensors, output[2])


def _backward(ctx: Any, grad_y: Tensor, grad_state: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, saved = ctx.saved_tensors
    if not ctx.chunk:
        raise RuntimeError("lightm::ssd_scan was called with chunk=0, which keeps nothing for a backward pass")
    du, ddelta, dA, dB, dC, dskip, dz, dbias, dstate = ssd_backward_op(
        grad_y, grad_state, *tensors, ctx.softplus, saved, ctx.chunk
    )
    present = [None if x is None else grad for x, grad in zip(tensors[5:], (dskip, dz, dbias), strict=True)]
    start = None if ctx.state_type is None else dstate.to(ctx.state_type)
    return du, ddelta, dA, dB, dC, *present, None, start, None


ssd_op.register_autograd(_backward, setup_context=_keep)
