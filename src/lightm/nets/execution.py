"""How the modules of a network run: inside a fused kernel where that changes nothing, and with how much memory.

Programs change networks from outside: they register hooks (feature extraction, Grad-CAM, pruning, profilers), replace
an `nn.Linear` by one with an adapter (LoRA) or with quantised weights, parametrise a weight, or bind another `forward`.
Every kernel that takes the tensors of several modules at once therefore asks `intact` first; otherwise each module is
called as in any other network.

Activation checkpointing: a block keeps its inputs alone and runs again when the backward pass comes to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from lightm import ops

Kind = TypeVar("Kind", bound=type[nn.Module])

_KINDS: set[type[nn.Module]] = {nn.Linear, nn.LayerNorm, nn.GroupNorm}
_TENSORS = {Tensor, nn.Parameter, type(None)}
_observed = False


@contextmanager
def observed() -> Iterator[None]:
    """Inside of the block hooks do not change how a network runs: for counting what it does without them."""
    global _observed
    before, _observed = _observed, True
    try:
        yield
    finally:
        _observed = before


def fusible(kind: Kind) -> Kind:
    """Class decorator: modules of this kind may run inside of a fused kernel. Subclasses are kinds of their own."""
    _KINDS.add(kind)
    return kind


def intact(*modules: nn.Module | None) -> bool:
    """Whether these modules and all inside are of known kinds, with plain weights, and without hooks.

    Cost: about a third of a microsecond a module.
    """
    hooks = not _observed
    if hooks and _global_hooks():
        return False
    left = list(modules)
    while left:
        module = left.pop()
        if module is None:
            continue
        if (
            type(module) not in _KINDS
            or "forward" in module.__dict__
            or (hooks and (module._forward_hooks or module._forward_pre_hooks))
            or (hooks and (module._backward_hooks or module._backward_pre_hooks))
        ):
            return False
        for tensor in module._parameters.values():
            if type(tensor) not in _TENSORS:
                return False
        left.extend(module._modules.values())
    return True


def has_hooks(network: nn.Module) -> bool:
    """Whether a hook anywhere in a network may hold on to the tensors that pass by."""
    return _global_hooks() or any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def _global_hooks() -> bool:
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) of an `nn.Linear`, by LightM's kernel where the module is intact."""
    if type(module) is nn.Linear and intact(module):
        return ops.linear(x, module.weight, module.bias)
    result: Tensor = module(x)
    return result


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
