"""The CPU scan as one PyTorch operator `lightm::selective_scan`: what compile, export and autograd see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Optional

import torch
from torch import Tensor

from lightm.ops.register import operator

CHUNK = 64
"""Tokens between kept states: the backward pass recomputes the states of one such chunk at a time."""


def _layout(u: Tensor, A: Tensor, B: Tensor) -> Any:
    from lightm.ops.scan.layout import Layout

    layout = Layout(u.shape[0], u.shape[1], u.shape[2], B.shape[2], A.shape[1])
    return replace(layout, paired=layout.can_pair)


@operator("lightm::selective_scan")
def scan_op(
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
    """(y, last state, kept states); checked arguments as in `selective_scan`, B and C (Bt, L, G, N)."""
    from lightm.ops.scan.cpu import run_forward

    layout = _layout(u, A, B)
    return run_forward(layout, u, delta, A, B, C, d_skip, z, delta_bias, delta_softplus, initial_state, chunk)


@scan_op.register_fake
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

    layout = _layout(u, A, B)
    number = -(-u.shape[1] // chunk) if chunk else 0
    state = u.new_empty((u.shape[0], u.shape[2], A.shape[1]), dtype=torch.float32)
    saved = (u.shape[0], layout.tiles, number, layout.kernel_states, LANES)
    return u.new_empty(u.shape), state, u.new_empty(saved, dtype=torch.float32)


@operator("lightm::selective_scan_backward")
def scan_backward_op(
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
    from lightm.ops.scan.cpu import run_backward

    layout = _layout(u, A, B)
    return run_backward(
        layout, grad_y, grad_state, u, delta, A, B, C, d_skip, z, delta_bias, delta_softplus, saved, chunk
    )


@scan_backward_op.register_fake
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
        raise RuntimeError("lightm::selective_scan was called with chunk=0, which keeps nothing for a backward pass")
    du, ddelta, dA, dB, dC, dskip, dz, dbias, dstate = scan_backward_op(
        grad_y, grad_state, *tensors, ctx.softplus, saved, ctx.chunk
    )
    present = [None if x is None else grad for x, grad in zip(tensors[5:], (dskip, dz, dbias), strict=True)]
    start = None if ctx.state_type is None else dstate.to(ctx.state_type)
    return du, ddelta, dA, dB, dC, *present, None, start, None


scan_op.register_autograd(_backward, setup_context=_keep)
