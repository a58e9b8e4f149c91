"""The SSD scan of Mamba-2: the public functions, the choice of an implementation, the oracle, the operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightm.ops.checks import check_kinds, choose, inner_type, wants_grad
from lightm.ops.scan.inputs import CHUNK, ScanInputs, checked, declare_scan, in_state_blocks
from lightm.ops.ssd.chunked import chunked_ssd

__all__ = ["reference_ssd", "ssd_scan", "ssd_scan_with_state"]

_NAME = "ssd_scan"


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
    impl: str = "auto",
) -> Tensor:
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
        impl: "cpu" (Numba kernels; float32, bfloat16, float16), "chunked" (matmuls over chunks of
            tokens in plain PyTorch, any device, float64 too), "reference" (token by token in plain PyTorch), or "auto":
            "cpu" where possible, else "chunked"; what was chosen is logged once.

    Returns: y (Bt, L, H, P) in u's dtype; `ssd_scan_with_state` also returns the states after the last token.
    Arithmetic is float32 (float64 for float64 input) inside whatever the inputs' types, which may be mixed.
    Raises ValueError for shapes, dtypes or devices that do not fit and an `impl` that cannot take these tensors,
    TypeError for something that is not a tensor.

    Cost, E = H * P. "cpu": L E / 16 exponentials (one per token and vector of channels, at least L H) and 3 L E N
    multiply-adds forward, about four times that backward; P is padded to a multiple of 16 (8 without AVX-512).
    "chunked", with chunks of Q = 32 tokens: L H Q exponentials and about L Q (E + G N) + 2 L E N multiply-adds.
    Memory beyond the inputs and y: for "cpu" L E N / 64 floats of kept states when a gradient is wanted, otherwise
    a constant; for "chunked" the temporaries of 4096 tokens, and E N floats for each 4096 tokens with a gradient.
    """
    return ssd_scan_with_state(u, delta, A, B, C, d_skip, z, delta_bias, delta_softplus, initial_state, impl)[0]


def ssd_scan_with_state(
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
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`ssd_scan` that also returns the states after the last token, with which a next chunk of tokens can begin.

    Returns (y, state): the state is (Bt, H, P, N) in float32 (float64 for float64 input).
    """
    inputs = ScanInputs(u, delta, A, B, C, d_skip, z, delta_bias, delta_softplus, initial_state)
    check_kinds(_NAME, {name: x for name, x in inputs._asdict().items() if name != "delta_softplus"})
    if u.dim() != 4 or 0 in u.shape[2:]:
        raise ValueError(
            f"{_NAME}: u has shape {tuple(u.shape)}, expected (Bt, L, H, P), H heads of P channels; split the channels "
            "into heads, e.g. u.unflatten(-1, (-1, 16))"
        )
    inputs = checked(_NAME, inputs)
    chosen = choose(_NAME, impl, u, fallback="chunked")
    if chosen == "reference":
        return reference_ssd(inputs)
    return chunked_ssd(inputs) if chosen == "chunked" else in_state_blocks(_on_cpu, inputs)


def _on_cpu(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    u, z, start = inputs.u, inputs.z, inputs.initial_state
    flat = inputs._replace(
        u=u.flatten(2),
        z=None if z is None else z.flatten(2),
        initial_state=None if start is None else start.flatten(1, 2),
    )
    y, state, _ = ssd_op(*flat, CHUNK if wants_grad(*inputs) else 0)
    return y.unflatten(2, u.shape[2:]), state.unflatten(1, u.shape[2:])


def reference_ssd(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """The scan token by token in plain PyTorch, (y, last state): the oracle of the fast implementations.

    Works on any device, in float64 when u is float64 and in float32 otherwise; y has u's dtype. Time
    O(Bt L H P N) in L steps of Python; autograd keeps every step's state.
    """
    u, delta, A, B, C, d_skip, z, delta_bias, delta_softplus, initial_state = inputs
    inner = inner_type(u)
    batch, _, heads, width = u.shape
    dt = delta.to(inner)
    if delta_bias is not None:
        dt = dt + delta_bias.to(inner)
    if delta_softplus:
        dt = functional.softplus(dt)
    x, rate = u.to(inner), A.to(inner)
    b, c = (part.to(inner).repeat_interleave(heads // B.shape[2], dim=2) for part in (B, C))  # (Bt, L, H, N)
    shape = (batch, heads, width, B.shape[3])
    h = u.new_zeros(shape, dtype=inner) if initial_state is None else initial_state.to(inner)
    outputs = []
    # unbind, not indexing: autograd would fill a whole tensor with zeros for every indexed token
    for x_t, dt_t, b_t, c_t in zip(*(part.unbind(1) for part in (x, dt, b, c)), strict=True):
        inflow = (dt_t.unsqueeze(-1) * x_t).unsqueeze(-1) * b_t.unsqueeze(-2)  # (Bt, H, P, N)
        h = torch.exp(dt_t * rate)[..., None, None] * h + inflow
        outputs.append((h * c_t.unsqueeze(-2)).sum(-1))
    y = torch.stack(outputs, dim=1) if outputs else x
    if d_skip is not None:
        y = y + d_skip.to(inner).unsqueeze(-1) * x
    if z is not None:
        y = y * functional.silu(z.to(inner))
    return y.to(u.dtype), h


def _cpu() -> Any:
    from lightm.ops.ssd.cpu import run_backward, run_forward

    return run_forward, run_backward


def _saved(inputs: ScanInputs, chunk: int) -> tuple[int, ...]:
    from lightm.ops.ssd.cpu import layout_of

    return layout_of(inputs).saved_shape(chunk)


ssd_op = declare_scan(_NAME, _cpu, _saved)
