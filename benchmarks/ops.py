"""Time the operators against plain PyTorch, alternating in one process.

The scan has two baselines: a Python loop over tokens, as Mamba's reference does it, and a chunked scan whose steps
work on many tokens at once, as PyTorch does it best.

    python benchmarks/ops.py > benchmarks/results/ops.md

Prints a Markdown table: medians of both, and the median of the ratios pair by pair. Ratios are what to quote.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import lightm
from lightm import ops
from lightm.lab.bench.cases import chunked_scan

import torch  # isort: skip  (after lightm, which sets how PyTorch's threads wait)
from torch import Tensor  # isort: skip
from torch.nn import functional as F  # isort: skip

Call = Callable[[], Tensor]


def timed(call: Call, grads: list[Tensor] | None) -> float:
    """Seconds of a call, and of its backward pass when there are tensors to differentiate."""
    start = time.perf_counter()
    y = call()
    if grads is not None:
        torch.autograd.grad(y.sum(), grads)
    return time.perf_counter() - start


def compare(name: str, ours: Call, theirs: Call, leaves: tuple[list[Tensor], list[Tensor]], runs: int = 5) -> None:
    """Print two rows, forward and forward + backward: both medians in ms and how many times faster ours is."""
    for backward in (False, True):
        wanted, other = leaves if backward else (None, None)
        with torch.set_grad_enabled(backward):
            timed(ours, wanted)  # compile, and fault the memory in
            timed(theirs, other)
            pairs = [(timed(ours, wanted), timed(theirs, other)) for _ in range(runs)]
        a, b = (statistics.median(side) * 1e3 for side in zip(*pairs, strict=True))
        ratio = statistics.median(two / one for one, two in pairs)
        kind = "forward + backward" if backward else "forward"
        print(f"| {name} | {kind} | {a:.1f} | {b:.1f} | {ratio:.1f} |", flush=True)


def leaf(*shape: int) -> Tensor:
    """A random tensor that takes a gradient."""
    return torch.randn(*shape).requires_grad_()


def scan(tokens: int) -> None:
    """The selective scan against PyTorch: a loop over tokens, and in chunks."""
    u, delta, A = leaf(1, tokens, 64), leaf(1, tokens, 64), (-torch.rand(64, 16) - 0.5).requires_grad_()
    B, C = leaf(1, tokens, 16), leaf(1, tokens, 16)

    skip, bias = leaf(64), leaf(64)
    leaves = [u, delta, A, B, C, skip, bias]

    def call(impl: str) -> Call:
        return lambda: ops.selective_scan(
            u, delta, A, B, C, d_skip=skip, delta_bias=bias, delta_softplus=True, impl=impl
        )  # fmt: skip

    name = f"selective scan, L={tokens}, E=64, N=16"
    compare(f"{name}: loop over tokens", call("cpu"), call("reference"), (leaves, leaves))
    compare(f"{name}: in chunks of 64", call("cpu"), lambda: chunked_scan(*leaves), (leaves, leaves))


def images() -> None:
    """Channels-last kernels against PyTorch's, in PyTorch's own channels-last layout."""
    x, w = leaf(1, 96, 96, 96, 32), leaf(3, 3, 3, 32)
    first = x.detach().movedim(-1, 1).requires_grad_()
    kernel = w.detach().movedim(-1, 0).unsqueeze(1).contiguous().requires_grad_()
    scale, shift = leaf(32), leaf(32)
    cases: list[tuple[str, Call, Call, list[Tensor], list[Tensor]]] = [
        ("depthwise convolution 3^3", lambda: ops.depthwise_conv(x, w),
         lambda: F.conv3d(first, kernel, padding=1, groups=32), [x, w], [first, kernel]),
        ("max pooling", lambda: ops.max_pool2(x), lambda: F.max_pool3d(first, 2), [x], [first]),
        ("average pooling", lambda: ops.avg_pool2(x), lambda: F.avg_pool3d(first, 2), [x], [first]),
        ("GroupNorm and ReLU", lambda: ops.group_norm_relu(x, 8, scale, shift),
         lambda: F.relu(F.group_norm(first, 8, scale, shift)), [x, scale, shift], [first, scale, shift]),
    ]  # fmt: skip
    for name, ours, theirs, our_leaves, their_leaves in cases:
        compare(f"{name}, 96^3 x 32", ours, theirs, (our_leaves, their_leaves))


if __name__ == "__main__":
    torch.manual_seed(0)
    print("# Operators against plain PyTorch\n")
    print(f"`python benchmarks/ops.py`, LightM {lightm.__version__}, torch {torch.__version__}, ", end="")
    print(f"{torch.get_num_threads()} CPU threads, {torch.backends.cpu.get_cpu_capability()}, float32, milliseconds.\n")
    print("| operator | pass | LightM | PyTorch | times faster |\n| --- | --- | --- | --- | --- |")
    scan(4096)
    scan(32768)
    images()
