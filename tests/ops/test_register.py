"""Operators with a backward pass as `differentiable` registers them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightm import ops


def _scan(x: Tensor, weight: Tensor) -> Tensor:
    return ops.selective_scan(x, x.abs(), -weight.abs(), x[..., :2], x[..., 2:4])


def _conv(x: Tensor, weight: Tensor) -> Tensor:
    return ops.causal_conv1d(x, weight)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return ops.group_norm_relu(x, 2, weight[:, 0], weight[:, 1])


@pytest.mark.parametrize("call", [_scan, _conv, _norm])
def test_activation_checkpointing_gives_the_same_gradients(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 9, 6, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    expected = torch.autograd.grad(call(x, weight).square().sum(), (x, weight))
    got = torch.autograd.grad(checkpoint(call, x, weight, use_reentrant=False).square().sum(), (x, weight))
    assert all(map(torch.equal, got, expected))


def test_absent_inputs_have_no_gradient_and_present_ones_their_own_type() -> None:
    x, weight, bias = torch.randn(2, 9, 6), torch.randn(6, 2).bfloat16().requires_grad_(), torch.randn(6)
    with_bias = torch.autograd.grad(ops.causal_conv1d(x, weight, bias.requires_grad_()).sum(), (weight, bias))
    assert [grad.dtype for grad in with_bias] == [torch.bfloat16, torch.float32]
    (alone,) = torch.autograd.grad(ops.causal_conv1d(x, weight).sum(), weight)
    assert torch.equal(alone, with_bias[0])
    empty = torch.ops.lightm.causal_conv1d_backward(x, x, weight.detach(), None, False)[2]
    assert empty.numel() == 0


def test_a_forward_pass_that_kept_nothing_is_named() -> None:
    x = torch.randn(1, 5, 4, requires_grad=True)
    y, _, _ = torch.ops.lightm.selective_scan(
        x, x.abs(), -torch.ones(4, 2), x[:, :, None, :2], x[:, :, None, 2:], None, None, None, False, None, 0
    )
    with pytest.raises(RuntimeError, match="lightm::selective_scan was called with chunk=0"):
        y.sum().backward()
