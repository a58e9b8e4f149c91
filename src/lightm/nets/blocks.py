"""Blocks of the LightM networks, all channels-last.

Glossary (code: symbol, source). Shapes are (B, *S, C) inside the networks and (B, L, C) inside a state-space
layer, with L = Z*Y*X tokens in raster order.

=============  ==========================================  ===================================
code           symbol                                      source
=============  ==========================================  ===================================
channels       C, width of a layer's input                 LightM-UNet, arXiv 2403.05246
inner          E = expand * C, width inside of the VSS     Mamba, arXiv 2312.00752, section 3.4
state_size     N, states a channel                         Mamba, section 3.2
dt_rank        R = ceil(C / 16)                            Mamba, section 3.6
d_conv         K, kernel size of the causal convolution           Mamba, figure 3
skip_scale     s, scale of the residual                    LightM-UNet, Eq. 1
=============  ==========================================  ===================================
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightm import ops
from lightm.nets.checkpointing import checkpointed, should_checkpoint
from lightm.nets.intact import fusible, intact, linear
from lightm.nets.mamba2 import VSS2
from lightm.nets.state_space import decay_rates, init_conv, init_dt_bias
from lightm.nets.token_layer import TokenLayer


@fusible
class DWConv(nn.Module):
    """Depthwise convolution of 3^d, then a pointwise one: (B, *S, in_channels) -> (B, *S, out_channels).

    `kernel_size=1` gives the head's form: a scale for each channel, then the pointwise product.
    Parameters: in * kernel_size^d + in * out, plus in + out with `bias`.
    """

    no_decay = ("depthwise",)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        spatial_dims: int,
        *,
        kernel_size: int = 3,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if kernel_size not in (1, 3):
            raise ValueError(f"kernel_size {kernel_size}: a DWConv here is of 1 or 3")
        self.kernel_size = kernel_size
        self.depthwise = nn.Parameter(torch.empty(*(kernel_size,) * spatial_dims, in_channels))
        self.depthwise_bias = nn.Parameter(torch.zeros(in_channels)) if bias else None
        self.pointwise = nn.Linear(in_channels, out_channels, bias=bias)
        bound = math.sqrt(1.0 / kernel_size**spatial_dims)
        nn.init.uniform_(self.depthwise, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        x = ops.depthwise_conv(x, self.depthwise) if self.kernel_size == 3 else x * self.depthwise.reshape(-1)
        if self.depthwise_bias is not None:
            x = x + self.depthwise_bias
        return linear(self.pointwise, x)


class ConvStem(nn.Module):
    """Full convolution of 3^d with bias: (B, *S, in_channels) -> (B, *S, out_channels).

    On one channel a depthwise stem has a single filter, and all its outputs are multiples of one image, which the
    LayerNorm behind it reduces to little more than a sign; see docs/decisions/0005.
    Parameters: in * out * 3^d + out.
    """

    def __init__(self, in_channels: int, out_channels: int, spatial_dims: int) -> None:
        super().__init__()
        kind = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
        self.conv = kind(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.movedim(-1, 1)).movedim(1, -1).contiguous()


class PositionConv(nn.Module):
    """x + depthwise 3^d convolution of x: each token sees its neighbours along every axis before the raster scan.

    Source: the conditional positional encoding of arXiv 2102.10882. (B, *S, C) -> (B, *S, C); 3^d * C parameters.
    """

    no_decay = ("weight",)

    def __init__(self, channels: int, spatial_dims: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*(3,) * spatial_dims, channels))
        bound = math.sqrt(1.0 / 3**spatial_dims)
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return x + ops.depthwise_conv(x, self.weight)


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
        self.inner, self.state_size, self.d_conv = inner, state_size, d_conv
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

    @property
    def inner_total(self) -> int:
        """Channels that the scan runs over."""
        return self.inner

    def forward(
        self, w: Tensor, state: Tensor | None = None, *, halo: int = 0, return_state: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, halo + L, C) -> (B, L, C); the first `halo` tokens are seen by the convolution only.

        With `state` (B, E, N) the scan goes on from there; with `return_state` the last state comes too.
        """
        x, z = self._in_proj(w, halo)  # (B, halo + L, E), (B, L, E)
        u = ops.causal_conv1d(x, self.conv_weight, self.conv_bias, activation="silu")[:, halo:]
        low, B, C = self._x_proj(u)
        # where it is intact, the bias of dt_proj goes into the scan, which adds it before its softplus
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

    def _in_proj(self, w: Tensor, halo: int) -> tuple[Tensor, Tensor]:
        if not intact(self.in_proj):
            x, z = self.in_proj(w).chunk(2, dim=-1)
            return x, z[:, halo:]
        in_x, in_z = self.in_proj.weight.chunk(2)
        z = ops.linear(w[:, halo:], in_z)
        return ops.linear(w, in_x), z  # with two matmuls instead of one their gradients need not be joined

    def _x_proj(self, u: Tensor) -> tuple[Tensor, ...]:
        sizes = [self.dt_rank, self.state_size, self.state_size]
        if not intact(self.x_proj):
            return tuple(self.x_proj(u).split(sizes, dim=-1))
        return tuple(ops.linear(u, weight) for weight in self.x_proj.weight.split(sizes))

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


