"""The selective scan of Mamba: the public function, its checks and the choice of an implementation."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional

from lightm.ops.checks import check_kinds, check_shape, choose, wants_grad
from lightm.ops.scan.gpu import triton_limits
from lightm.ops.scan.operator import CHUNK, scan_op
from lightm.ops.scan.reference import reference_scan
from lightm.ops.scan.triton_operator import triton_scan_op

__all__ = ["reference_scan", "selective_scan"]

_NAME = "selective_scan"
_MOST_STATES = 16  # states that one pass of the kernel keeps in registers


@overload
def selective_scan(
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
def selective_scan(
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
    return_state: bool,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...


def selective_scan(
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
    """Run the selective state-space recurrence along the tokens.

    For every batch entry and channel e, over tokens t in order (Mamba, arXiv 2312.00752, algorithm 2, with the
    input matrix discretised as dt * B):

        dt   = softplus(delta[t,e] + delta_bias[e])            (softplus only if `delta_softplus`)
        h[n] = exp(dt * A[e,n]) * h[n] + dt * B[t,n] * u[t,e]
        y[t,e] = (sum_n h[n] * C[t,n] + d_skip[e] * u[t,e]) * silu(z[t,e])

    Args:
        u, delta, z: (Bt, L, E), any strides.
        A: (E, N). d_skip, delta_bias: (E,).
        B, C: (Bt, L, N), or (Bt, L, G, N): group g serves channels g*E/G .. (g+1)*E/G - 1.
        initial_state: (Bt, E, N), the states before the first token; zeros if None.
        return_state: also return the states after the last token, so that a sequence can be cut into parts.
        impl: "cpu" (Numba kernels; float32, bfloat16, float16), "triton" (kernels for a GPU, the same types; needs
            Triton; not timed on hardware yet), "reference" (plain PyTorch, any device, float64 too), or "auto": "cpu"
            or, on a GPU, "triton" where possible, else "reference"; what was chosen is logged once.

    Returns:
        y (Bt, L, E) in u's dtype; with `return_state`, (y, state) with the state (Bt, E, N) in float32 (float64 for
        float64 input). Arithmetic is float32 (float64) inside whatever the inputs' types, which may be mixed.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an `impl` that cannot take these tensors.
        TypeError: something that is not a tensor.

    Cost of "cpu": L E N exponentials and about 3 L E N multiply-adds forward, about 2.3 times that backward; memory
    beyond the inputs and y: L E N / 64 floats of kept states when a gradient is wanted, otherwise a constant. Cost of
    "triton": twice L E N exponentials forward and four times backward; L E N / 32 to L E N / 256 floats of states.

    >>> import torch
    >>> u, delta, A = torch.ones(1, 3, 1), torch.ones(1, 3, 1), torch.zeros(1, 1)
    >>> B = C = torch.ones(1, 3, 1)
    >>> lightm.selective_scan(u, delta, A, B, C, impl="reference").flatten()  # a running sum, as nothing decays
    tensor([1., 2., 3.])
    """
    check_kinds(
        _NAME,
        {"u": u, "delta": delta, "A": A, "B": B, "C": C, "d_skip": d_skip, "z": z, "delta_bias": delta_bias,
         "initial_state": initial_state},
    )  # fmt: skip
    _check_shapes(u, delta, A, B, C, d_skip, z, delta_bias, initial_state)
    if B.dim() == 3:
        B, C = B.unsqueeze(2), C.unsqueeze(2)
    chosen = choose(_NAME, impl, u, triton_limits=triton_limits)
    if chosen == "reference":
        y, state = reference_scan(u, delta, A, B, C, d_skip, z, delta_bias, delta_softplus, initial_state)
    elif chosen == "triton":
        y, state, _ = triton_scan_op(u, delta, A, B, C, d_skip, z, delta_bias, delta_softplus, initial_state)
    elif A.shape[1] > _MOST_STATES:
        y, state = _by_state_blocks(u, delta, A, B, C, d_skip, z, delta_bias, delta_softplus, initial_state)
    else:
        chunk = CHUNK if wants_grad(u, delta, A, B, C, d_skip, z, delta_bias, initial_state) else 0
        y, state, _ = scan_op(u, delta, A, B, C, d_skip, z, delta_bias, delta_softplus, initial_state, chunk)
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
    total, states = torch.zeros(u.shape), []
    for start in range(0, A.shape[1], _MOST_STATES):
        block = slice(start, start + _MOST_STATES)
        begin = None if initial_state is None else initial_state[..., block]
        y, state = selective_scan(
            u.float(),
            delta,
            A[:, block],
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
        total = total + d_skip.float() * u.float()
    if z is not None:
        total = total * functional.silu(z.float())
    return total.to(u.dtype), torch.cat(states, dim=-1)


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
    if u.dim() != 3:
        raise ValueError(
            f"{_NAME}: u has shape {tuple(u.shape)}, expected (Bt, L, E); flatten the spatial axes to tokens with "
            "the channels last, e.g. x.flatten(1, -2)"
        )
    batch, length, channels = u.shape
    if A.dim() != 2 or A.shape[0] != channels or A.shape[1] < 1:
        raise ValueError(
            f"{_NAME}: A has shape {tuple(A.shape)}, expected ({channels}, N) = (E, N) with N >= 1, "
            "E from u's last axis"
        )
    states = A.shape[1]
    if B.dim() not in (3, 4) or tuple(B.shape[:2]) != (batch, length) or B.shape[-1] != states:
        raise ValueError(
            f"{_NAME}: B has shape {tuple(B.shape)}, expected ({batch}, {length}, {states}) = (Bt, L, N) or "
            f"({batch}, {length}, G, {states}) = (Bt, L, G, N)"
        )
    if B.dim() == 4 and (B.shape[2] < 1 or channels % B.shape[2]):
        raise ValueError(
            f"{_NAME}: B has G = {B.shape[2]} groups, which do not divide the E = {channels} channels of u into equal "
            "parts"
        )
    check_shape(_NAME, "C", C, B.shape, "the shape of B")
    check_shape(_NAME, "delta", delta, u.shape, "(Bt, L, E), the shape of u")
    if z is not None:
        check_shape(_NAME, "z", z, u.shape, "(Bt, L, E), the shape of u")
    for name, vector in (("d_skip", d_skip), ("delta_bias", delta_bias)):
        if vector is not None:
            check_shape(_NAME, name, vector, (channels,), "(E,), E from u's last axis")
    if initial_state is not None:
        expected = (batch, channels, states)
        check_shape(_NAME, "initial_state", initial_state, expected, "(Bt, E, N)")
