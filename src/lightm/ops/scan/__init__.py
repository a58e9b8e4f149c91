"""The selective scan of Mamba: the public functions, the choice of an implementation, the oracle, the operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightm.ops.checks import check_kinds, choose, inner_type, wants_grad
from lightm.ops.scan.gpu import plan_for, triton_limits
from lightm.ops.scan.inputs import CHUNK, ScanInputs, checked, declare_scan, in_state_blocks

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

    Returns: y (Bt, L, E) in u's dtype; `selective_scan_with_state` also returns the states after the last token.
    Arithmetic is float32 (float64 for float64 input) inside whatever the inputs' types, which may be mixed.
    Raises ValueError for shapes, dtypes or devices that do not fit and an `impl` that cannot take these tensors,
    TypeError for something that is not a tensor.

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
    if u.dim() != 3:
        raise ValueError(
            f"{_NAME}: u has shape {tuple(u.shape)}, expected (Bt, L, E); flatten the spatial axes to tokens with "
            "the channels last, e.g. x.flatten(1, -2)"
        )
    if A.dim() != 2 or A.shape[0] != u.shape[2] or A.shape[1] < 1:
        raise ValueError(
            f"{_NAME}: A has shape {tuple(A.shape)}, expected ({u.shape[2]}, N) = (E, N) with N >= 1, "
            "E from u's last axis"
        )
    inputs = checked(_NAME, inputs, A.shape[1])
    chosen = choose(_NAME, impl, u, triton_limits=triton_limits)
    if chosen == "reference":
        return reference_scan(inputs)
    if chosen == "triton":
        return triton_scan_op(*inputs)[:2]
    return in_state_blocks(lambda block: scan_op(*block, CHUNK if wants_grad(*block) else 0)[:2], inputs)


def reference_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """The scan token by token in plain PyTorch, (y, last state): the oracle of the fast implementations.

    Works on any device, in float64 when u is float64 and in float32 otherwise; y has u's dtype. Time O(Bt L E N) in
    L steps of Python; autograd keeps every step's state.
    """
    u, delta, A, B, C, d_skip, z, delta_bias, delta_softplus, initial_state = inputs
    inner = inner_type(u)
    dt = delta.to(inner)
    if delta_bias is not None:
        dt = dt + delta_bias.to(inner)
    if delta_softplus:
        dt = functional.softplus(dt)
    x, decay_rate = u.to(inner), A.to(inner)
    b, c = (part.to(inner).repeat_interleave(u.shape[2] // B.shape[2], dim=2) for part in (B, C))  # (Bt, L, E, N)
    h = u.new_zeros((u.shape[0], *A.shape), dtype=inner) if initial_state is None else initial_state.to(inner)
    outputs = []
    # unbind, not indexing: autograd would fill a whole tensor with zeros for every indexed token
    for x_t, dt_t, b_t, c_t in zip(*(part.unbind(1) for part in (x, dt, b, c)), strict=True):
        step = dt_t.unsqueeze(-1)  # (Bt, E, 1)
        h = torch.exp(step * decay_rate) * h + step * b_t * x_t.unsqueeze(-1)
        outputs.append((h * c_t).sum(-1))
    y = torch.stack(outputs, dim=1) if outputs else x
    if d_skip is not None:
        y = y + d_skip.to(inner) * x
    if z is not None:
        y = y * functional.silu(z.to(inner))
    return y.to(u.dtype), h


def _cpu() -> Any:
    from lightm.ops.scan.cpu import run_backward, run_forward

    return run_forward, run_backward


def _cpu_saved(inputs: ScanInputs, chunk: int) -> tuple[int, ...]:
    from lightm.ops.scan.cpu import layout_of

    return layout_of(inputs).saved_shape(chunk)


def _triton() -> Any:
    from lightm.ops.scan.gpu import run_backward, run_forward

    return run_forward, run_backward


scan_op = declare_scan(_NAME, _cpu, _cpu_saved)
# "CPU" is for Triton's interpreter alone: `triton_limits` lets no other tensor of a CPU come here
triton_scan_op = declare_scan(
    "selective_scan_triton", _triton, lambda x: plan_for(x).starts_shape, more="", devices=("CPU", "CUDA")
)
