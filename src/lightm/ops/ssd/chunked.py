"""The SSD scan as matmuls over chunks of tokens (Mamba-2, arXiv 2405.21060, section 6), on any device.

The equations are in ops/README.md. Every exponent is a sum of a over a range of tokens, never positive when A is not:
nothing overflows. The sums are kept in float64, because the difference of two large running sums would lose a small one
between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lightm.ops.checks import inner_type, wants_grad
from lightm.ops.scan.inputs import ScanInputs

CHUNK = 32
"""Q, tokens of a chunk: work inside chunks grows with Q, the number of chunk states with 1 / Q. Tuned on a CPU."""
SEGMENT = 4096
"""Tokens whose temporaries are alive at a time; a multiple of CHUNK."""

Optionals = Sequence[Any]
"""Tensors, some of them None."""


def _decays(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(sums[t] - sums[s]) for s <= t, 0 above: (..., T) -> (..., T, T)."""
    size = sums.shape[-1]
    gaps = sums.unsqueeze(-1) - sums.unsqueeze(-2)
    future = torch.ones((size, size), dtype=torch.bool, device=sums.device).triu(1)
    # masked before the exponential: above the diagonal the exponents are positive and could overflow
    return gaps.masked_fill_(future, float("-inf")).to(dtype).exp_()


def _segment(state: Tensor, softplus: bool, tensors: Optionals) -> tuple[Tensor, Tensor]:
    """(y, state after) of some tokens; `state` and the arithmetic are float32 or float64, y has u's type."""
    u, delta, A, B, C, d_skip, z, delta_bias = tensors
    inner = state.dtype
    _, length, heads, width = u.shape
    groups, states = B.shape[2:]
    of_group = heads // groups
    size = min(CHUNK, length)
    number = -(-length // size)
    dt = delta.to(inner)
    if delta_bias is not None:
        dt = dt + delta_bias.to(inner)
    if softplus:
        dt = functional.softplus(dt)
    x = u.to(inner)

    def chunks(part: Tensor) -> Tensor:
        """(Bt, L, G, ...) -> (Bt, chunks, G, Q, ...), padded with tokens of dt = 0, which change nothing."""
        part = functional.pad(part, (0, 0) * (part.dim() - 2) + (0, number * size - length))
        return part.unflatten(1, (number, size)).transpose(2, 3)

    a = chunks(dt * A.to(inner)).double().unflatten(2, (groups, of_group))  # (Bt, chunks, G, H/G, Q)
    sums = a.cumsum(-1)
    inflow = chunks(dt.unsqueeze(-1) * x).unflatten(2, (groups, of_group))  # (Bt, chunks, G, H/G, Q, P)
    b, c = (chunks(part.to(inner)).unsqueeze(3) for part in (B, C))  # (Bt, chunks, G, 1, Q, N)
    y = (c @ b.mT * _decays(sums, inner)) @ inflow
    # states that each chunk adds, carried from chunk to chunk; chunk 0 of the sum is what came before
    to_end = (sums[..., -1:] - sums).to(inner).exp()
    added = (inflow * to_end.unsqueeze(-1)).mT @ b  # (Bt, chunks, G, H/G, P, N)
    before = state.unflatten(1, (groups, of_group)).unsqueeze(1)
    ends = functional.pad(sums[..., -1].movedim(1, -1), (1, 0)).cumsum(-1)  # (Bt, G, H/G, chunks + 1)
    flat = torch.cat((before, added), dim=1).movedim(1, 3).flatten(-2)  # (Bt, G, H/G, chunks + 1, P N)
    carried = (_decays(ends, inner) @ flat).unflatten(-1, (width, states))
    entering = carried[..., :-1, :, :].movedim(3, 1)
    y = y + (c @ entering.mT) * sums.to(inner).exp().unsqueeze(-1)
    y = y.flatten(2, 3).transpose(2, 3).flatten(1, 2)[:, :length]  # (Bt, L, H, P)
    if d_skip is not None:
        y = y + d_skip.to(inner).unsqueeze(-1) * x
    if z is not None:
        y = y * functional.silu(z.to(inner))
    return y.to(u.dtype), carried[..., -1, :, :].flatten(1, 2)


def _part(tensors: Optionals, start: int) -> Optionals:
    """Tokens of one segment of (u, delta, A, B, C, d_skip, z, delta_bias)."""
    by_token = (True, True, False, True, True, False, True, False)
    cut = slice(start, start + SEGMENT)
    return tuple(x[:, cut] if x is not None and split else x for x, split in zip(tensors, by_token, strict=True))


class _Chunked(torch.autograd.Function):
    """Keeps the inputs and one state per segment; the backward pass recomputes them in reverse order."""

    @staticmethod
    def forward(ctx: Any, softplus: bool, state: Tensor, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        y, last, entered = chunked_forward(tensors, state, softplus, keep=True)
        ctx.softplus, ctx.given = softplus, len(tensors)
        ctx.save_for_backward(*tensors, *entered)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> Optionals:
        tensors, entered = ctx.saved_tensors[: ctx.given], ctx.saved_tensors[ctx.given :]
        wanted = ctx.needs_input_grad[2:]
        grads = [torch.zeros_like(x) if need else None for x, need in zip(tensors, wanted, strict=True)]
        for index in reversed(range(len(entered))):
            start = index * SEGMENT
            parts = zip(_part(tensors, start), wanted, strict=True)
            leaves = [None if x is None else x.detach().requires_grad_(need) for x, need in parts]
            entering = entered[index].detach().requires_grad_()
            with torch.enable_grad():
                y, state = _segment(entering, ctx.softplus, leaves)
            asked = [leaf for leaf, need in zip(leaves, wanted, strict=True) if need]
            given = (grad_y[:, start : start + SEGMENT], grad_state)
            grad_state, *found = torch.autograd.grad((y, state), [entering, *asked], given)
            for target, grad in zip((x for x in _part(grads, start) if x is not None), found, strict=True):
                target += grad
        return None, grad_state if ctx.needs_input_grad[1] else None, *grads


def chunked_forward(
    tensors: Optionals, state: Tensor, softplus: bool, keep: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(y, last state, with `keep` the states before every segment) of (u, delta, A, B, C, d_skip, z, delta_bias)."""
    u = tensors[0]
    y, entered = torch.empty(u.shape, dtype=u.dtype, device=u.device), []
    for start in range(0, u.shape[1], SEGMENT):
        if keep:
            entered.append(state)
        y[:, start : start + SEGMENT], state = _segment(state, softplus, _part(tensors, start))
    return y, state, entered


def chunked_ssd(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Return (y, last state)."""
    u, delta, A, B, C, d_skip, z, delta_bias, delta_softplus, initial_state = inputs
    inner = inner_type(u)
    shape = (u.shape[0], u.shape[2], u.shape[3], B.shape[3])
    state = u.new_zeros(shape, dtype=inner) if initial_state is None else initial_state.to(inner)
    # parameters in the inner type: their gradients are summed over the segments
    A, d_skip, delta_bias = (None if x is None else x.to(inner) for x in (A, d_skip, delta_bias))  # type: ignore[assignment]
    tensors = (u, delta, A, B, C, d_skip, z, delta_bias)
    if wants_grad(*tensors, state):
        y, state = _Chunked.apply(delta_softplus, state, *tensors)
        return y, state
    return chunked_forward(tensors, state, delta_softplus, keep=False)[:2]
