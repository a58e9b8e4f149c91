"""State-space modules: VSS (Mamba), several narrow ones side by side, and VSS2 (Mamba-2).

Glossary (code: symbol, source). B images of L = Z*Y*X tokens in raster order, (B, L, C).

=============  ==========================================  ===================================
code           symbol                                      source
=============  ==========================================  ===================================
channels       C, width of a layer's input                 LightM-UNet, arXiv 2403.05246
inner          E = expand * C, width inside the VSS        Mamba, arXiv 2312.00752, section 3.4
state_size     N, states per channel                       Mamba, section 3.2
dt_rank        R = ceil(C / 16)                            Mamba, section 3.6
d_conv         K, kernel size of the causal convolution    Mamba, figure 3
head_dim       P, channels per head                        Mamba-2, arXiv 2405.21060, section 2
heads          H = E / P, heads per part                   Mamba-2, section 2
=============  ==========================================  ===================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightm import ops
from lightm.errors import InputError
from lightm.nets.execution import fusible, intact, linear

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
    """A linear layer for each of `parts` groups of channels, giving tensors of `outs` channels per part each.

    (..., parts * fan_in) -> for every out in outs (..., parts * out), the parts one after the other in each. With
    `shared` one weight serves all parts. Parameters: fan_in * sum(outs), times `parts` unless shared.
    """

    def __init__(self, parts: int, fan_in: int, outs: Sequence[int], *, shared: bool) -> None:
        super().__init__()
        self.parts, self.outs = parts, tuple(outs)
        self.weight = nn.Parameter(torch.empty(1 if shared else parts, sum(outs), fan_in))
        nn.init.uniform_(self.weight, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        weight = self.weight.expand(self.parts, -1, -1)
        # one matmul per result: the gradients of slices of a single one would have to be joined token by token
        return tuple(ops.linear(x, part) for part in weight.split(self.outs, dim=1))


@fusible
class VSS(nn.Module):
    """State-space module: out = Linear(LayerNorm(SSM(SiLU(DWConv(Linear(W))))) * SiLU(Linear(W))).

    Source: LightM-UNet, Eq. 3; the released code has no LayerNorm after the SSM (`inner_norm=False`), and then
    this is Mamba's layer (arXiv 2312.00752, figure 3). The DWConv is Mamba's causal convolution over tokens.
    (B, L, C) -> (B, L, C). Time and memory grow linearly with L.
    """

    no_decay = ("A_log", "conv_weight")

    def __init__(
        self,
        channels: int,
        *,
        state_size: int = 16,
        expand: int = 2,
        d_conv: int = 4,
        dt_rank: int | None = None,
        inner_norm: bool = True,
    ) -> None:
        super().__init__()
        inner = expand * channels
        self.inner = self.inner_total = inner
        self.state_size, self.d_conv = state_size, d_conv
        self.dt_rank = math.ceil(channels / 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(channels, 2 * inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(inner, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(inner))
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, state_size + 1, dtype=torch.float32)).repeat(inner, 1))
        self.d_skip = nn.Parameter(torch.ones(inner))
        self.norm = nn.LayerNorm(inner) if inner_norm else None
        self.out_proj = nn.Linear(inner, channels, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        init_conv(self.conv_weight, self.conv_bias)
        init_dt_bias(self.dt_proj.bias)

    def forward(
        self, w: Tensor, state: Tensor | None = None, *, halo: int = 0, return_state: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, halo + L, C) -> (B, L, C); the first `halo` tokens are seen by the convolution only.

        With `state` (B, E, N) the scan goes on from there; with `return_state` the last state comes too.
        """
        if intact(self.in_proj):  # with two matmuls instead of one their gradients need not be joined
            in_x, in_z = self.in_proj.weight.chunk(2)
            x, z = ops.linear(w, in_x), ops.linear(w[:, halo:], in_z)  # (B, halo + L, E), (B, L, E)
        else:
            x, z = self.in_proj(w).chunk(2, dim=-1)
            z = z[:, halo:]
        u = ops.causal_conv1d(x, self.conv_weight, self.conv_bias, activation="silu")[:, halo:]
        sizes = [self.dt_rank, self.state_size, self.state_size]
        if intact(self.x_proj):
            low, B, C = (ops.linear(u, weight) for weight in self.x_proj.weight.split(sizes))
        else:
            low, B, C = self.x_proj(u).split(sizes, dim=-1)
        # an intact dt_proj leaves its bias to the scan, which adds it before its softplus
        plain = intact(self.dt_proj)
        y, end = ops.selective_scan_with_state(
            u,
            ops.linear(low, self.dt_proj.weight) if plain else self.dt_proj(low),
            decay_rates(self.A_log),
            B,
            C,
            d_skip=self.d_skip,
            z=z if self.norm is None else None,
            delta_bias=self.dt_proj.bias if plain else None,
            delta_softplus=True,
            initial_state=state,
        )
        if self.norm is not None:
            if intact(self.norm):
                y = ops.gated_norm(y, z, self.norm.weight, self.norm.bias, eps=self.norm.eps)
            else:
                y = self.norm(y) * functional.silu(z)
        out = linear(self.out_proj, y)
        return (out, end) if return_state else out

    def layer_tensors(self) -> dict[str, Any]:
        """This module's part of `ops.LayerParameters`."""
        in_x, in_z = self.in_proj.weight.chunk(2)
        low, B, C = self.x_proj.weight.split([self.dt_rank, self.state_size, self.state_size])
        return {
            "in_x": in_x[None],
            "in_z": in_z[None],
            "conv_weight": self.conv_weight,
            "conv_bias": self.conv_bias,
            "to_low": low[None],
            "to_B": B[None],
            "to_C": C[None],
            "to_dt": self.dt_proj.weight[None],
            "dt_bias": self.dt_proj.bias,
            "A": decay_rates(self.A_log),
            "d_skip": self.d_skip,
            "gate_norm": None if self.norm is None else (self.norm.weight, self.norm.bias, self.norm.eps),
            "out": self.out_proj.weight[None],
        }


