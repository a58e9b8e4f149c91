"""The SSD scan of Mamba-2: the public function, its checks and the choice of an implementation."""

from __future__ import annotations

from torch import Tensor

from lightm.ops.checks import check_kinds, check_shape, choose, wants_grad
from lightm.ops.scan.inputs import CHUNK, ScanInputs, in_state_blocks
from lightm.ops.ssd.chunked import chunked_ssd
from lightm.ops.ssd.operator import ssd_op
from lightm.ops.ssd.reference import reference_ssd

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

    Returns:
        y (Bt, L, H, P) in u's dtype; `ssd_scan_with_state` also returns the states after the last token. Arithmetic is
        float32 (float64 for float64 input) inside whatever the inputs' types, which may be mixed.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an `impl` that cannot take these tensors.
        TypeError: something that is not a tensor.

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
    _check_shapes(inputs)
    if B.dim() == 3:
        inputs = inputs._replace(B=B.unsqueeze(2), C=C.unsqueeze(2))
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


def _check_shapes(inputs: ScanInputs) -> None:
    u, delta, A, B, C, d_skip, z, delta_bias, _, initial_state = inputs
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
    check_shape(_NAME, "delta", delta, u.shape[:3], "(Bt, L, H), one step per head")
    if z is not None:
        check_shape(_NAME, "z", z, u.shape, "(Bt, L, H, P), the shape of u")
    for name, vector in (("A", A), ("d_skip", d_skip), ("delta_bias", delta_bias)):
        if vector is not None:
            check_shape(_NAME, name, vector, (heads,), "(H,), H from u's third axis")
    if initial_state is not None:
        check_shape(_NAME, "initial_state", initial_state, (batch, heads, width, B.shape[-1]), "(Bt, H, P, N)")
