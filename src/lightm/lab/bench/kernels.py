"""Bare loops that show what the processor can do: multiply-adds, exponentials, and the state updates of a scan.

Arguments are integers: addresses of float32 data and counts. Import this module only to measure: it loads Numba.
"""

from __future__ import annotations

from typing import Any

import torch

from lightm.ops.bounds import Extent, address, rows
from lightm.ops.jit import LANES, kernel
from lightm.ops.scan.step import advance
from lightm.ops.threads import parallel_for
from lightm.ops.vector import fma, load, load_rows, store
from lightm.ops.vector_math import LOG2E, exp2

STATES = 16
_ROW = 4 * LANES
CHAINS = 12  # enough of them to hide the latency of a multiply-add, few enough to stay in registers


@kernel(lambda source, target, rounds: {"source": (0, 2 * _ROW), "target": (0, _ROW)})
def multiply_adds(source, target, rounds):  # type: ignore[no-untyped-def]
    """CHAINS independent chains s = s * x + y of `rounds` multiply-adds; x and y are two vectors at `source`."""
    x = load(source, LANES)
    y = load(source + _ROW, LANES)
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = s8 = s9 = s10 = s11 = y
    for _ in range(rounds):
        s0 = fma(s0, x, y)
        s1 = fma(s1, x, y)
        s2 = fma(s2, x, y)
        s3 = fma(s3, x, y)
        s4 = fma(s4, x, y)
        s5 = fma(s5, x, y)
        s6 = fma(s6, x, y)
        s7 = fma(s7, x, y)
        s8 = fma(s8, x, y)
        s9 = fma(s9, x, y)
        s10 = fma(s10, x, y)
        s11 = fma(s11, x, y)
    for s in (s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11):
        store(target, load(target, LANES) + s)


@kernel(lambda source, target, rows, rounds: {"source": (0, rows * _ROW), "target": (0, rows * _ROW)})
def exponentials(source, target, rows, rounds):  # type: ignore[no-untyped-def]
    """target = 2^source for `rows` vectors, `rounds` times over."""
    for _ in range(rounds):
        for row in range(rows):
            store(target + row * _ROW, exp2(load(source + row * _ROW, LANES)))


def _scan_extents(
    u: int, dt: int, step: int, a: int, b: int, c: int, y: int, state: int, tokens: int
) -> dict[str, Extent]:
    tile, numbers, states = rows(0, tokens, step, _ROW), (0, 4 * STATES * tokens), (0, STATES * _ROW)
    return {"u": tile, "dt": tile, "a": states, "b": numbers, "c": numbers, "y": tile, "state": states}


@kernel(_scan_extents)
def bare_scan(u, dt, step, a, b, c, y, state, tokens):  # type: ignore[no-untyped-def]
    """One tile of channels: h = exp2(dt * a) * h + dt * u * b; y = sum of h * c. No softplus, skip or gate.

    u, dt, y: rows of LANES channels, `step` bytes apart; a, state: STATES rows; b, c: STATES numbers per token.
    """
    h = load_rows(state, STATES, LANES)
    for t in range(tokens):
        d = load(dt + t * step, LANES)
        h, total = advance(h, d, d * load(u + t * step, LANES), a, b + t * (4 * STATES), c + t * (4 * STATES))
        store(y + t * step, total)


class BareScan:
    """The bare scan over (1, tokens, channels) with 16 states; `run` writes `y`."""

    def __init__(self, tokens: int, channels: int) -> None:
        if channels % LANES:
            raise ValueError(f"bare scan: {channels} channels, expected a multiple of {LANES}")
        self.tokens, self.channels = tokens, channels
        self.u, self.dt = torch.randn(tokens, channels), torch.rand(tokens, channels) * 0.1
        self.b, self.c = torch.randn(tokens, STATES), torch.randn(tokens, STATES)
        rates = -torch.arange(1, STATES + 1, dtype=torch.float32) * LOG2E
        self.a = rates[:, None].expand(STATES, LANES).contiguous()
        self.state = torch.zeros(STATES, LANES)
        self.y = torch.empty(tokens, channels)

    def run(self) -> torch.Tensor:
        def work(tile: int, worker: int) -> None:
            at = tile * _ROW
            bare_scan(
                address(self.u) + at,
                address(self.dt) + at,
                4 * self.channels,
                address(self.a),
                address(self.b),
                address(self.c),
                address(self.y) + at,
                address(self.state),
                self.tokens,
            )

        parallel_for(work, self.channels // LANES)
        return self.y


def multiply_add_batch(workers: int, rounds: int = 2_000_000) -> tuple[Any, int]:
    """A call that multiplies and adds in registers on every thread, and its FLOPs (2 a multiply-add)."""
    source = torch.full((2, LANES), 0.5)
    target = torch.zeros(workers, LANES)

    def work(item: int, worker: int) -> None:
        multiply_adds(address(source), address(target[item]), rounds)

    return lambda: parallel_for(work, workers), 2 * workers * CHAINS * LANES * rounds


def exponential_batch(workers: int, rows: int = 128, rounds: int = 4000) -> tuple[Any, int]:
    """A call that takes exponentials on every thread from and to its first-level cache, and how many it takes."""
    source = torch.randn(workers, rows * LANES)
    target = torch.empty_like(source)

    def work(item: int, worker: int) -> None:
        exponentials(address(source[item]), address(target[item]), rows, rounds)

    return lambda: parallel_for(work, workers), workers * rows * LANES * rounds