class RVM(TokenLayer):
    """Residual Vision Mamba layer: M~ = VSS(LayerNorm(M)) + s * M; out = Linear(LayerNorm(M~)).

    Source: LightM-UNet, Eq. 1-2 (Eq. 1 of the report prints "+ s", its text and the released code add s times the
    layer's input). `vector_scale=False` and `one_norm=True` give the released code's layer: a scalar s, and one
    LayerNorm used twice.

    (B, *S, C) -> (B, *S, out_channels).
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        state_size: int = 16,
        expand: int = 2,
        inner_norm: bool = True,
        vector_scale: bool = True,
        one_norm: bool = False,
        scan: str = "raster",
        ssm: str = "mamba1",
    ) -> None:
        vss: nn.Module
        if ssm == "mamba2":
            head = min(16, expand * channels)
            vss = VSS2(channels, state_size=state_size, expand=expand, head_dim=head, inner_norm=inner_norm)
        else:
            vss = VSS(channels, state_size=state_size, expand=expand, inner_norm=inner_norm)
        super().__init__(
            vss, channels, out_channels, of_norm=False, vector_scale=vector_scale, one_norm=one_norm, scan=scan
        )


@fusible
class GroupNormReLU(nn.Module):
    """GroupNorm and ReLU on channels-last data, without a copy into another layout."""

    def __init__(self, channels: int, groups: int = 8) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if not intact(norm):
            return functional.relu(norm(x.movedim(-1, 1))).movedim(1, -1).contiguous()
        return ops.group_norm_relu(x, norm.num_groups, norm.weight, norm.bias, norm.eps)

    def tensors(self) -> ops.GroupNormParameters:
        """The norm's tensors for `ops.decoder_stage` and `ops.decoder_head`."""
        return ops.GroupNormParameters(self.norm.weight, self.norm.bias, self.norm.num_groups, self.norm.eps)


class DecoderStage(nn.Module):
    """Pointwise C -> C/2, linear upsampling by 2, + skip; then norm, ReLU, DWConv 3^d + s * input, norm, ReLU.

    Source: LightM-UNet, section 2.4 and figure 1. (B, *S, C), (B, *2S, C/2) -> (B, *2S, C/2).
    """

    def __init__(self, channels: int, spatial_dims: int, *, groups: int = 8, vector_scale: bool = True) -> None:
        super().__init__()
        half = channels // 2
        self.reduce = nn.Linear(channels, half, bias=False)
        self.norm1 = GroupNormReLU(half, groups)
        self.conv = DWConv(half, half, spatial_dims)
        self.skip_scale = nn.Parameter(torch.ones(half if vector_scale else 1))
        self.norm2 = GroupNormReLU(half, groups)
        self.checkpointing: bool | None = None

    def forward(self, x: Tensor, skip: Tensor, *, overwrite_skip: bool = False) -> Tensor:
        """`overwrite_skip` lets a call without gradients compute in the skip's memory: its content is lost."""
        again = should_checkpoint(
            self.checkpointing, 8 * skip.numel()
        )  # keeping would keep about eight tensors of that size
        if (
            (again or not torch.is_grad_enabled())
            and intact(*self._modules.values())
            and ops.stage_runs_fused(x, skip, self.reduce.weight)
        ):
            return ops.decoder_stage(
                ops.linear(x, self.reduce.weight),
                skip,
                self.norm1.tensors(),
                self.conv.depthwise,
                self.conv.pointwise.weight,
                self.skip_scale,
                self.norm2.tensors(),
                overwrite_skip=overwrite_skip,
            )
        return checkpointed(self._plain, self.parameters(), again, x, skip)

    def _plain(self, x: Tensor, skip: Tensor) -> Tensor:
        x = ops.upsample_linear2(linear(self.reduce, x)) + skip
        return self.norm2(torch.addcmul(self.conv(self.norm1(x)), x, self.skip_scale))


def run_head(norm: GroupNormReLU, conv: DWConv, x: Tensor, checkpointing: bool | None) -> Tensor:
    """The head, norm, ReLU, DWConv 1: (B, *S, C) -> (B, *S, classes), raw logits."""
    again = should_checkpoint(checkpointing, 4 * x.numel())
    if (again or not torch.is_grad_enabled()) and intact(norm, conv) and ops.stage_runs_fused(x, conv.pointwise.weight):
        offset, bias = conv.depthwise_bias, conv.pointwise.bias
        if offset is not None and bias is not None:
            return ops.decoder_head(x, norm.tensors(), conv.depthwise.reshape(-1), offset, conv.pointwise.weight, bias)
    return checkpointed(lambda x: conv(norm(x)), [*norm.parameters(), *conv.parameters()], again, x)
