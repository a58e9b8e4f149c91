"""Time the Triton scan on a GPU against a plain PyTorch chunked scan, alternating in one process.

    python benchmarks/triton_scan.py > scan_gpu.md
    TRITON_INTERPRET=1 python benchmarks/triton_scan.py      without a GPU: tiny sizes, times mean nothing

Prints a Markdown table: medians in ms, GB/s of the bytes that the scan must at least move (inputs read once, results
written once; a copy's GB/s on the same machine is in the first line), and how many times faster the kernels are.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lightm.ops import selective_scan

Call = Callable[[], object]


def chunked_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor, chunk: int = 64) -> Tensor:
    """The scan in plain PyTorch: all chunks step side by side from a zero state, then the carried states are added."""
    batch, length, channels = u.shape
    pad = -length % chunk
    dt = F.softplus(delta)
    x, dt, b, c = (F.pad(part, (0, 0, 0, pad)).unflatten(1, (-1, chunk)) for part in (u, dt, B, C))
    h = u.new_zeros(batch, x.shape[1], channels, A.shape[1])
    rows = []
    for x_t, dt_t, b_t, c_t in zip(*(part.unbind(2) for part in (x, dt, b, c)), strict=True):
        h = torch.exp(dt_t.unsqueeze(-1) * A) * h + (dt_t * x_t).unsqueeze(-1) * b_t.unsqueeze(2)
        rows.append((h * c_t.unsqueeze(2)).sum(-1))
    since = dt.cumsum(2)  # (Bt, chunks, chunk, E): the decay from the chunk's start is exp(A * since)
    state = torch.zeros_like(h[:, 0])
    begins = []
    for end, total in zip(h.unbind(1), since[:, :, -1].unbind(1), strict=True):
        begins.append(state)
        state = torch.exp(total.unsqueeze(-1) * A) * state + end
    begin = torch.stack(begins, dim=1)
    carried = [
        (torch.exp(since_t.unsqueeze(-1) * A) * begin * c_t.unsqueeze(2)).sum(-1)
        for since_t, c_t in zip(since.unbind(2), c.unbind(2), strict=True)
    ]
    y = (torch.stack(rows, dim=2) + torch.stack(carried, dim=2)).flatten(1, 2)[:, :length]
    return y * F.silu(z)


def milliseconds(call: Call, on_gpu: bool) -> float:
    """Time of one call, on the GPU by its own clock."""
    if not on_gpu:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def medians(calls: tuple[Call, ...], on_gpu: bool, runs: int) -> list[float]:
    """Median ms of each, run in turn after one round that compiles."""
    for call in calls:
        call()
    rounds = [[milliseconds(call, on_gpu) for call in calls] for _ in range(runs)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def case(sizes: tuple[int, int, int, int], dtype: torch.dtype, device: str, runs: int) -> None:
    """Print the rows of one size: forward, and forward + backward."""
    batch, length, channels, states = sizes
    on_gpu = device == "cuda"
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype).requires_grad_()

    u, z, delta = (leaf(batch, length, channels) for _ in range(3))
    B, C = (leaf(batch, length, states) for _ in range(2))
    A = (-torch.rand(channels, states, generator=generator) * 4 - 0.1).to(device).requires_grad_()
    dy = leaf(batch, length, channels).detach()
    leaves = [u, delta, A, B, C, z]

    def ours() -> Tensor:
        return selective_scan(u, delta, A, B, C, z=z, delta_softplus=True, impl="triton")

    def theirs() -> Tensor:
        return chunked_scan(u.float(), delta.float(), A, B.float(), C.float(), z.float()).to(dtype)

    with torch.no_grad():
        error = ((ours().float() - theirs().float()).norm() / theirs().float().norm()).item()
    size = dy.element_size()
    rows, shared = batch * length * channels * size, batch * length * states * size
    least = {"forward": 4 * rows + 2 * shared, "forward + backward": 11 * rows + 6 * shared}
    for kind, moved in least.items():
        backward = kind != "forward"

        def step(scan: Callable[[], Tensor], backward: bool = backward) -> Call:
            def call() -> object:
                with torch.set_grad_enabled(backward):
                    y = scan()
                return torch.autograd.grad(y, leaves, dy) if backward else y

            return call

        fast, plain = medians((step(ours), step(theirs)), on_gpu, runs)
        name = f"{'x'.join(map(str, sizes))} {str(dtype).removeprefix('torch.')}"
        print(
            f"| {name} | {kind} | {fast:.3f} | {moved / fast / 1e6:.1f} | {plain:.3f} | {plain / fast:.1f} "
            f"| {error:.1e} |",
            flush=True,
        )


def main() -> None:
    """Run all sizes, or tiny ones in the interpreter."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("no GPU was found; set TRITON_INTERPRET=1 to run tiny sizes in Triton's interpreter")
    device = "cuda" if on_gpu else "cpu"
    block = torch.empty(2**28 if on_gpu else 2**22, device=device)
    (copy,) = medians((lambda: block.clone(),), on_gpu, 5)
    where = torch.cuda.get_device_name() if on_gpu else "the CPU, in Triton's interpreter: times mean nothing"
    print(f"On {where}; a copy moves {2 * block.numel() * 4 / copy / 1e6:.0f} GB/s; PyTorch {torch.__version__}.\n")
    print("| batch x tokens x channels x states | pass | ms | GB/s | plain chunked ms | times faster | difference |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    if on_gpu:
        for length in (4096, 32768, 262144):
            for dtype in (torch.float32, torch.bfloat16):
                case((1, length, 64, 16), dtype, device, 20)
        case((2, 32768, 256, 16), torch.float32, device, 20)
    else:
        case((1, 35, 8, 4), torch.float32, device, 1)


if __name__ == "__main__":
    main()
