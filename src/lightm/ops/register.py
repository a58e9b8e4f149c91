"""Registers functions as PyTorch operators `lightm::...`, which compile, export and autograd see as one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

_tags = (torch.Tag.pt2_compliant_tag,)
Functions = Callable[[], tuple[Callable[..., Any], Callable[..., Any]]]
"""Gives an operator's forward and backward function; called on first use, so that only then Numba is loaded."""


class Operator:
    """An operator: call it like the function; `register_fake` and `register_autograd` as in `torch.library`.

    `torch.library.custom_op` would do, but its first call loads PyTorch's compiler: a second and 140 MB.
    """

    def __init__(
        self, name: str, function: Callable[..., Any], schema: str | None = None, devices: Sequence[str] = ("CPU",)
    ) -> None:
        self.name = name
        schema = schema or torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=_tags)
        torch.library.impl(name, tuple(devices), function)
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
    """Decorate the CPU function of operator `name`; its annotations give the schema."""
    return lambda function: Operator(name, function)


def empty_like_first(x: Tensor, *_: Any) -> Tensor:
    """The fake result of an operator whose result has the shape and dtype of its first argument."""
    return x.new_empty(x.shape)


def differentiable(
    name: str,
    inputs: str,
    functions: Functions,
    fake: Callable[..., Any] = empty_like_first,
    outputs: int = 1,
    gradients: int = 1,
    devices: Sequence[str] = ("CPU",),
) -> Operator:
    """Register operator `name` and its backward pass, the operator `name`_backward.

    Args:
        inputs: the schema of the inputs, e.g. "Tensor x, Tensor? bias, bool silu".
        functions: gives (forward, backward). forward(*inputs) returns the outputs. backward(*output gradients,
            *inputs, *kept outputs) returns a gradient for every tensor input, an empty one for an absent input.
        fake: the outputs' shapes and dtypes from the inputs.
        outputs: number of outputs.
        gradients: how many of the first outputs have gradients; the others are kept for the backward pass.
        devices: where the functions run.
    """
    functions = cache(functions)
    declared = [part.split() for part in inputs.split(", ")]
    tensors = [i for i, (kind, _) in enumerate(declared) if kind.startswith("Tensor")]
    sent = ", ".join(f"Tensor grad{i}" for i in range(gradients))
    kept = "".join(f", Tensor kept{i}" for i in range(outputs - gradients))

    def results(count: int) -> str:
        return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"

    def run(*args: Any) -> Any:
        return functions()[0](*args)

    def run_back(*args: Any) -> Any:
        return functions()[1](*args)

    def fake_back(*args: Any) -> Any:
        given = [args[gradients + i] for i in tensors]
        none = given[0].new_empty(0, dtype=torch.float32)
        made = tuple(none if x is None else x.new_empty(x.shape) for x in given)
        return made[0] if len(made) == 1 else made

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.others = [None if i in tensors else value for i, value in enumerate(inputs)]
        ctx.save_for_backward(*(inputs[i] for i in tensors), *(output[gradients:] if outputs > 1 else ()))

    def backward(ctx: Any, *grads: Tensor) -> Any:
        saved = ctx.saved_tensors  # read once: activation checkpointing lets every tensor be unpacked a single time
        given = list(ctx.others)
        for i, x in zip(tensors, saved, strict=False):
            given[i] = x
        made = back(*grads[:gradients], *given, *saved[len(tensors) :])
        found: list[Tensor | None] = [None] * len(given)
        for i, grad in zip(tensors, (made,) if len(tensors) == 1 else made, strict=True):
            found[i] = None if given[i] is None else grad
        return found[0] if len(found) == 1 else tuple(found)

    back = Operator(f"{name}_backward", run_back, f"({sent}, {inputs}{kept}) -> {results(len(tensors))}", devices)
    back.register_fake(fake_back)
    made = Operator(name, run, f"({inputs}) -> {results(outputs)}", devices)
    made.register_fake(fake)
    made.register_autograd(backward, setup_context=keep)
    return made
