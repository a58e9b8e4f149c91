"""The selective scan, token by token in plain PyTorch: the oracle of the fast implementations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lightm.ops.scan.inputs import ScanInputs


def reference_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Return (y, last state) of the selective scan.

    Works on any device, in float64 when u is float64 and in float32 otherwise; y has u's dtype. Time O(Bt L E N) in
    L steps of Python; autograd keeps every step's state.
    """
    u, delta, A, B, C, d_skip, z, delta_bias, delta_softplus, initial_state = inputs
    inner = torch.float64 if u.dtype == torch.float64 else torch.float32
    batch, _, channels = u.shape
    states = A.shape[1]
    of_group = channels // B.shape[2]
    dt = delta.to(inner)
    if delta_bias is not None:
        dt = dt + delta_bias.to(inner)
    if delta_softplus:
        dt = functional.softplus(dt)
    x, decay_rate = u.to(inner), A.to(inner)
    b, c = (part.to(inner).repeat_interleave(of_group, dim=2) for part in (B, C))  # (Bt, L, E, N)
    h = u.new_zeros((batch, channels, states), dtype=inner) if initial_state is None else initial_state.to(inner)
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
