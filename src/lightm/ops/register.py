"""Registers functions as PyTorch operators `lightm::...`, which compile, export and autograd see as one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]
Functions = Callable[[], tuple[Function, Function]]
"""Gives an operator's forward and backward function; called on first use, so that only then Numba is loaded."""


class Operator:
    """An operator `lightm::name` with its schema, function and the shapes and dtypes that come out: call it.

    `torch.library.custom_op` would do, but its first call loads PyTorch's compiler: a second and 140 MB.
    """

    def __init__(
        self, name: str, schema: str, function: Function, fake: Function, devices: Sequence[str] = ("CPU",)
    ) -> None:
        self._name = f"lightm::{name}"
        torch.library.define(self._name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(self._name, tuple(devices), function)
        torch.library.register_fake(self._name, fake)
        self._call = getattr(torch.ops.lightm, name).default

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def register_autograd(self, backward: Function, keep: Function | None = None) -> None:
        """Register the backward pass, and what it keeps, as in `torch.library`."""
        torch.library.register_autograd(self._name, backward, setup_context=keep)


def empty_like_first(x: Tensor, *_: Any) -> Tensor:
    """The fake result of an operator whose result has the shape and dtype of its first argument."""
    return x.new_empty(x.shape)


def differentiable(
    name: str,
    inputs: str,
    functions: Functions,
    fake: Function = empty_like_first,
    outputs: int = 1,
    gradients: int = 1,
    devices: Sequence[str] = ("CPU",),
) -> Operator:
    """Register operator `lightm::name` and its backward pass, `lightm::name_backward`.

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

    schema = f"({sent}, {inputs}{kept}) -> {results(len(tensors))}"
    back = Operator(f"{name}_backward", schema, lambda *args: functions()[1](*args), fake_back, devices)
    schema = f"({inputs}) -> {results(outputs)}"
    made = Operator(name, schema, lambda *args: functions()[0](*args), fake, devices)
    made.register_autograd(backward, keep)
    return made