class _Parts(nn.Module):
    """Several state-space modules on parts of the channels: parameters of (sets, n, ...), one set if shared."""

    no_decay = ("A_log", "conv_weight", "conv_bias", "dt_bias", "d_skip", "norm_weight", "norm_bias")

    def __init__(self, parts: int, inner: int, state_size: int, d_conv: int) -> None:
        super().__init__()
        self.parts, self.inner, self.state_size, self.d_conv = parts, inner, state_size, d_conv
        self.inner_total = parts * inner

    def _all(self, parameter: Tensor) -> Tensor:
        """A parameter of (sets, n, ...) as one of (parts * n, ...): repeated when it is shared."""
        return parameter.expand(self.parts, *parameter.shape[1:]).flatten(0, 1)

    def _add_out(self, sets: int, width: int, inner_norm: bool) -> None:
        self.norm_weight = nn.Parameter(torch.ones(sets, self.inner)) if inner_norm else None
        self.norm_bias = nn.Parameter(torch.zeros(sets, self.inner)) if inner_norm else None
        self.out_proj = GroupedLinear(self.parts, self.inner, (width,), shared=sets < self.parts)

    def _gated_out(self, y: Tensor, z: Tensor) -> Tensor:
        """The output projection of the scan's result, behind the gated norm where there is one."""
        if self.norm_weight is not None and self.norm_bias is not None:
            y = ops.gated_norm(y, z, self._all(self.norm_weight), self._all(self.norm_bias), parts=self.parts)
        (out,) = self.out_proj(y)
        return out


