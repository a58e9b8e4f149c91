"""Registers CPU functions as PyTorch operators `lightm::...`, which compile, export and autocast see as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_tags = (torch.Tag.pt2_compliant_tag,)


class Operator:
    """An operator: call it like the function; `register_fake` and `register_autograd` as in `torch.library`."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        torch.library.define(name, torch.library.infer_schema(function, mutates_args=()), tags=_tags)
        torch.library.impl(name, "CPU", function)
        space, short = name.split("::")
        self._call = getattr(getattr(torch.ops, space), short).default
        self.__doc__ = function.__doc__

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Register what shapes and dtypes come out."""
        torch.library.register_fake(self.name, function)
        return function

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., None] | None = None
    ) -> None:
        """Register the backward pass."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Decorate the CPU function of operator `name`; its annotations give the schema.

    `torch.library.custom_op` would do, but its first call loads PyTorch's compiler: a second and 140 MB.
    """
    return lambda function: Operator(name, function)
