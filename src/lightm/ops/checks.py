"""Argument checks shared by the operators: every message says what, got, expected and how to mend it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

_log = logging.getLogger("lightm.ops")
_said: set[tuple[str, str]] = set()

HALF_TYPES = (torch.bfloat16, torch.float16)
CPU_TYPES = (torch.float32, *HALF_TYPES)
FLOAT_TYPES = (*CPU_TYPES, torch.float64)
IMPLEMENTATIONS = ("auto", "reference", "cpu")


def check_shape(
    operator: str, name: str, tensor: Tensor, expected: Sequence[int], meaning: str, mend: str = ""
) -> None:
    """Raise ValueError unless `tensor` has the expected shape."""
    if tuple(tensor.shape) != tuple(expected):
        hint = f"; {mend}" if mend else ""
        raise ValueError(
            f"{operator}: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected)} = {meaning}{hint}"
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


def choose(operator: str, impl: str, lead: Tensor, cpu_limits: str | None = None) -> str:
    """Resolve `impl` to "cpu" or "reference" for tensors like `lead`; the choice of "auto" is logged once.

    `cpu_limits` says why the CPU kernel cannot take this call, if so. ValueError when an explicit choice cannot be
    honoured.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{operator}: impl is {impl!r}, expected one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    reason = cpu_limits
    if lead.device.type != "cpu":
        reason = f"the tensors are on {lead.device}; move them with .cpu()"
    elif lead.dtype not in CPU_TYPES:
        reason = f"the tensors are {lead.dtype}; use float32, bfloat16 or float16"
    if impl == "cpu" and reason is not None:
        raise ValueError(f"{operator}: impl='cpu' is not possible: {reason}; or use impl='reference' or 'auto'")
    if impl != "auto":
        return impl
    chosen = "cpu" if reason is None else "reference"
    if not torch.compiler.is_compiling() and (operator, chosen) not in _said:
        _said.add((operator, chosen))
        _log.info("%s: using the %s implementation%s", operator, chosen, f" ({reason})" if reason else "")
    return chosen


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
