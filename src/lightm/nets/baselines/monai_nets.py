"""Baselines that MONAI has: built with the configuration of their papers."""

from __future__ import annotations

from collections.abc import Sequence

from monai.networks.nets import UNETR, AttentionUnet, DynUNet, SegResNet, SwinUNETR, UNet
from torch import Tensor, nn

from lightm.nets.baselines.common import Baseline, Shape, plan_stages


def unet(shape: Shape, *, channels: Sequence[int] = (16, 32, 64, 128, 256), residual_units: int = 2) -> Baseline:
    """U-Net with residual units, MONAI's: strided convolutions, PReLU, instance normalisation."""
    strides = [2] * (len(channels) - 1)
    sizes = (shape.spatial_dims, shape.in_channels, shape.out_channels, tuple(channels))
    return shape.baseline(UNet(*sizes, strides, num_res_units=residual_units), 2 ** len(strides), one_voxel=False)


def attention_unet(shape: Shape, *, channels: Sequence[int] = (16, 32, 64, 128, 256)) -> Baseline:
    """Attention U-Net: gates on the skip connections, batch normalisation; the paper's quartered widths."""
    strides = [2] * (len(channels) - 1)
    body = AttentionUnet(shape.spatial_dims, shape.in_channels, shape.out_channels, tuple(channels), strides)
    return shape.baseline(body, 2 ** len(strides), one_voxel=False)


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
    shape: Shape, *, base_channels: int = 32, max_channels: int | None = None, spacing: Sequence[float] | None = None
) -> Baseline:
    """nnU-Net's network with the stages of its rules (`plan_stages`): instance norm, leaky ReLU, one output."""
    size = shape.needed_size("nnU-Net's rules derive the stages from it")
    stages = plan_stages(size, spacing=spacing, base_channels=base_channels, max_channels=max_channels)
    net = DynUNet(
        shape.spatial_dims,
        shape.in_channels,
        shape.out_channels,
        kernel_size=stages.kernels,
        strides=stages.strides,
        upsample_kernel_size=stages.strides[1:],
        filters=stages.channels,
        norm_name=("INSTANCE", {"affine": True}),
    )
    return shape.baseline(PlainDynUNet(net), stages.divisor, one_voxel=False)


def segresnet(
    shape: Shape,
    *,
    base_channels: int = 32,
    blocks_down: Sequence[int] = (1, 2, 2, 4),
    blocks_up: Sequence[int] = (1, 1, 1),
) -> Baseline:
    """SegResNet without its variational branch: group normalisation, residual blocks, additive skips."""
    if base_channels % 8:
        raise ValueError(f"base_channels {base_channels}: not divisible by the 8 groups of GroupNorm; use 16 or 32")
    sizes = (shape.spatial_dims, base_channels, shape.in_channels, shape.out_channels)
    body = SegResNet(*sizes, blocks_down=tuple(blocks_down), blocks_up=tuple(blocks_up))
    return shape.baseline(body, 2 ** (len(blocks_down) - 1))


def unetr(shape: Shape, *, base_channels: int = 16, hidden: int = 768, mlp: int = 3072, heads: int = 12) -> Baseline:
    """UNETR: ViT-B/16 encoder of twelve layers, convolutional decoder on its layers 3, 6, 9 and 12."""
    dims = shape.spatial_dims
    size = shape.needed_size("a vision transformer learns a position for every part of it", (16,) * dims)
    sizes = (shape.in_channels, shape.out_channels, size, base_channels, hidden, mlp, heads)
    body = UNETR(*sizes, spatial_dims=dims)
    for block in body.vit.blocks:  # a norm that only cross-attention uses, which UNETR has none of
        block.norm_cross_attn = nn.Identity()
    return shape.baseline(body, 16, image_size=size, one_voxel=False)


def swinunetr(
    shape: Shape,
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
        shape.in_channels,
        shape.out_channels,
        depths=tuple(depths),
        num_heads=tuple(heads),
        window_size=window,
        feature_size=base_channels,
        spatial_dims=shape.spatial_dims,
    )
    return shape.baseline(body, 32, one_voxel=False)
