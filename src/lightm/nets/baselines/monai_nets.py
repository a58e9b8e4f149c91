"""Baselines that MONAI has: built with the configuration of their papers."""

from __future__ import annotations

from collections.abc import Sequence

from monai.networks.nets import UNETR, AttentionUnet, DynUNet, SegResNet, SwinUNETR, UNet
from torch import Tensor, nn

from lightm.nets.baselines.common import Baseline, needed
from lightm.nets.baselines.nnunet import plan_stages


def unet(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    image_size: Sequence[int] | None,
    *,
    channels: Sequence[int] = (16, 32, 64, 128, 256),
    residual_units: int = 2,
) -> Baseline:
    """U-Net with residual units, MONAI's: strided convolutions, PReLU, instance normalisation."""
    strides = [2] * (len(channels) - 1)
    body = UNet(spatial_dims, in_channels, out_channels, tuple(channels), strides, num_res_units=residual_units)
    divisor = [2 ** len(strides)] * spatial_dims
    return Baseline(body, in_channels=in_channels, divisor=divisor, one_voxel=False)


def attention_unet(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    image_size: Sequence[int] | None,
    *,
    channels: Sequence[int] = (16, 32, 64, 128, 256),
) -> Baseline:
    """Attention U-Net: gates on the skip connections, batch normalisation; the paper's quartered widths."""
    strides = [2] * (len(channels) - 1)
    body = AttentionUnet(spatial_dims, in_channels, out_channels, tuple(channels), strides)
    divisor = [2 ** len(strides)] * spatial_dims
    return Baseline(body, in_channels=in_channels, divisor=divisor, one_voxel=False)


class PlainDynUNet(nn.Module):
    """The layers of MONAI's DynUNet, run from top to bottom and back.

    DynUNet registers every layer a second time inside nested skip modules; its state dict names each weight twice,
    which safetensors refuses. Here each has one name.
    """

    def __init__(self, net: DynUNet) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([net.input_block, *net.downsamples])
        self.bottleneck = net.bottleneck
        self.decoder = net.upsamples
        self.output = net.output_block

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        x = self.bottleneck(x)
        for stage in self.decoder:
            x = stage(x, skips.pop())
        logits: Tensor = self.output(x)
        return logits


def dynunet(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    image_size: Sequence[int] | None,
    *,
    base_channels: int = 32,
    max_channels: int | None = None,
    spacing: Sequence[float] | None = None,
) -> Baseline:
    """nnU-Net's network with the stages of its rules (`plan_stages`): instance norm, leaky ReLU, one output."""
    size = needed(image_size, "nnU-Net's rules derive the stages from it")
    stages = plan_stages(size, spacing=spacing, base_channels=base_channels, max_channels=max_channels)
    net = DynUNet(
        spatial_dims,
        in_channels,
        out_channels,
        kernel_size=stages.kernels,
        strides=stages.strides,
        upsample_kernel_size=stages.strides[1:],
        filters=stages.channels,
        norm_name=("INSTANCE", {"affine": True}),
    )
    return Baseline(PlainDynUNet(net), in_channels=in_channels, divisor=stages.divisor, one_voxel=False)


def segresnet(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    image_size: Sequence[int] | None,
    *,
    base_channels: int = 32,
    blocks_down: Sequence[int] = (1, 2, 2, 4),
    blocks_up: Sequence[int] = (1, 1, 1),
) -> Baseline:
    """SegResNet without its variational branch: group normalisation, residual blocks, additive skips."""
    if base_channels % 8:
        raise ValueError(f"base_channels {base_channels}: not divisible by the 8 groups of GroupNorm; use 16 or 32")
    body = SegResNet(
        spatial_dims,
        base_channels,
        in_channels,
        out_channels,
        blocks_down=tuple(blocks_down),
        blocks_up=tuple(blocks_up),
    )
    return Baseline(body, in_channels=in_channels, divisor=[2 ** (len(blocks_down) - 1)] * spatial_dims)


def unetr(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    image_size: Sequence[int] | None,
    *,
    base_channels: int = 16,
    hidden: int = 768,
    mlp: int = 3072,
    heads: int = 12,
) -> Baseline:
    """UNETR: ViT-B/16 encoder of twelve layers, convolutional decoder on its layers 3, 6, 9 and 12."""
    size = needed(image_size, "a vision transformer learns a position for every part of it")
    divisor = (16,) * spatial_dims
    for axis, length in zip("ZYX"[-spatial_dims:], size, strict=True):
        if length % 16 or not length:
            raise ValueError(f"image_size {size}: {axis}={length} is not divisible by 16; use {length // 16 * 16 + 16}")
    body = UNETR(in_channels, out_channels, size, base_channels, hidden, mlp, heads, spatial_dims=spatial_dims)
    for block in body.vit.blocks:  # a norm that only cross-attention uses, which UNETR has none of
        block.norm_cross_attn = nn.Identity()
    return Baseline(body, in_channels=in_channels, divisor=divisor, image_size=size, one_voxel=False)


def swinunetr(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    image_size: Sequence[int] | None,
    *,
    base_channels: int = 48,
    depths: Sequence[int] = (2, 2, 2, 2),
    heads: Sequence[int] = (3, 6, 12, 24),
    window: int = 7,
) -> Baseline:
    """Swin UNETR: shifted-window transformer encoder, convolutional decoder."""
    if base_channels % 12:
        raise ValueError(f"base_channels {base_channels}: Swin UNETR's heads need a multiple of 12, such as 24 or 48")
    body = SwinUNETR(
        in_channels,
        out_channels,
        depths=tuple(depths),
        num_heads=tuple(heads),
        window_size=window,
        feature_size=base_channels,
        spatial_dims=spatial_dims,
    )
    return Baseline(body, in_channels=in_channels, divisor=[32] * spatial_dims, one_voxel=False)
