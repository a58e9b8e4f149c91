"""Mamba-2's module: its size, its equation written out, sequences cut into pieces, parts, refusals."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightm import ops
from lightm.errors import InputError
from lightm.nets import parameter_groups
from lightm.nets.state_space import VSS2

OPTIONS: list[dict[str, Any]] = [
    {},
    {"inner_norm": False},
    {"head_dim": 8, "state_size": 4, "d_conv": 3},
    {"parts": 2},
    {"parts": 4, "shared": True, "head_dim": 4, "expand": 1},
    {"d_conv": 1, "expand": 3},
]


def make(channels: int = 16, **options: Any) -> VSS2:
    """A module whose parameters are all random, so that none can be forgotten unseen."""
    torch.manual_seed(0)
    module = VSS2(channels, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module


@pytest.mark.parametrize("options", OPTIONS)
def test_parameter_count_equals_the_closed_form(options: dict[str, Any]) -> None:
    defaults = {
        "state_size": 16,
        "expand": 2,
        "d_conv": 4,
        "head_dim": 16,
        "inner_norm": True,
        "parts": 1,
        "shared": False,
    }
    n, expand, k, p, norm, parts, shared = {**defaults, **options}.values()
    c = 32 // parts
    e = expand * c
    h = e // p
    one = c * (2 * e + 2 * n + h) + (e + 2 * n) * (k + 1) + 3 * h + e * c + (2 * e if norm else 0)
    count = sum(parameter.numel() for parameter in VSS2(32, **options).parameters())
    assert count == (one if shared else parts * one)


def by_hand(module: VSS2, w: Tensor) -> Tensor:
    """The equation of one part, with plain PyTorch and a loop over the tokens."""
    e, n, p = module.inner, module.state_size, module.head_dim
    z, xbc, dt = F.linear(w, module.in_proj.weight[0]).split((e, e + 2 * n, e // p), dim=-1)
    d_conv = module.conv_weight.shape[-1]
    padded = F.pad(xbc.mT, (d_conv - 1, 0))
    xbc = F.silu(F.conv1d(padded, module.conv_weight[0].unsqueeze(1), module.conv_bias[0], groups=e + 2 * n)).mT
    x, b, c = xbc.split((e, n, n), dim=-1)
    dt = F.softplus(dt + module.dt_bias[0])
    decay = torch.exp(-dt * module.A_log[0].exp())
    h, ys = torch.zeros(w.shape[0], e // p, p, n, dtype=w.dtype), []
    for t in range(w.shape[1]):
        heads = x[:, t].unflatten(-1, (-1, p))
        h = h * decay[:, t, :, None, None] + torch.einsum("bh,bhp,bn->bhpn", dt[:, t], heads, b[:, t])
        y = torch.einsum("bhpn,bn->bhp", h, c[:, t]) + module.d_skip[0, :, None] * heads
        ys.append(y.flatten(1))
    y = torch.stack(ys, dim=1)
    if module.norm_weight is not None and module.norm_bias is not None:
        y = F.layer_norm(y, (e,), module.norm_weight[0], module.norm_bias[0])
    return F.linear(y * F.silu(z), module.out_proj.weight[0])


@pytest.mark.parametrize("options", [option for option in OPTIONS if "parts" not in option])
def test_is_its_equation(options: dict[str, Any]) -> None:
    module = make(**options)
    w = torch.randn(2, 70, 16)
    expected = by_hand(make(**options).double(), w.double())
    torch.testing.assert_close(module.double()(w.double()), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(module.float()(w).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("inner_norm", [False, True])
def test_parts_are_modules_side_by_side(shared: bool, inner_norm: bool) -> None:
    together = make(48, parts=3, shared=shared, inner_norm=inner_norm)
    w = torch.randn(1, 20, 48)
    outs = []
    for i, own in enumerate(w.split(16, dim=-1)):
        alone = VSS2(16, inner_norm=inner_norm)
        weights = {name: x[:1] if shared else x[i : i + 1] for name, x in together.state_dict().items()}
        alone.load_state_dict(weights)
        outs.append(alone(own))
    torch.testing.assert_close(together(w), torch.cat(outs, dim=-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
def test_overlapping_pieces_are_the_whole(options: dict[str, Any]) -> None:
    module = make(**{"head_dim": 8, **options}).eval()
    w = torch.randn(2, 80, 16)
    with torch.no_grad():
        whole, last = module(w, return_state=True)
        state, outs = None, []
        for first, stop in ((0, 1), (1, 3), (3, 53), (53, 80)):  # shorter and longer than the convolution's reach
            halo = min(module.d_conv - 1, first)
            out, state = module(w[:, first - halo : stop], state, halo=halo, return_state=True)
            outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=1), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-6)


def test_gradients_flow_through_the_state() -> None:
    module = make(head_dim=8)
    w = torch.randn(1, 40, 16)

    def gradients(ends: list[int]) -> dict[str, Tensor]:
        module.zero_grad()
        state, total = None, torch.zeros(())
        for first, stop in itertools.pairwise([0, *ends]):
            halo = min(module.d_conv - 1, first)
            out, state = module(w[:, first - halo : stop], state, halo=halo, return_state=True)
            total = total + out.square().sum()
        total.backward()
        return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}

    whole, cut = gradients([40]), gradients([17, 19, 40])
    assert whole.keys() == cut.keys() == dict(module.named_parameters()).keys()
    for name, grad in whole.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(cut[name], grad, rtol=1e-3, atol=1e-4, msg=name)


def test_start_is_mambas() -> None:
    torch.manual_seed(1)
    module = VSS2(512, head_dim=4)
    rates = module.A_log.exp()
    assert rates.min() >= 1
    assert rates.max() <= 16
    assert rates.mean().item() == pytest.approx(8.5, rel=0.1)  # uniform, not its logarithm
    dt = F.softplus(module.dt_bias)
    assert dt.min() >= 1e-3 * 0.999
    assert dt.max() <= 1e-1 * 1.001
    assert dt.log().mean().item() == pytest.approx(math.log(1e-2), rel=0.05)
    assert torch.equal(module.d_skip, torch.ones(1, 256))


def test_what_weight_decay_leaves_alone() -> None:
    module = VSS2(16)
    rest = {id(parameter) for parameter in parameter_groups(module, 0.1)[1]["params"]}
    left = {name for name, parameter in module.named_parameters() if id(parameter) in rest}
    assert left == {"A_log", "conv_weight", "conv_bias", "dt_bias", "d_skip", "norm_weight", "norm_bias"}


def test_runs_on_the_scan_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    original = ops.ssd_scan_with_state

    def spy(u: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(u.shape))
        return original(u, *args, **kwargs)

    monkeypatch.setattr(ops, "ssd_scan_with_state", spy)
    VSS2(32, parts=4)(torch.randn(2, 10, 32))
    assert seen == [(2, 10, 4, 16)]  # one scan for all parts


@pytest.mark.parametrize(
    ("channels", "options", "message"),
    [
        (20, {"parts": 3}, "20 channels are not divisible by 3 parts; use a divisor of 20"),
        (12, {}, r"head_dim 16 does not divide the inner width 24 \(2 \* 12 channels\); use a divisor of 24"),
        (
            32,
            {"parts": 4, "head_dim": 32},
            r"head_dim 32 does not divide the inner width 16 \(2 \* 32 channels / 4 parts",
        ),
        (16, {"head_dim": 0}, "head_dim 0 does not divide"),
    ],
)
def test_refused(channels: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VSS2(channels, **options)
