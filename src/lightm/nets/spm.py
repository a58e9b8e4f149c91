"""SPM, the report's parallel layer: narrow state-space modules side by side, run as one batched scan."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightm import ops
from lightm.nets.blocks import init_conv, init_dt_bias, without_decay


class GroupedLinear(nn.Module):
    """A linear layer for each of `parts` groups of channels: (..., parts * fan_in) -> (..., parts, fan_out).

    With `shared` one weight serves all parts. Parameters: fan_in * fan_out, times `parts` unless shared.
    """

    def __init__(self, parts: int, fan_in: int, fan_out: int, *, shared: bool) -> None:
        super().__init__()
        self.parts, self.shared = parts, shared
        self.weight = nn.Parameter(torch.empty(1 if shared else parts, fan_out, fan_in))
        nn.init.uniform_(self.weight, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (self.parts, -1))
        if self.shared:
            return F.linear(x, self.weight[0])
        # one matrix product a part: (parts, tokens, fan_in) @ (parts, fan_in, fan_out)
        tokens = x.flatten(0, -3).transpose(0, 1)
        return torch.bmm(tokens, self.weight.transpose(1, 2)).transpose(0, 1).unflatten(0, x.shape[:-2])


class ParallelVSS(nn.Module):
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
        taps: int = 4,
        inner_norm: bool = True,
    ) -> None:
        super().__init__()
        if channels % parts:
            raise ValueError(f"{channels} channels are not divisible by the {parts} parts of SPM")
        width = channels // parts
        inner, sets = expand * width, 1 if shared else parts
        self.parts, self.shared, self.inner, self.state_size = parts, shared, inner, state_size
        self.dt_rank = math.ceil(width / 16)
        self.in_proj = GroupedLinear(parts, width, 2 * inner, shared=shared)
        self.conv_weight = nn.Parameter(torch.empty(sets, inner, taps))
        self.conv_bias = nn.Parameter(torch.empty(sets, inner))
        self.x_proj = GroupedLinear(parts, inner, self.dt_rank + 2 * state_size, shared=shared)
        self.dt_proj = GroupedLinear(parts, self.dt_rank, inner, shared=shared)
        self.dt_bias = nn.Parameter(torch.empty(sets, inner))
        states = torch.arange(1, state_size + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(torch.log(states).repeat(sets, inner, 1))
        self.d_skip = nn.Parameter(torch.ones(sets, inner))
        self.norm_weight = nn.Parameter(torch.ones(sets, inner)) if inner_norm else None
        self.norm_bias = nn.Parameter(torch.zeros(sets, inner)) if inner_norm else None
        self.out_proj = GroupedLinear(parts, inner, width, shared=shared)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        init_conv(self.conv_weight, self.conv_bias)
        init_dt_bias(self.dt_bias)
        without_decay(self.A_log, self.conv_weight, self.conv_bias, self.dt_bias, self.d_skip)
        if self.norm_weight is not None and self.norm_bias is not None:
            without_decay(self.norm_weight, self.norm_bias)

    def _all(self, parameter: Tensor) -> Tensor:
        """A parameter of (sets, E', ...) as one of (parts * E', ...): repeated when it is shared."""
        return parameter.expand(self.parts, *parameter.shape[1:]).flatten(0, 1)

    def forward(self, w: Tensor) -> Tensor:
        x, z = self.in_proj(w).chunk(2, dim=-1)  # (B, L, parts, E') each
        u = ops.causal_conv1d(x.flatten(-2), self._all(self.conv_weight), self._all(self.conv_bias), activation="silu")
        low, B, C = self.x_proj(u).split([self.dt_rank, self.state_size, self.state_size], dim=-1)
        y = ops.selective_scan(
            u,
            self.dt_proj(low.flatten(-2)).flatten(-2),
            -torch.exp(self._all(self.A_log).float()),
            B,
            C,
            d_skip=self._all(self.d_skip),
            z=z.flatten(-2) if self.norm_weight is None else None,
            delta_bias=self._all(self.dt_bias),
            delta_softplus=True,
        )
        if self.norm_weight is not None and self.norm_bias is not None:
            normed = F.layer_norm(y.unflatten(-1, (self.parts, -1)), (self.inner,))
            y = (torch.addcmul(self.norm_bias, normed, self.norm_weight) * F.silu(z)).flatten(-2)
        return self.out_proj(y).flatten(-2)


class SPM(nn.Module):
    """X' = LayerNorm(X); Y1..Yg = split(X'); Yi' = VSS_i(Yi) + s * Yi; out = Linear(LayerNorm(concat)).

    Source: the report's Figure 3. Note that s scales the normalised input here, the input itself in RVM.
    (B, *S, C) -> (B, *S, out_channels).
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        parts: int = 4,
        shared: bool = False,
        state_size: int = 16,
        expand: int = 2,
        inner_norm: bool = True,
        vector_scale: bool = True,
    ) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(channels)
        self.vss = ParallelVSS(
            channels, parts=parts, shared=shared, state_size=state_size, expand=expand, inner_norm=inner_norm
        )
        self.skip_scale = nn.Parameter(torch.ones(channels if vector_scale else 1))
        self.norm_out = nn.LayerNorm(channels)
        self.proj = nn.Linear(channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm_in(x.flatten(1, -2))
        mixed = torch.addcmul(self.vss(tokens), tokens, self.skip_scale)
        return self.proj(self.norm_out(mixed)).unflatten(1, x.shape[1:-1])
