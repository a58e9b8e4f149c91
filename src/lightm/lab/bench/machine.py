"""What this machine is and what it can do at most, measured in the same run as the cases."""

from __future__ import annotations

import dataclasses
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from lightm import __version__


@dataclass(frozen=True)
class Limits:
    """The fastest rates seen, a second: FLOPs of a large float32 matmul and of multiply-adds in registers (a
    multiply-add is 2), bytes of a large copy (reads and writes counted), exponentials from and to the first-level
    cache, and state updates (tokens x channels x states) of a bare scan loop."""

    matmul: float
    registers: float
    bytes: float
    exps: float
    updates: float

    @property
    def flops(self) -> float:
        """The rate that rooflines are counted with: libraries do not reach the registers' on every processor."""
        return max(self.matmul, self.registers)

    def best(self, other: Limits) -> Limits:
        """The larger of each rate."""
        return Limits(*map(max, dataclasses.astuple(self), dataclasses.astuple(other)))

    def describe(self) -> str:
        return (
            f"matmul {self.matmul / 1e9:.0f} GFLOP/s, multiply-adds in registers {self.registers / 1e9:.0f} "
            f"GFLOP/s, copy {self.bytes / 1e9:.1f} GB/s, {self.exps / 1e9:.2f} G exponentials/s, "
            f"bare scan {self.updates / 1e9:.2f} G state updates/s"
        )


def measure_limits(runs: int = 5, *, small: bool = False) -> Limits:
    """Measure the rates: each the fastest of `runs` after a warm-up, about 2 seconds and 0.6 GB.

    A limit is what the machine can do when nothing disturbs it, so the fastest run counts. `small` measures on less
    data (for tests): rates are then of the caches.
    """
    import torch

    from lightm.lab.bench.kernels import STATES, BareScan, exponential_batch, multiply_add_batch
    from lightm.lab.bench.measure import best_seconds

    def matmul_rate(edge: int) -> float:
        a, b, out = torch.randn(edge, edge), torch.randn(edge, edge), torch.empty(edge, edge)
        return 2 * edge**3 / best_seconds(lambda: torch.mm(a, b, out=out), runs)

    def copy_rate(floats: int) -> float:
        source = torch.ones(floats)
        target = torch.empty_like(source)
        return 2 * 4 * floats / best_seconds(lambda: target.copy_(source), runs)

    with torch.no_grad():
        threads = torch.get_num_threads()
        matmul = matmul_rate(256 if small else 2048)
        moved = copy_rate(1 << (20 if small else 26))
        chains, flops = multiply_add_batch(threads, rounds=20_000 if small else 2_000_000)
        call, count = exponential_batch(threads, rounds=100 if small else 4000)
        scan = BareScan(1024 if small else 65536, 64)
        return Limits(
            matmul,
            flops / best_seconds(chains, runs),
            moved,
            count / best_seconds(call, runs),
            scan.tokens * scan.channels * STATES / best_seconds(scan.run, runs),
        )


def versions() -> dict[str, str]:
    """Versions of what a number depends on: lightm, torch, numba, monai, python."""
    found = {"lightm": __version__}
    for name in ("torch", "numba", "monai"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    found["python"] = platform.python_version()
    return found


def commit() -> str:
    """The commit of the checkout that holds this package, "-dirty" added when its files differ; else "v" + version."""
    folder = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "--no-optional-locks", "-C", str(folder), *words], capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # a package installed into someone else's repository is not tracked there
    if not git("ls-files", "--error-unmatch", "__init__.py"):
        return f"v{__version__}"
    dirty = git("status", "--porcelain", "--", str(folder))
    return f"{git('rev-parse', '--short=12', 'HEAD') or 'v' + __version__}{'-dirty' if dirty else ''}"


def cpu_model() -> str:
    """The processor's name as the system tells it."""
    if sys.platform == "linux":
        try:
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
                if line.lower().startswith("model name"):
                    return line.split(":", 1)[1].strip()
        except OSError:
            pass
    elif sys.platform == "darwin":
        try:
            done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
            if done.returncode == 0:
                return done.stdout.strip()
        except OSError:
            pass
    return platform.processor() or platform.machine()
