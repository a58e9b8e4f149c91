"""Rooflines against numbers computed by hand."""

from __future__ import annotations

import pytest
import torch

from lightm import ops
from lightm.lab.bench.cases import chunked_scan, operator_work
from lightm.lab.bench.roofline import Throughput, Work, count_steps, layer_work, roofline_seconds, state_space_work
from lightm.nets import create
from lightm.nets.blocks import RVM, SPM
from lightm.nets.state_space import VSS2


def test_the_roofline_of_a_step_is_the_slower_of_memory_and_arithmetic_and_steps_add_up() -> None:
    peak = Throughput(matmul=50.0, registers=100.0, bytes=10.0, exps=20.0, updates=1.0)
    by_memory = Work(read=30, written=10, flops=100, exps=20)  # 4 s against 1 s + 1 s
    by_arithmetic = Work(read=5, written=5, flops=300, exps=40)  # 1 s against 3 s + 2 s
    assert roofline_seconds([by_memory], peak) == pytest.approx(4)
    assert roofline_seconds([by_memory, by_arithmetic], peak) == pytest.approx(9)
    assert roofline_seconds([], peak) == 0


def test_a_backward_pass_reads_and_writes_what_it_must() -> None:
    assert Work(read=3, written=2, flops=5, exps=7).with_backward() == Work(read=8, written=5, flops=15, exps=14)


@pytest.mark.parametrize("tokens", [64, 96, 256])
def test_the_chunked_baseline_is_the_selective_scan(tokens: int) -> None:
    torch.manual_seed(0)
    shapes = ((2, tokens, 8), (2, tokens, 8), (8, 4), (2, tokens, 4), (2, tokens, 4), (8,), (8,))
    u, delta, A, B, C, skip, bias = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    leaves = [x.requires_grad_() for x in (u, 3 * delta, -3 * A.abs(), B, C, skip, bias)]
    u, delta, A, B, C, skip, bias = leaves
    expected = ops.selective_scan(
        u, delta, A, B, C, d_skip=skip, delta_bias=bias, delta_softplus=True, impl="reference"
    )  # fmt: skip
    found = chunked_scan(*leaves)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(expected)
    gradients = (torch.autograd.grad(y, leaves, weight) for y in (found, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_work_of_the_scan() -> None:
    # 4^3 = 64 tokens of E = 64 channels and N = 16 states: u and delta in, B and C in, y out
    forward, backward = operator_work("selective_scan", 4)
    assert forward == Work(64 * 4 * (128 + 32), 64 * 4 * 64, 64 * 6 * 1024, 64 * (1024 + 64))
    # u, delta, dy, B, C in; du, ddelta, dB, dC out
    assert (backward.read, backward.written) == (64 * 4 * (192 + 32), 64 * 4 * (128 + 32))
    longer, _ = operator_work("selective_scan_long", 32)
    assert longer.exps == 32768 * 1024
    capped, _ = operator_work("selective_scan", 32)
    assert capped.exps == 4096 * (1024 + 64)


@pytest.mark.parametrize(
    ("name", "forward", "both"),
    [
        # floats a voxel of 32 channels (64 for the operators on tokens)
        ("causal_conv1d", 2 * 64, 5 * 64),
        ("gated_norm", 3 * 64, 8 * 64),
        ("depthwise_conv", 2 * 32, 5 * 32),
        ("group_norm_relu", 3 * 32, 8 * 32),
        ("max_pool2", 36, 36 + 68),
        ("upsample_linear2", 9 * 32, 18 * 32),
    ],
)
def test_bytes_of_the_operators(name: str, forward: int, both: int) -> None:
    first, second = operator_work(name, 2)
    assert first.bytes == 8 * 4 * forward
    assert first.bytes + second.bytes == 8 * 4 * both


def test_work_of_the_layers() -> None:
    x = torch.zeros(1, 2, 2, 2, 32)
    # linear maps: in 32 x 128, x 64 x 34, dt 2 x 64, out 64 x 32, projection 32 x 32; scan 6 E N; 4 kernel
    rvm = layer_work(RVM(32, 32), x, x)
    assert rvm.flops == 8 * (2 * (4096 + 2176 + 128 + 2048 + 1024) + 6 * 64 * 16 + 2 * 4 * 64)
    assert rvm.exps == 8 * (64 * 16 + 3 * 64)
    assert rvm.bytes == 2 * 4 * x.numel()
    # four parts: in 8 x 32, x 16 x 33, dt 1 x 16, out 16 x 8 each; one projection 32 x 32
    spm = layer_work(SPM(32, 32), x, x)
    assert spm.flops == 8 * (2 * (4 * (256 + 528 + 16 + 128) + 1024) + 6 * 64 * 16 + 2 * 4 * 64)
    assert spm.exps == rvm.exps
    assert layer_work(SPM(32, 32, shared=True), x, x) == spm


def test_work_of_other_scan_orders_and_cores() -> None:
    x = torch.zeros(1, 2, 2, 2, 32)
    once, thrice = (layer_work(RVM(32, 32, scan=scan), x, x) for scan in ("raster", "axes"))
    projection = 8 * 2 * 1024  # runs once, whatever the order
    assert thrice.flops - projection == 3 * (once.flops - projection)
    assert thrice.exps == 3 * once.exps
    # Mamba-2: E = 64 channels in heads of 16, N = 16; one decay and one step a head, a convolution over E + 2 N
    core = state_space_work(VSS2(32, head_dim=16))
    assert core.exps == 4 + 4 + (64 + 32) + 64
    assert core.flops == 6 * 64 * 16 + 2 * 4 * (64 + 32)


def test_a_layer_counts_as_one_step() -> None:
    layer, x = RVM(16, 32), torch.zeros(1, 4, 4, 4, 16)
    (step,) = count_steps(layer, lambda: layer(x))
    assert step == layer_work(layer, x, layer(x))


def test_steps_of_a_convolution_and_a_matmul() -> None:
    net = torch.nn.Sequential(torch.nn.Conv3d(2, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(2))
    x = torch.zeros(1, 2, 8, 8, 8)
    (conv,) = count_steps(net, lambda: net(x))
    assert conv.flops == 2 * 27 * 2 * 4 * 512
    assert (conv.read, conv.written) == (4 * (2 * 512 + 27 * 2 * 4 + 4), 4 * 4 * 512)
    linear = torch.nn.Linear(8, 16)
    (product,) = count_steps(linear, lambda: linear(torch.zeros(5, 8)))
    assert product.flops == 2 * 5 * 8 * 16
    assert product.written == 4 * 5 * 16


def test_exponentials_of_a_whole_network() -> None:
    network = create("lightm-unet", 3, 1, 3).eval()
    steps = count_steps(network, lambda: network(torch.zeros(1, 1, 16, 16, 16)))
    # layers of width C at each resolution: E = 2 C channels, N + 3 exponentials a channel
    layers = [(32, 16**3, 1), (64, 8**3, 2), (128, 4**3, 2), (256, 2**3, 4)]
    assert sum(step.exps for step in steps) == sum(n * tokens * 2 * c * 19 for c, tokens, n in layers)
    assert sum(step.flops for step in steps) > 0
