"""What the state-space modules share: initial values, decay rates, and linear layers by groups of channels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightm import ops
from lightm.nets.intact import fusible

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4


def decay_rates(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), in float32 at least: half precision would round the slow decays away."""
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))


def init_conv(weight: Tensor, bias: Tensor) -> None:
    """Initialise a causal depthwise convolution of kernel size K (last axis) as Mamba does: uniform in 1 / sqrt(K)."""
    bound = 1 / math.sqrt(weight.shape[-1])
    nn.init.uniform_(weight, -bound, bound)
    nn.init.uniform_(bias, -bound, bound)


def init_dt_bias(bias: Tensor) -> None:
    """Initialise dt_proj's bias as Mamba does (section 3.6): softplus(bias) is log-uniform in [1e-3, 1e-1]."""
    log_dt = torch.empty_like(bias).uniform_(math.log(DT_MIN), math.log(DT_MAX))
    dt = log_dt.exp().clamp(min=DT_FLOOR)
    with torch.no_grad():
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


@fusible
class GroupedLinear(nn.Module):
    """A linear layer for each of `parts` groups of channels, giving tensors of `outs` channels a part each.

    (..., parts * fan_in) -> for every out in outs (..., parts * out), the parts one after the other in each. With
    `shared` one weight serves all parts. Parameters: fan_in * sum(outs), times `parts` unless shared.

    Each result is one product with a matrix a part (`ops.linear`): nothing is cut apart or put together.
    """

    def __init__(self, parts: int, fan_in: int, outs: Sequence[int], *, shared: bool) -> None:
        super().__init__()
        self.parts, self.outs = parts, tuple(outs)
        self.weight = nn.Parameter(torch.empty(1 if shared else parts, sum(outs), fan_in))
        nn.init.uniform_(self.weight, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        weight = self.weight.expand(self.parts, -1, -1)
        # a product for each result: the gradients of slices of one product would have to be joined token by token
        return tuple(ops.linear(x, part) for part in weight.split(self.outs, dim=1))
