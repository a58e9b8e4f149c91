"""The SSD scan of Mamba-2: the public function, its checks and the choice of an implementation."""

from __future__ import annotations

import logging
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional

from lightm.ops.checks import CPU_TYPES, check_kinds, check_shape, wants_grad
from lightm.ops.ssd.chunked import chunked_ssd
from lightm.ops.ssd.operator import CHUNK, ssd_op
from lightm.ops.ssd.reference import reference_ssd

__all__ = ["reference_ssd", "ssd_scan"]

_NAME = "ssd_scan"
_IMPLEMENTATIONS = ("auto", "reference", "chunked", "cpu")
_MOST_STATES = 16  # states that the kernel keeps in registers
_log = logging.getLogger("lightm.ops")
_said: set[str] = set()


@overload
def ssd_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    d_skip: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_state: Literal[False] = False,
    impl: str = "auto",
) -> Tensor: ...


@overload
def ssd_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    d_skip: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    *,
    return_state: Literal[True],
    impl: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def ssd_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    d_skip: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the state-space recurrence of Mamba-2, which has one decay for all channels and states of a head.

    For every batch entry, head j and channel p of the head, over tokens t in order (Mamba-2, arXiv 2405.21060,
    section 2, with the input matrix discretised as dt * B):

        dt     = softplus(delta[t,j] + delta_bias[j])            (softplus only if `delta_softplus`)
        h[p,n] = exp(dt * A[j]) * h[p,n] + dt * u[t,j,p] * B[t,n]
        y[t,j,p] = (sum_n h[p,n] * C[t,n] + d_skip[j] * u[t,j,p]) * silu(z[t,j,p])

    It equals `selective_scan` on E = H * P channels with A[e,n] = A[j], delta repeated over the P channels of a head.

    Args:
        u, z: (Bt, L, H, P), any strides. delta: (Bt, L, H).
        A, d_skip, delta_bias: (H,); A is negative in use.
        B, C: (Bt, L, N), or (Bt, L, G, N): group g serves heads g*H/G .. (g+1)*H/G - 1.
        initial_state: (Bt, H, P, N), the states before the first token; zeros if None.
        return_state: also return the states after the last token, so that a sequence can be cut into parts.
        impl: "cpu" (Numba kernels; float32, bfloat16, float16), "chunked" (matrix products over chunks of
            tokens in plain PyTorch, any device, float64 too), "reference" (token by token in plain PyTorch), or "auto":
            "cpu" where possible, else "chunked"; what was chosen is logged once.

    Returns:
        y (Bt, L, H, P) in u's dtype; with `return_state`, (y, state) with the state (Bt, H, P, N) in float32 (float64
        for float64 input). Arithmetic is float32 (float64) inside whatever the inputs' types, which may be mixed.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an `impl` that cannot take these tensors.
        TypeError: something that is not a tensor.

    Cost, E = H * P. "cpu": L E / 16 exponentials (one a token and vector of channels, at least L H) and 3 L E N
    multiply-adds forward, about four times that backward; P is padded to a multiple of 16 (8 without AVX-512).
    "chunked", with chunks of Q = 32 tokens: L H Q exponentials and about L Q (E + G N) + 2 L E N multiply-adds.
    Memory beyond the inputs and y: for "cpu" L E N / 64 floats of kept states when a gradient is wanted, otherwise
    a constant; for "chunked" the temporaries of 4096 tokens, and E N floats for each 4096 tokens with a gradient.
    """
    check_kinds(
        _NAME,
        {"u": u, "delta": delta, "A": A, "B": B, "C": C, "d_skip": d_skip, "z": z, "delta_bias": delta_bias,
         "initial_state": initial_state},
    )  # fmt: skip
    _check_shapes(u, delta, A, B, C, d_skip, z, delta_bias, initial_state)
    if B.dim() == 3:
        B, C = B.unsqueeze(2), C.unsqueeze(2)
    chosen = _choose(impl, u)
    if chosen == "reference":
        y, state = reference_ssd(u, delta, A, B, C, d_skip, z, delta_bias, delta_softplus, initial_state)
    elif chosen == "chunked":
        y, state = chunked_ssd(u, delta, A, B, C, d_skip, z, delta_bias, delta_softplus, initial_state)
    elif B.shape[3] > _MOST_STATES:
        y, state = _by_state_blocks(u, delta, A, B, C, d_skip, z, delta_bias, delta_softplus, initial_state)
    else:
        flat_z = None if z is None else z.flatten(2)
        start = None if initial_state is None else initial_state.flatten(1, 2)
        chunk = CHUNK if wants_grad(u, delta, A, B, C, d_skip, z, delta_bias, initial_state) else 0
        y, state, _ = ssd_op(u.flatten(2), delta, A, B, C, d_skip, flat_z, delta_bias, delta_softplus, start, chunk)
        y, state = (x.unflatten(axis, u.shape[2:]) for x, axis in ((y, 2), (state, 1)))
    return (y, state) if return_state else y


def _by_state_blocks(
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
) -> tuple[Tensor, Tensor]:
    """States do not meet before the sum over n: more of them than the kernel holds are scanned in blocks."""
    x, total, states = u.float(), torch.zeros(u.shape), []
    for start in range(0, B.shape[3], _MOST_STATES):
        block = slice(start, start + _MOST_STATES)
        begin = None if initial_state is None else initial_state[..., block]
        y, state = ssd_scan(
            x,
            delta,
            A,
            B[..., block],
            C[..., block],
            delta_bias=delta_bias,
            delta_softplus=delta_softplus,
            initial_state=begin,
            return_state=True,
            impl="cpu",
        )
        total = total + y
        states.append(state)
    if d_skip is not None:
        total = total + d_skip.float().unsqueeze(-1) * x
    if z is not None:
        total = total * functional.silu(z.float())
    return total.to(u.dtype), torch.cat(states, dim=-1)


def _choose(impl: str, lead: Tensor) -> str:
    """Resolve `impl`; the choice of "auto" is logged once. ValueError when an explicit one cannot be honoured."""
    if impl not in _IMPLEMENTATIONS:
        raise ValueError(f"{_NAME}: impl is {impl!r}, expected one of {', '.join(map(repr, _IMPLEMENTATIONS))}")
    reason = None
    if lead.device.type not in ("cpu", "meta"):
        reason = f"the tensors are on {lead.device}; move them with .cpu()"
    elif lead.dtype not in CPU_TYPES:
        reason = f"the tensors are {lead.dtype}; use float32, bfloat16 or float16"
    if impl == "cpu" and reason is not None:
        raise ValueError(f"{_NAME}: impl='cpu' is not possible: {reason}; or use impl='chunked' or 'auto'")
    if impl != "auto":
        return impl
    chosen = "cpu" if reason is None else "chunked"
    if not torch.compiler.is_compiling() and chosen not in _said:
        _said.add(chosen)
        _log.info("%s: using the %s implementation%s", _NAME, chosen, f" ({reason})" if reason else "")
    return chosen


def _check_shapes(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    d_skip: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    if u.dim() != 4 or 0 in u.shape[2:]:
        raise ValueError(
            f"{_NAME}: u has shape {tuple(u.shape)}, expected (Bt, L, H, P), H heads of P channels; split the channels "
            "into heads, e.g. u.unflatten(-1, (-1, 16))"
        )
    batch, length, heads, width = u.shape
    if B.dim() not in (3, 4) or tuple(B.shape[:2]) != (batch, length) or B.shape[-1] < 1:
        raise ValueError(
            f"{_NAME}: B has shape {tuple(B.shape)}, expected ({batch}, {length}, N) = (Bt, L, N) or "
            f"({batch}, {length}, G, N) = (Bt, L, G, N) with N >= 1"
        )
    if B.dim() == 4 and (B.shape[2] < 1 or heads % B.shape[2]):
        raise ValueError(
            f"{_NAME}: B has G = {B.shape[2]} groups, which do not divide the H = {heads} heads of u into equal parts"
        )
    check_shape(_NAME, "C", C, B.shape, "the shape of B")
    check_shape(_NAME, "delta", delta, u.shape[:3], "(Bt, L, H), one step a head")
    if z is not None:
        check_shape(_NAME, "z", z, u.shape, "(Bt, L, H, P), the shape of u")
    for name, vector in (("A", A), ("d_skip", d_skip), ("delta_bias", delta_bias)):
        if vector is not None:
            check_shape(_NAME, name, vector, (heads,), "(H,), H from u's third axis")
    if initial_state is not None:
        check_shape(_NAME, "initial_state", initial_state, (batch, heads, width, B.shape[-1]), "(Bt, H, P, N)")
