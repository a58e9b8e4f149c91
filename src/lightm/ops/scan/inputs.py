"""The inputs of a scan, and the scans as PyTorch operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lightm.ops.checks import check_shape
from lightm.ops.register import Function, Functions, Operator, differentiable

CHUNK = 64
"""Tokens between kept states: the backward pass recomputes the states of one such chunk at a time."""
MAX_STATES = 16
"""States that one pass of the CPU kernels keeps in registers."""


class ScanInputs(NamedTuple):
    """Inputs of `selective_scan` or `ssd_scan`, checked, B and C as (Bt, L, G, N)."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    d_skip: Tensor | None = None
    z: Tensor | None = None
    delta_bias: Tensor | None = None
    delta_softplus: bool = False
    initial_state: Tensor | None = None


ScanResults = tuple[Tensor, Tensor, Tensor]
"""(y, last state, kept states)."""
ScanGradients = tuple[Tensor, ...]
"""Gradients of (u, delta, A, B, C, d_skip, z, delta_bias, initial_state), each in its tensor's type; empty for absent
ones."""

_SCHEMA = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? d_skip, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus, Tensor? initial_state"
)


def checked(name: str, inputs: ScanInputs, states: int | None = None) -> ScanInputs:
    """The inputs, B and C as (Bt, L, G, N); ValueError unless they fit u (Bt, L, E) or (Bt, L, H, P) and N = `states`.

    With heads there is one A, step, skip and bias for each of them.
    """
    u, delta, A, B, C, d_skip, z, delta_bias, _, initial_state = inputs
    batch, length, parts = u.shape[:3]
    heads = u.dim() == 4
    part, kind, axis, axes = ("H", "heads", "third", "H, P") if heads else ("E", "channels", "last", "E")
    fits = B.shape[-1] >= 1 if states is None else B.shape[-1] == states
    if B.dim() not in (3, 4) or tuple(B.shape[:2]) != (batch, length) or not fits:
        n, more = ("N", " with N >= 1") if states is None else (states, "")
        raise ValueError(
            f"{name}: B has shape {tuple(B.shape)}, expected ({batch}, {length}, {n}) = (Bt, L, N) or "
            f"({batch}, {length}, G, {n}) = (Bt, L, G, N){more}"
        )
    if B.dim() == 4 and (B.shape[2] < 1 or parts % B.shape[2]):
        raise ValueError(
            f"{name}: B has G = {B.shape[2]} groups, which do not divide the {part} = {parts} {kind} of u into equal "
            "parts"
        )
    check_shape(name, "C", C, B.shape, "the shape of B")
    what = "one step per head" if heads else "the shape of u"
    check_shape(name, "delta", delta, u.shape[:3], f"(Bt, L, {part}), {what}")
    check_shape(name, "z", z, u.shape, f"(Bt, L, {axes}), the shape of u")
    for of, vector in (("A", A if heads else None), ("d_skip", d_skip), ("delta_bias", delta_bias)):
        check_shape(name, of, vector, (parts,), f"({part},), {part} from u's {axis} axis")
    expected = (batch, *u.shape[2:], B.shape[-1])
    check_shape(name, "initial_state", initial_state, expected, f"(Bt, {axes}, N)")
    return inputs if B.dim() == 4 else inputs._replace(B=B.unsqueeze(2), C=C.unsqueeze(2))


def declare_scan(
    name: str, functions: Functions, saved_shape: Function, more: str = ", int chunk", devices: Sequence[str] = ("CPU",)
) -> Operator:
    """Register a scan over u (Bt, L, E) with states (Bt, E, N) as an operator with a backward pass.

    `functions` gives forward(inputs, *more) -> ScanResults and backward(grad_y, grad_state, inputs, *more, saved) ->
    ScanGradients; `saved_shape(inputs, *more)` is the shape of the kept states; `more` extends the inputs' schema.
    """
    number = len(ScanInputs._fields)

    def flat() -> tuple[Function, Function]:
        run, back = functions()
        return (
            lambda *given: run(ScanInputs(*given[:number]), *given[number:]),
            lambda dy, dstate, *given: back(dy, dstate, ScanInputs(*given[:number]), *given[number:]),
        )

    def fake(*given: Any) -> ScanResults:
        x = ScanInputs(*given[:number])
        state = x.u.new_empty((x.u.shape[0], x.u.shape[2], x.B.shape[3]), dtype=torch.float32)
        saved = x.u.new_empty(saved_shape(x, *given[number:]), dtype=torch.float32)
        return x.u.new_empty(x.u.shape), state, saved

    return differentiable(name, _SCHEMA + more, flat, fake, outputs=3, gradients=2, devices=devices)


def check_chunk(name: str, chunk: int) -> None:
    """Raise where a backward pass finds that its forward pass kept nothing."""
    if not chunk:
        raise RuntimeError(f"lightm::{name} was called with chunk=0, which keeps nothing for a backward pass")


def gradient_of(given: Tensor | None, gradient: Tensor) -> Tensor:
    """The gradient of an optional input in its type; empty where it was not given."""
    return torch.empty(0, device=gradient.device) if given is None else gradient.to(given.dtype)


def in_state_blocks(run: Callable[[ScanInputs], tuple[Tensor, Tensor]], inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Scan blocks of MAX_STATES states one after the other; states do not meet before the sum over n."""
    u, A, B, C, begin = inputs.u, inputs.A, inputs.B, inputs.C, inputs.initial_state
    if B.shape[3] <= MAX_STATES:
        return run(inputs)
    x, total, states = u.float(), torch.zeros(u.shape), []
    for start in range(0, B.shape[3], MAX_STATES):
        block = slice(start, start + MAX_STATES)
        part = inputs._replace(
            u=x, A=A[:, block] if A.dim() == 2 else A, B=B[..., block], C=C[..., block], d_skip=None, z=None,
            initial_state=None if begin is None else begin[..., block],
        )  # fmt: skip
        y, state = run(part)
        total = total + y
        states.append(state)
    if inputs.d_skip is not None:
        total = total + inputs.d_skip.float().reshape(u.shape[2], *[1] * (u.dim() - 3)) * x
    if inputs.z is not None:
        total = total * functional.silu(inputs.z.float())
    return total.to(u.dtype), torch.cat(states, dim=-1)
