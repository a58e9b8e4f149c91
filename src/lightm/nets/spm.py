"""SPM, the report's parallel layer: narrow state-space modules side by side, run as one batched scan."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightm import ops
from lightm.nets.intact import fusible
from lightm.nets.mamba2 import VSS2
from lightm.nets.state_space import GroupedLinear, decay_rates, init_conv, init_dt_bias
from lightm.nets.token_layer import TokenLayer


@fusible
class ParallelVSS(nn.Module):
    """`parts` VSS modules of width C / parts on the parts of the channels: (B, L, C) -> (B, L, C).

    Source: the report's Figure 3; UltraLight VM-UNet, arXiv 2403.20035. With separate weights in_proj and out_proj
    shrink by `parts`, with `shared` ones by its square. All parts run in one scan, with B and C for each part.
    """

    no_decay = ("A_log", "conv_weight", "conv_bias", "dt_bias", "d_skip", "norm_weight", "norm_bias")

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
        super().__init__()
        if channels % parts:
            raise ValueError(f"{channels} channels are not divisible by the {parts} parts of SPM")
        width = channels // parts
        inner, sets = expand * width, 1 if shared else parts
        self.parts, self.shared, self.inner, self.state_size, self.d_conv = parts, shared, inner, state_size, d_conv
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
        self.norm_weight = nn.Parameter(torch.ones(sets, inner)) if inner_norm else None
        self.norm_bias = nn.Parameter(torch.zeros(sets, inner)) if inner_norm else None
        self.out_proj = GroupedLinear(parts, inner, (width,), shared=shared)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        init_conv(self.conv_weight, self.conv_bias)
        init_dt_bias(self.dt_bias)

    def _all(self, parameter: Tensor) -> Tensor:
        """A parameter of (sets, E', ...) as one of (parts * E', ...): repeated when it is shared."""
        return parameter.expand(self.parts, *parameter.shape[1:]).flatten(0, 1)

    @property
    def inner_total(self) -> int:
        """Channels that the scan runs over, of all parts."""
        return self.parts * self.inner

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
        if self.norm_weight is not None and self.norm_bias is not None:
            y = ops.gated_norm(y, z, self._all(self.norm_weight), self._all(self.norm_bias), parts=self.parts)
        (out,) = self.out_proj(y)
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


class SPM(TokenLayer):
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
        scan: str = "raster",
        ssm: str = "mamba1",
    ) -> None:
        settings: dict[str, Any] = {
            "parts": parts, "shared": shared, "state_size": state_size, "expand": expand, "inner_norm": inner_norm
        }  # fmt: skip
        vss: nn.Module
        if ssm == "mamba2":
            vss = VSS2(channels, head_dim=min(16, expand * channels // parts), **settings)
        else:
            vss = ParallelVSS(channels, **settings)
        super().__init__(vss, channels, out_channels, of_norm=True, vector_scale=vector_scale, scan=scan)
