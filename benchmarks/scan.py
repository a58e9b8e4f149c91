"""Time the CPU selective scan against a hand-written loop and against its plain PyTorch reference.

    python benchmarks/scan.py > benchmarks/results/scan.md

Both sides of a row alternate in one process; a row gives both medians and the median of the ratios pair by pair.
The hand-written loop (C++ with AVX-512) is not a part of the project: it is compiled from ../shared/yardstick beside
the project, or from the folder in LIGHTM_SHARED, where that and g++ exist.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import lightm
from lightm.ops import selective_scan
from lightm.ops.scan import cpu
from lightm.ops.scan.inputs import ScanInputs
from lightm.ops.scan.layout import Layout

import torch  # isort: skip  (after lightm, which sets how PyTorch's threads wait)
from torch import Tensor  # isort: skip

YARDSTICK = Path(os.environ.get("LIGHTM_SHARED", Path(__file__).parents[2] / "shared")) / "yardstick/scan_avx512.cpp"
Call = Callable[[], object]


def timed(call: Call) -> float:
    """Seconds of a call, and of letting go of its result."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def row(name: str, ours: Call, other: Call, runs: int) -> None:
    """Print both medians in ms and how many times faster `ours` is."""
    timed(ours), timed(other)  # compile, and fault the memory in
    pairs = [(timed(ours), timed(other)) for _ in range(runs)]
    a, b = (statistics.median(side) * 1e3 for side in zip(*pairs, strict=True))
    ratio = statistics.median(two / one for one, two in pairs)
    print(f"| {name} | {a:.3g} | {b:.3g} | {ratio:.3g} |", flush=True)


def inputs(tokens: int, channels: int = 64, groups: int = 1, states: int = 16) -> list[Tensor]:
    """u, delta (softplus already applied), A, B, C of one sequence."""
    shared = (1, tokens, groups, states)
    steps = torch.nn.functional.softplus(torch.randn(1, tokens, channels) - 4)
    rates = -torch.arange(1.0, states + 1).repeat(channels, 1)
    return [torch.randn(1, tokens, channels), steps, rates, torch.randn(shared), torch.randn(shared)]


def yardstick() -> Callable[..., None] | None:
    """The hand-written loop, or None (and a line that says why)."""
    if (
        not YARDSTICK.is_file()
        or shutil.which("g++") is None
        or "avx512" not in torch.backends.cpu.get_cpu_capability().lower()
    ):
        print("\nThe hand-written loop is left out: it needs the file scan_avx512.cpp, g++ and AVX-512.\n")
        return None
    library = Path(tempfile.mkdtemp()) / "scan.so"
    command = ["g++", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", str(YARDSTICK), "-o", str(library)]
    subprocess.run(command, check=True)
    function = ctypes.CDLL(str(library)).scan_forward

    def run(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, y: Tensor) -> None:
        addresses = [ctypes.c_void_p(x.data_ptr()) for x in (u, delta, a, b, c, y)]
        function(*addresses, ctypes.c_int64(u.shape[1]), ctypes.c_int64(u.shape[2]))

    return run


def by_hand() -> None:
    """Forward without softplus, gate and skip; the hand-written loop writes into the same memory every time."""
    loop = yardstick()
    if loop is None:
        return
    head("hand-written loop")
    for tokens, runs in ((1000, 301), (4096, 101), (32768, 31), (262144, 21)):
        given = inputs(tokens)
        a = (given[2].T * 1.4426950408889634).contiguous()
        y = torch.empty_like(given[0])
        expected = selective_scan(*given)
        loop(given[0], given[1], a, given[3], given[4], y)
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)
        row(
            f"L={tokens}, E=64, N=16",
            lambda given=given: selective_scan(*given),  # type: ignore[misc]
            lambda given=given, a=a, y=y: loop(given[0], given[1], a, given[3], given[4], y),  # type: ignore[misc]
            runs,
        )


def reference() -> None:
    """Forward, and forward + backward, against the reference with autograd."""
    head("PyTorch reference")
    for tokens, runs in ((1000, 5), (4096, 5), (16384, 3)):
        given = inputs(tokens)
        leaves = [x.clone().requires_grad_() for x in given]

        def forward(impl: str, given: list[Tensor] = given) -> Call:
            return lambda: selective_scan(*given, delta_softplus=True, impl=impl)

        def both(impl: str, leaves: list[Tensor] = leaves) -> Call:
            return lambda: torch.autograd.grad(selective_scan(*leaves, delta_softplus=True, impl=impl).sum(), leaves)

        row(f"forward, L={tokens}, E=64, N=16", forward("cpu"), forward("reference"), runs)
        if tokens < 10000:
            row(f"forward + backward, L={tokens}, E=64, N=16", both("cpu"), both("reference"), runs)


def layouts() -> None:
    """What sharing a tile between two groups, and cutting the tokens, save."""
    head("the same without")
    given = inputs(65536, channels=32, groups=4)
    leaves = [x.clone().requires_grad_() for x in given]

    def both() -> object:
        return torch.autograd.grad(selective_scan(*leaves).sum(), leaves)

    def alone(inputs: ScanInputs) -> Layout:
        return Layout(*inputs.u.shape, *inputs.B.shape[2:])

    def apart(call: Call) -> Call:
        def run() -> object:
            with mock.patch.object(cpu, "layout_of", alone):
                return call()

        return run

    def forward() -> object:
        return selective_scan(*given)

    row("two groups of 8 channels in a tile, E=32, L=65536, forward", forward, apart(forward), 15)
    row("the same, forward + backward", both, apart(both), 9)
    one_tile = inputs(262144, channels=16)

    def uncut() -> object:
        with mock.patch.object(cpu, "part_count", return_value=1):
            return selective_scan(*one_tile)

    row("tokens cut into parts, E=16, L=262144, forward", lambda: selective_scan(*one_tile), uncut, 15)


def head(other: str) -> None:
    """Print the head of a table."""
    print(f"\n| case | LightM, ms | {other}, ms | times faster |\n| --- | --- | --- | --- |")


def short() -> None:
    """What a call costs beside the kernels."""
    print("\n| short sequences, E=64, N=16 | a call, us |\n| --- | --- |")
    for tokens in (1, 64, 256, 1000):
        given = inputs(tokens)
        call = statistics.median(timed(lambda given=given: selective_scan(*given)) for _ in range(301))  # type: ignore[misc]
        print(f"| L={tokens} | {call * 1e6:.0f} |", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    print("# The selective scan on the CPU\n")
    print(f"`python benchmarks/scan.py`, LightM {lightm.__version__}, torch {torch.__version__}, ", end="")
    print(f"{torch.get_num_threads()} CPU threads, {torch.backends.cpu.get_cpu_capability()}, float32, batch 1.")
    with torch.no_grad():
        by_hand()
        short()
    reference()
    layouts()
