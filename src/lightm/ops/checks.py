"""Argument checks shared by the operators: every message says what, got, expected and how to fix it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_log = logging.getLogger("lightm.ops")
_used: set[tuple[str, str]] = set()

CPU_TYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT_TYPES = (*CPU_TYPES, torch.float64)


def check_shape(
    operator: str, name: str, tensor: Tensor | None, expected: Sequence[int], meaning: str, hint: str = ""
) -> None:
    """Raise ValueError unless `tensor` has the expected shape or is absent."""
    if tensor is not None and tuple(tensor.shape) != tuple(expected):
        raise ValueError(
            f"{operator}: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected)} = {meaning}"
            + (f"; {hint}" if hint else "")
        )


def check_kinds(operator: str, tensors: dict[str, Tensor | None]) -> None:
    """Raise unless all tensors are real floating point and on the first one's device; float64 does not mix."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in present.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{operator}: {name} is {type(tensor).__name__}, expected a torch.Tensor")
    first, lead = next(iter(present.items()))
    for name, tensor in present.items():
        if tensor.dtype not in FLOAT_TYPES:
            raise ValueError(
                f"{operator}: {name} has dtype {tensor.dtype}, expected float32, bfloat16, float16 or float64; "
                f"convert it, e.g. {name}.float()"
            )
        if tensor.device != lead.device:
            raise ValueError(
                f"{operator}: {name} is on {tensor.device} and {first} on {lead.device}, expected one device; "
                f"move it, e.g. {name}.to({first}.device)"
            )
        if (tensor.dtype == torch.float64) != (lead.dtype == torch.float64):
            raise ValueError(
                f"{operator}: {name} has dtype {tensor.dtype} and {first} {lead.dtype}: float64 does not mix with "
                f"other types; convert one of them, e.g. {name}.to({first}.dtype)"
            )


def choose(
    operator: str,
    impl: str,
    lead: Tensor,
    cpu_limits: str | None = None,
    triton_limits: Callable[[Tensor], str | None] | None = None,
    fallback: str = "reference",
) -> str:
    """Resolve `impl` to "cpu", "triton" or a plain PyTorch form for tensors like `lead`; "auto" logs its choice once.

    `cpu_limits` says why the CPU kernel cannot take this call, if so. `triton_limits`, given by operators that have a
    Triton kernel, says why that cannot take tensors like `lead`, None if it can. `fallback` is what "auto" takes where
    no kernel can run. ValueError when an explicit choice cannot be honoured.
    """
    known = ("auto", "reference", fallback, "cpu", *(("triton",) if triton_limits is not None else ()))
    if impl not in known:
        raise ValueError(f"{operator}: impl is {impl!r}, expected one of {', '.join(map(repr, dict.fromkeys(known)))}")
    if impl == "triton" and triton_limits is not None:
        reason = triton_limits(lead)
        if reason is not None:
            raise ValueError(f"{operator}: impl='triton' is not possible: {reason}; or use impl='reference' or 'auto'")
        return impl
    reason = cpu_limits
    if lead.device.type not in ("cpu", "meta"):  # on `meta` the registered operators know the shapes
        reason = f"the tensors are on {lead.device}; move them with .cpu()"
    elif lead.dtype not in CPU_TYPES:
        reason = f"the tensors are {lead.dtype}; use float32, bfloat16 or float16"
    if impl == "cpu" and reason is not None:
        raise ValueError(f"{operator}: impl='cpu' is not possible: {reason}; or use impl='{fallback}' or 'auto'")
    if impl != "auto":
        return impl
    chosen = "cpu" if reason is None else fallback
    if lead.device.type == "cuda" and triton_limits is not None:
        reason = triton_limits(lead)
        chosen = "triton" if reason is None else "reference"
    if note_use(operator, chosen):
        _log.info("%s: using the %s implementation%s", operator, chosen, f" ({reason})" if reason else "")
    return chosen


def note_use(operator: str, implementation: str) -> bool:
    """Remember that an operator ran in this implementation, and return whether that is new; never while compiling."""
    if torch.compiler.is_compiling() or (operator, implementation) in _used:
        return False
    _used.add((operator, implementation))
    return True


def implementations() -> dict[str, str]:
    """Which implementation each operator has run in so far in this process; of several, their names with commas."""
    found: dict[str, list[str]] = {}
    for operator, implementation in sorted(_used):
        found.setdefault(operator, []).append(implementation)
    return {operator: ", ".join(names) for operator, names in found.items()}


def inner_type(x: Tensor) -> torch.dtype:
    """The type of the arithmetic on x in plain PyTorch: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wants_grad(*inputs: object) -> bool:
    """Whether autograd will ask for a gradient of one of the inputs that are tensors."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
