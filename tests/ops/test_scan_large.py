"""Sizes and distances beyond 2^31."""

from __future__ import annotations

import mmap
import os
import sys

import pytest
import torch
from torch import Tensor

from lightm.ops import selective_scan, selective_scan_with_state

NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which not every Python names: memory that is counted when it is written


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is counted when it is written")
def test_tokens_far_apart() -> None:
    # 5 tokens with 2^29 floats between them: offsets beyond 2^31 elements and 2^33 bytes, of which little is real
    step, tokens = 2**29 + 64, 5
    size = 4 * step * tokens
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    far = torch.frombuffer(memory, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)

    def place(width: int, at: int) -> tuple[Tensor, Tensor]:
        near = torch.rand(1, tokens, width, generator=generator)
        spread = far.as_strided((1, tokens, width), (0, step, 1), at)
        spread.copy_(near)
        return near.requires_grad_(), spread.detach().requires_grad_()

    names = {"u": 16, "delta": 16, "z": 16, "B": 4, "C": 4}
    pairs = {name: place(width, 16 * i) for i, (name, width) in enumerate(names.items())}
    grads = []
    for side in range(2):
        given = {name: pair[side] for name, pair in pairs.items()}
        y = selective_scan(**given, A=-torch.ones(16, 4), impl="cpu")  # type: ignore[call-overload]
        grads.append([y.detach(), *torch.autograd.grad((y * y).sum(), list(given.values()))])
    for near, spread in zip(*grads, strict=True):
        assert torch.equal(near, spread)


@pytest.mark.skipif("LIGHTM_LARGE_TESTS" not in os.environ, reason="LIGHTM_LARGE_TESTS is not set (minutes, 5 GB)")
def test_more_than_2_to_the_31_elements() -> None:
    tokens = 2**27 + 5  # times 16 channels
    value = torch.arange(1.0, 17.0, dtype=torch.float16)
    u = value.expand(1, tokens, 16)
    half = torch.full((1,), 0.5, dtype=torch.float16).expand(1, tokens, 16)
    ones = torch.ones(1, dtype=torch.float16).expand(1, tokens, 2)
    rate = torch.tensor([[-1.0, -2.0]]).expand(16, 2)
    y, state = selective_scan_with_state(u, half, rate, ones, ones, impl="cpu")
    assert y.numel() > 2**31
    # after k tokens of equal input a state is the geometric sum dt * u * (1 - x^k) / (1 - x), x = exp(dt * A)
    decay = torch.exp(0.5 * rate[0].double())
    settled = (0.5 / (1 - decay)).sum() * value.double()
    torch.testing.assert_close(state[0].double().sum(-1), settled, rtol=1e-5, atol=0)
    torch.testing.assert_close(y[0, 0].double(), value.double(), rtol=1e-3, atol=0)
    expected = y[0, 1000].clone()
    torch.testing.assert_close(expected.double(), settled, rtol=1e-3, atol=0)
    for start in range(1000, tokens, 1 << 20):
        assert (y[0, start : start + (1 << 20)] == expected).all(), start
