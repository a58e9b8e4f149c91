"""Less memory in training: a piece of a network keeps its inputs and runs again when the backward pass comes to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

CHECKPOINT_ABOVE = 1 << 23
"""Numbers in the largest tensor of a block up to which training keeps everything unless told otherwise: 32 MiB."""


def should_checkpoint(on: bool | None, numbers: int) -> bool:
    """Whether to recompute a block whose largest tensor has `numbers`; `on` is the user's choice, None for none."""
    return numbers > CHECKPOINT_ABOVE if on is None else on


def is_plain(x: Tensor) -> bool:
    """Whether x is an ordinary tensor in an ordinary call: nothing is being compiled, exported or only shaped."""
    return type(x) is Tensor and x.device.type != "meta" and not torch.compiler.is_compiling() and x.numel() > 0


def autocast_state(x: Tensor) -> tuple[str, torch.dtype, bool]:
    """What `torch.autocast` needs to repeat the present mode on x's device."""
    kind = x.device.type
    return kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)


def checkpointed(run: Callable[..., Tensor], parameters: Iterable[nn.Parameter], on: bool, *inputs: Tensor) -> Tensor:
    """run(*inputs); if `on`, only the inputs are kept for the backward pass. `parameters` are all that run uses."""
    weights = list(parameters)
    if on and torch.is_grad_enabled() and is_plain(inputs[0]) and any(x.requires_grad for x in (*inputs, *weights)):
        result: Tensor = _Checkpointed.apply(run, len(inputs), *inputs, *weights)
        return result
    return run(*inputs)


class _Checkpointed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], count: int, *tensors: Tensor) -> Tensor:
        ctx.run, ctx.count, ctx.autocast = run, count, autocast_state(tensors[0])
        ctx.save_for_backward(*tensors)
        with torch.no_grad():
            return run(*tensors[:count])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = list(ctx.saved_tensors)
        inputs = [x.detach().requires_grad_(x.requires_grad) for x in tensors[: ctx.count]]
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            out = ctx.run(*inputs)
        leaves = [*inputs, *tensors[ctx.count :]]
        wanted = [x for x in leaves if x.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, grad, allow_unused=True))
        return None, None, *(next(found) if x.requires_grad else None for x in leaves)


def set_activation_checkpointing(network: nn.Module, on: bool | None) -> nn.Module:
    """Choose how a network trains: True recomputes (less memory), False keeps all activations (less work).

    None, the state of a new network, recomputes those blocks whose tensors have more than `CHECKPOINT_ABOVE` numbers.
    """
    for module in network.modules():
        if hasattr(module, "checkpointing"):
            module.checkpointing = on  # type: ignore[assignment]
    return network
