"""What a computation needs at least, and the time that this machine needs for it at least: its floor.

The floor of one step is max(bytes / copy rate, FLOPs / multiply-add rate + exponentials / exponential rate): memory
traffic can run beside arithmetic, but products and exponentials share the vector units. The multiply-add rate is that
of a large matrix product or of a loop in registers, whichever is faster. The floor of a
network is the sum over its steps, which run one after the other. Nothing a floor counts can be left out, and much
that it does not count (norms, additions, copies, page faults) may be needed: it is a bound from below.

Steps of a network:

- a state-space layer (RVM, SPM): reads its input and writes its output once; 2 FLOPs for every weight of its linear
  maps, 2 K for each tap of its causal convolution, 6 for every state update; exponentials: one a state update, and
  one for each softplus, activation and gate;
- every other operator of this project, every convolution and matrix product, own or of a peer: reads its inputs and
  writes its outputs once, and its multiply-adds at 2 FLOPs. Normalisation, activation and additions count as fused
  into a neighbour.

With the backward pass: bytes of a step's input three times (read, read again, gradient written) and of its output
twice (written, gradient read); FLOPs three times (values, gradient of the input, gradient of the weights); exponentials
twice (they are recomputed rather than kept).

A floor of memory holds for data larger than the caches: a small case may be faster than it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightm.lab.bench.machine import Limits

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lightm.nets.blocks import RVM, SPM

FLOAT = 4  # bytes of float32


@dataclass(frozen=True)
class Work:
    """Bytes read and written, FLOPs (a multiply-add is 2) and exponentials of one step."""

    read: float = 0.0
    written: float = 0.0
    flops: float = 0.0
    exps: float = 0.0

    @property
    def bytes(self) -> float:
        return self.read + self.written

    def with_backward(self) -> Work:
        """The same step with its backward pass."""
        return Work(2 * self.read + self.written, self.read + self.written, 3 * self.flops, 2 * self.exps)


def floor_seconds(steps: Sequence[Work], limits: Limits) -> float:
    """The least time for `steps`, one after the other, on a machine of these limits."""
    return sum(max(step.bytes / limits.bytes, step.flops / limits.flops + step.exps / limits.exps) for step in steps)


def layer_work(layer: RVM | SPM, inputs: Tensor, output: Tensor) -> Work:
    """The work of one forward pass of a state-space layer, from its parameters and the shapes around it."""
    import torch

    from lightm.nets.state_space import GroupedLinear

    tokens = inputs.numel() // inputs.shape[-1]
    inner = set(layer.vss.modules())  # run once for every order of the tokens
    orders = {"bidirectional": 2, "axes": inputs.dim() - 2}.get(getattr(layer, "scan", ""), 1)
    flops = exps = 0.0
    for module in layer.modules():
        times = orders if module in inner else 1
        if isinstance(module, torch.nn.Linear):
            flops += times * 2 * module.weight.numel()
        elif isinstance(module, GroupedLinear):
            # every part has its own product, also where one weight serves all of them
            flops += times * 2 * module.parts * sum(module.outs) * module.weight.shape[-1]
        if isinstance(getattr(module, "A_log", None), torch.nn.Parameter):
            core = state_space_work(module)
            flops += times * core.flops
            exps += times * core.exps
    return Work(FLOAT * inputs.numel(), FLOAT * output.numel(), tokens * flops, tokens * exps)


def state_space_work(core: nn.Module) -> Work:
    """FLOPs and exponentials a token of the module that holds `A_log`: its scan, causal convolution and gate.

    With `parts`, the parameters are of one part for each set, and several parts may share a set. With `head_dim`, one
    decay and one step serve a head (Mamba-2), else every channel has a step and every state of it a decay.
    """
    parameters: dict[str, Any] = dict(core.named_parameters(recurse=False))
    decay, weight = parameters["A_log"], parameters["conv_weight"]
    parts = getattr(core, "parts", 0)
    repeated = parts // decay.shape[0] if parts else 1
    decays, taps = decay.numel() * repeated, weight.shape[-1]
    convolved = weight.numel() // taps * repeated
    inner = int(getattr(core, "inner", 0)) * max(parts, 1)
    steps = decays if hasattr(core, "head_dim") else inner
    updates = inner * int(getattr(core, "state_size", 0))
    return Work(flops=6 * updates + 2 * taps * convolved, exps=decays + steps + convolved + inner)


def _own_operator(name: str, args: Sequence[Any]) -> tuple[float, float]:
    """(FLOPs, exponentials) of one of this project's operators where they matter; others count by bytes alone."""
    if name == "depthwise_conv":
        x, weight = args[:2]
        return 2.0 * x.numel() * (weight.numel() // weight.shape[-1]), 0.0
    if name == "linear":
        return 2.0 * args[0].numel() * args[1].shape[0], 0.0
    if name == "selective_scan":
        updates = args[0].numel() * args[2].shape[1]
        return 6.0 * updates, float(updates + args[0].numel())
    return 0.0, 0.0


def _size(value: Any) -> float:
    import torch

    if isinstance(value, torch.Tensor):
        # a tensor that is expanded, such as a bias, lies in memory once
        return min(value.numel() * value.element_size(), value.untyped_storage().nbytes())
    if isinstance(value, (list, tuple)):
        return sum(_size(item) for item in value)
    return 0.0


def count_steps(module: nn.Module, call: Callable[[], object]) -> list[Work]:
    """The steps of one forward pass of `module`, counted while `call` runs it. Gradients are off meanwhile."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    steps: list[Work] = []
    inside: list[object] = []

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            out = func(*args, **kwargs)
            if not inside:
                packet, space = func._overloadpacket, func.namespace
                if packet in flop_registry:
                    flops = float(flop_registry[packet](*args, **kwargs, out_val=out))
                    steps.append(Work(_size(args), _size(out), flops))
                elif space == "lightm":
                    flops, exps = _own_operator(packet.__name__, args)
                    steps.append(Work(_size(args), _size(out), flops, exps))
            return out

    with _layers_counted(module, steps, inside), torch.no_grad(), Counter():
        call()
    return steps


@contextmanager
def _layers_counted(module: nn.Module, steps: list[Work], inside: list[object]) -> Iterator[None]:
    """Count RVM and SPM layers as one step each, whatever operators they call."""
    from lightm.nets.blocks import RVM, SPM

    def enter(layer: nn.Module, args: Any) -> None:
        inside.append(layer)

    def leave(layer: Any, args: Any, output: Any) -> None:
        inside.pop()
        steps.append(layer_work(layer, args[0], output))

    handles = []
    for layer in module.modules():
        if isinstance(layer, (RVM, SPM)):
            handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
