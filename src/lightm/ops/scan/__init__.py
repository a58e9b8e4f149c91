"""The selective scan of Mamba: the public function, its checks and the choice of an implementation."""

from __future__ import annotations

from torch import Tensor

from lightm.ops.checks import check_kinds, check_shape, choose, wants_grad
from lightm.ops.scan.gpu import triton_limits
from lightm.ops.scan.inputs import CHUNK, ScanInputs, in_state_blocks
from lightm.ops.scan.operator import scan_op, triton_scan_op
from lightm.ops.scan.reference import reference_scan

__all__ = ["reference_scan", "selective_scan", "selective_scan_with_state"]

_NAME = "selective_scan"


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
    impl: str = "auto",
) -> Tensor:
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
        impl: "cpu" (Numba kernels; float32, bfloat16, float16), "triton" (kernels for a GPU, the same types; needs
            Triton; not timed on hardware yet), "reference" (plain PyTorch, any device, float64 too), or "auto": "cpu"
            or, on a GPU, "triton" where possible, else "reference"; what was chosen is logged once.

    Returns:
        y (Bt, L, E) in u's dtype; `selective_scan_with_state` also returns the states after the last token.
        Arithmetic is float32 (float64 for float64 input) inside whatever the inputs' types, which may be mixed.

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
    return selective_scan_with_state(u, delta, A, B, C, d_skip, z, delta_bias, delta_softplus, initial_state, impl)[0]


def selective_scan_with_state(
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
    """`selective_scan` that also returns the states after the last token, with which a next chunk of tokens can begin.

    Returns (y, state): the state is (Bt, E, N) in float32 (float64 for float64 input).
    """
    inputs = ScanInputs(u, delta, A, B, C, d_skip, z, delta_bias, delta_softplus, initial_state)
    check_kinds(_NAME, {name: x for name, x in inputs._asdict().items() if name != "delta_softplus"})
    _check_shapes(inputs)
    if B.dim() == 3:
        inputs = inputs._replace(B=B.unsqueeze(2), C=C.unsqueeze(2))
    chosen = choose(_NAME, impl, u, triton_limits=triton_limits)
    if chosen == "reference":
        return reference_scan(inputs)
    if chosen == "triton":
        y, state, _ = triton_scan_op(*inputs)
        return y, state
    return in_state_blocks(_on_cpu, inputs)


def _on_cpu(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    y, state, _ = scan_op(*inputs, CHUNK if wants_grad(*inputs) else 0)
    return y, state


def _check_shapes(inputs: ScanInputs) -> None:
    u, delta, A, B, C, d_skip, z, delta_bias, _, initial_state = inputs
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