@fusible
class ParallelVSS(_Parts):
    """`parts` VSS modules of width C / parts on the parts of the channels: (B, L, C) -> (B, L, C).

    Source: the report's Figure 3; UltraLight VM-UNet, arXiv 2403.20035. With separate weights in_proj and out_proj
    shrink by `parts`, with `shared` ones by its square. All parts run in one scan, with B and C for each part.
    """

    def __init__(
        self,
        channels: int,
        *,
        parts: int = 4,
        shared: bool = False,
        state_size: int = 16,
        expand: int = 2,
        d_conv: int = 4,
        inner_norm: bool = True,
    ) -> None:
        if channels % parts:
            raise ValueError(f"{channels} channels are not divisible by the {parts} parts of SPM")
        width = channels // parts
        inner, sets = expand * width, 1 if shared else parts
        super().__init__(parts, inner, state_size, d_conv)
        self.dt_rank = math.ceil(width / 16)
        self.in_proj = GroupedLinear(parts, width, (inner, inner), shared=shared)
        self.conv_weight = nn.Parameter(torch.empty(sets, inner, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(sets, inner))
        self.x_proj = GroupedLinear(parts, inner, (self.dt_rank, state_size, state_size), shared=shared)
        self.dt_proj = GroupedLinear(parts, self.dt_rank, (inner,), shared=shared)
        self.dt_bias = nn.Parameter(torch.empty(sets, inner))
        states = torch.arange(1, state_size + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(torch.log(states).repeat(sets, inner, 1))
        self.d_skip = nn.Parameter(torch.ones(sets, inner))
        self._add_out(sets, width, inner_norm)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        init_conv(self.conv_weight, self.conv_bias)
        init_dt_bias(self.dt_bias)

    def forward(
        self, w: Tensor, state: Tensor | None = None, *, halo: int = 0, return_state: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, halo + L, C) -> (B, L, C), as in `VSS`."""
        x, z = self.in_proj(w)  # (B, L, parts * E') each
        z = z[:, halo:]
        u = ops.causal_conv1d(x, self._all(self.conv_weight), self._all(self.conv_bias), activation="silu")[:, halo:]
        low, B, C = self.x_proj(u)
        (delta,) = self.dt_proj(low)
        y, end = ops.selective_scan_with_state(
            u,
            delta,
            decay_rates(self._all(self.A_log)),
            B.unflatten(-1, (self.parts, self.state_size)),
            C.unflatten(-1, (self.parts, self.state_size)),
            d_skip=self._all(self.d_skip),
            z=z if self.norm_weight is None else None,
            delta_bias=self._all(self.dt_bias),
            delta_softplus=True,
            initial_state=state,
        )
        out = self._gated_out(y, z)
        return (out, end) if return_state else out

    def layer_tensors(self) -> dict[str, Any]:
        """This module's part of `ops.LayerParameters`."""

        def parts(weight: Tensor) -> Tensor:
            return weight.expand(self.parts, -1, -1)

        in_x, in_z = parts(self.in_proj.weight).split(self.in_proj.outs, dim=1)
        low, B, C = parts(self.x_proj.weight).split(self.x_proj.outs, dim=1)
        norm = None
        if self.norm_weight is not None and self.norm_bias is not None:
            norm = (self._all(self.norm_weight), self._all(self.norm_bias), 1e-5)
        return {
            "in_x": in_x,
            "in_z": in_z,
            "conv_weight": self._all(self.conv_weight),
            "conv_bias": self._all(self.conv_bias),
            "to_low": low,
            "to_B": B,
            "to_C": C,
            "to_dt": parts(self.dt_proj.weight),
            "dt_bias": self._all(self.dt_bias),
            "A": decay_rates(self._all(self.A_log)),
            "d_skip": self._all(self.d_skip),
            "gate_norm": norm,
            "out": parts(self.out_proj.weight),
        }


@fusible
class VSS2(_Parts):
    """State-space module with Mamba-2's core: z, x, B, C, dt = Linear(W); x, B, C = SiLU(Conv(x, B, C));
    out = Linear(LayerNorm(SSD(x, dt, B, C)) * SiLU(z)).

    One projection of the input gives all, where VSS computes B, C and dt from the convolved x. LayerNorm (left out with
    `inner_norm=False`) and gate are VSS's (LightM-UNet, Eq. 3; Mamba-2 gates first and then divides by the root mean
    square). A is -exp(A_log), one number per head; A_log starts as the logarithm of uniform [1, 16], the bias of dt as
    in VSS, the skip as 1.

    With `parts` > 1 this is the state-space core of SPM (the report's Figure 3): `parts` such modules of width
    C / parts on the parts of the channels, with their own B and C, in one scan; `shared` gives all the same weights.
    Parameters, with c = C / parts, E = expand * c, H = E / head_dim: c (2E + 2N + H) + (E + 2N)(K + 1) + 3H + E c,
    and 2E with `inner_norm`; times `parts` unless shared.

    (B, L, C) -> (B, L, C). Time and memory grow linearly with L. Raises InputError when `parts` does not divide the
    channels or `head_dim` the inner width.
    """

    def __init__(
        self,
        channels: int,
        *,
        state_size: int = 16,
        expand: int = 2,
        d_conv: int = 4,
        head_dim: int = 16,
        inner_norm: bool = True,
        parts: int = 1,
        shared: bool = False,
    ) -> None:
        if parts < 1 or channels % parts:
            raise InputError(f"{channels} channels are not divisible by {parts} parts; use a divisor of {channels}")
        width = channels // parts
        inner, sets = expand * width, 1 if shared else parts
        if head_dim < 1 or inner % head_dim:
            raise InputError(
                f"head_dim {head_dim} does not divide the inner width {inner} ({expand} * {channels} channels"
                f"{f' / {parts} parts' if parts > 1 else ''}); use a divisor of {inner}"
            )
        super().__init__(parts, inner, state_size, d_conv)
        heads, self.head_dim = inner // head_dim, head_dim
        self.in_proj = GroupedLinear(parts, width, (inner, inner, state_size, state_size, heads), shared=shared)
        self.conv_weight = nn.Parameter(torch.empty(sets, inner + 2 * state_size, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(sets, inner + 2 * state_size))
        self.A_log = nn.Parameter(torch.empty(sets, heads).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(torch.empty(sets, heads))
        self.d_skip = nn.Parameter(torch.ones(sets, heads))
        self._add_out(sets, width, inner_norm)
        init_conv(self.conv_weight, self.conv_bias)
        init_dt_bias(self.dt_bias)

    def forward(
        self, w: Tensor, state: Tensor | None = None, *, halo: int = 0, return_state: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, halo + L, C) -> (B, L, C), as in `VSS`; states (B, parts * H, P, N)."""
        z, *streams, delta = self.in_proj(w)  # x, B, C: (B, halo + L, parts * E), twice (B, halo + L, parts * N)
        z, delta = z[:, halo:], delta[:, halo:]
        sizes = (self.inner, self.state_size, self.state_size)
        # three calls, not one on a joined tensor: neither the results nor their gradients need to be joined
        x, B, C = (
            ops.causal_conv1d(stream, self._all(weight), self._all(bias), activation="silu")[:, halo:]
            for stream, weight, bias in zip(
                streams, self.conv_weight.split(sizes, dim=1), self.conv_bias.split(sizes, dim=1), strict=True
            )
        )
        y, state = ops.ssd_scan_with_state(
            x.unflatten(-1, (-1, self.head_dim)),
            delta,
            decay_rates(self._all(self.A_log)),
            B.unflatten(-1, (self.parts, self.state_size)),
            C.unflatten(-1, (self.parts, self.state_size)),
            d_skip=self._all(self.d_skip),
            z=z.unflatten(-1, (-1, self.head_dim)) if self.norm_weight is None else None,
            delta_bias=self._all(self.dt_bias),
            delta_softplus=True,
            initial_state=state,
        )
        out = self._gated_out(y.flatten(2), z)
        return (out, state) if return_state else out
