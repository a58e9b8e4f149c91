"""Whether modules are as LightM built them: only then may a fused kernel read their weights instead of calling them.

Programs change networks from outside: they register hooks (feature extraction, Grad-CAM, pruning, profilers), replace
an `nn.Linear` by one with an adapter (LoRA) or with quantised weights, parametrise a weight, or bind another `forward`.
None of that may be ignored, so every kernel that takes the tensors of several modules at once asks `intact` first, and
otherwise each module is called as in any other network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

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
    if _global_hooks():
        return True
    left: list[nn.Module | None] = [network]
    while left:
        module = left.pop()
        if module is not None:
            if module._forward_hooks or module._forward_pre_hooks:
                return True
            left.extend(module._modules.values())
    return False


def _global_hooks() -> bool:
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) of an `nn.Linear`, by LightM's kernel where the module is intact."""
    if type(module) is nn.Linear and intact(module):
        return ops.linear(x, module.weight, module.bias)
    result: Tensor = module(x)
    return result
