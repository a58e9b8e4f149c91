"""The roofline: the shortest time that this machine's peak throughputs allow for a computation.

The roofline of one step is max(bytes / copy rate, FLOPs / multiply-add rate + exponentials / exponential rate): memory
traffic can run beside arithmetic, but multiply-adds and exponentials share the vector units. The multiply-add rate is
that of a large matmul or of a loop in registers, whichever is faster. The roofline of a network is the sum over its
steps, which run one after the other. It is a lower bound: nothing that it counts can be left out, and norms, additions,
copies and page faults, which it does not count, may be needed.

Steps of a network:

- a state-space layer (RVM, SPM) reads its input and writes its output once; 2 FLOPs per weight of its linear maps and
  of its causal convolution, 6 per state update; exponentials: one per state update, softplus, activation and gate;
- every other operator of this project, every convolution and matmul, own or of a baseline, reads its inputs and writes
  its outputs once, a multiply-add being 2 FLOPs. Normalisation, activation and additions count as fused into a
  neighbour.

With the backward pass: a step's input three times (read, read again, gradient written), its output twice (written,
gradient read); FLOPs three times (values, gradients of input and weights); exponentials twice (recomputed).

The copy rate is that of data larger than the caches: a small case may be faster than its roofline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lightm.nets.blocks import RVM, SPM

FLOAT = 4  # bytes of float32


@dataclass(frozen=True)
class Throughput:
    """Peak throughputs per second: FLOPs of a large float32 matmul and of multiply-adds in registers (a multiply-add is
    2), bytes of a large copy (reads and writes counted), exponentials from and to the first-level cache, and state
    updates (tokens x channels x states) of a bare scan loop."""

    matmul: float
    registers: float
    bytes: float
    exps: float
    updates: float

    @property
    def flops(self) -> float:
        """The rate that rooflines are counted with: libraries do not reach the registers' on every processor."""
        return max(self.matmul, self.registers)

    def best(self, other: Throughput) -> Throughput:
        """The larger of each rate."""
        return Throughput(*map(max, dataclasses.astuple(self), dataclasses.astuple(other)))

    def describe(self) -> str:
        return (
            f"matmul {self.matmul / 1e9:.0f} GFLOP/s, multiply-adds in registers {self.registers / 1e9:.0f} "
            f"GFLOP/s, copy {self.bytes / 1e9:.1f} GB/s, {self.exps / 1e9:.2f} G exponentials/s, "
            f"bare scan {self.updates / 1e9:.2f} G state updates/s"
        )


def measure_throughput(runs: int = 5, *, small: bool = False) -> Throughput:
    """Measure each throughput as the fastest of `runs` after a warm-up: about 2 seconds and 0.6 GB.

    `small` measures on less data (for tests): rates are then of the caches.
    """
    import torch

    from lightm.lab.bench.kernels import STATES, BareScan, exponential_batch, multiply_add_batch
    from lightm.lab.bench.measure import best_seconds

    threads, edge, floats = torch.get_num_threads(), 256 if small else 2048, 1 << (20 if small else 26)
    with torch.no_grad():
        a, b, out = torch.randn(edge, edge), torch.randn(edge, edge), torch.empty(edge, edge)
        matmul = 2 * edge**3 / best_seconds(lambda: torch.mm(a, b, out=out), runs)
        source, target = torch.ones(floats), torch.empty(floats)
        moved = 2 * 4 * floats / best_seconds(lambda: target.copy_(source), runs)
        chains, flops = multiply_add_batch(threads, rounds=20_000 if small else 2_000_000)
        call, count = exponential_batch(threads, rounds=100 if small else 4000)
        scan = BareScan(1024 if small else 65536, 64)
        return Throughput(
            matmul,
            flops / best_seconds(chains, runs),
            moved,
            count / best_seconds(call, runs),
            scan.tokens * scan.channels * STATES / best_seconds(scan.run, runs),
        )


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

    def __mul__(self, count: int) -> Work:
        return Work(self.read * count, self.written * count, self.flops * count, self.exps * count)

    def with_backward(self) -> Work:
        """The same step with its backward pass."""
        return Work(2 * self.read + self.written, self.read + self.written, 3 * self.flops, 2 * self.exps)


def roofline_seconds(steps: Sequence[Work], peak: Throughput) -> float:
    """The roofline of `steps`, one after the other, on a machine of this peak throughput."""
    return sum(max(step.bytes / peak.bytes, step.flops / peak.flops + step.exps / peak.exps) for step in steps)


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
    """FLOPs and exponentials per token of the module that holds `A_log`: its scan, causal convolution and gate.

    With `parts`, several of them may share one set of parameters. With `head_dim`, a head has one decay and one step
    (Mamba-2), else every channel has a step and each of its states a decay.
    """
    parameters: dict[str, Any] = dict(core.named_parameters(recurse=False))
    decay, weight = parameters["A_log"], parameters["conv_weight"]
    parts = getattr(core, "parts", 0)
    repeated = parts // decay.shape[0] if parts else 1
    decays, kernel = decay.numel() * repeated, weight.shape[-1]
    convolved = weight.numel() // kernel * repeated
    inner = int(getattr(core, "inner", 0)) * max(parts, 1)
    steps = decays if hasattr(core, "head_dim") else inner
    updates = inner * int(getattr(core, "state_size", 0))
    return Work(flops=6 * updates + 2 * kernel * convolved, exps=decays + steps + convolved + inner)


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

    def leave(layer: Any, args: Any, output: Any) -> None:
        inside.pop()
        steps.append(layer_work(layer, args[0], output))

    layers = [layer for layer in module.modules() if isinstance(layer, (RVM, SPM))]
    handles = [layer.register_forward_pre_hook(lambda layer, _: inside.append(layer)) for layer in layers]
    handles += [layer.register_forward_hook(leave) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
