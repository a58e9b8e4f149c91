"""Blocks of the LightM networks, all channels-last: (B, *S, C). Symbols: see `lightm.nets.state_space`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightm import ops
from lightm.nets.execution import checkpointed, fusible, intact, linear, should_checkpoint
from lightm.nets.state_space import VSS, VSS2, ParallelVSS
from lightm.nets.token_layer import TokenLayer


def _init_depthwise(weight: Tensor) -> None:
    """Uniform in 1 / sqrt(kernel_size^d), for (*kernel, C)."""
    bound = math.sqrt(1.0 / weight[..., 0].numel())
    nn.init.uniform_(weight, -bound, bound)


@fusible
class DWConv(nn.Module):
    """Depthwise convolution of 3^d, then a pointwise one: (B, *S, in_channels) -> (B, *S, out_channels).

    `kernel_size=1` gives the head's form: a scale for each channel, then the pointwise product.
    Parameters: in * kernel_size^d + in * out, plus in + out with `bias`.
    """

    no_decay = ("depthwise",)

    def __init__(
        self, in_channels: int, out_channels: int, spatial_dims: int, *, kernel_size: int = 3, bias: bool = False
    ) -> None:
        super().__init__()
        if kernel_size not in (1, 3):
            raise ValueError(f"kernel_size {kernel_size}: a DWConv here is of 1 or 3")
        self.kernel_size = kernel_size
        self.depthwise = nn.Parameter(torch.empty(*(kernel_size,) * spatial_dims, in_channels))
        self.depthwise_bias = nn.Parameter(torch.zeros(in_channels)) if bias else None
        self.pointwise = nn.Linear(in_channels, out_channels, bias=bias)
        _init_depthwise(self.depthwise)

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
        _init_depthwise(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + ops.depthwise_conv(x, self.weight)


def _state_space(mamba1: type[nn.Module], ssm: str, channels: int, **settings: Any) -> nn.Module:
    """The module of a layer: `mamba1`, or VSS2 with heads of 16 channels for "mamba2"."""
    if ssm != "mamba2":
        return mamba1(channels, **settings)
    inner = settings["expand"] * channels // settings.get("parts", 1)
    return VSS2(channels, head_dim=min(16, inner), **settings)


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
        vss = _state_space(VSS, ssm, channels, state_size=state_size, expand=expand, inner_norm=inner_norm)
        super().__init__(
            vss, channels, out_channels, of_norm=False, vector_scale=vector_scale, one_norm=one_norm, scan=scan
        )


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
        settings = {"state_size": state_size, "expand": expand, "inner_norm": inner_norm}
        vss = _state_space(ParallelVSS, ssm, channels, parts=parts, shared=shared, **settings)
        super().__init__(vss, channels, out_channels, of_norm=True, vector_scale=vector_scale, scan=scan)


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
        again = should_checkpoint(self.checkpointing, 8 * skip.numel())  # about eight such tensors would be kept
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
