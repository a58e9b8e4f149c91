"""Baseline networks: those that LightM is compared with, by name.

A baseline's module, and MONAI for those that it has, is imported when the baseline is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from lightm.nets.baselines.common import Baseline, Shape
from lightm.nets.lightm_unet import check_channels

# name: (module of this package, its function of a Shape and options, dimensionalities)
BASELINES: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "unet": ("monai_nets", "unet", (2, 3)),
    "dynunet": ("monai_nets", "dynunet", (2, 3)),
    "segresnet": ("monai_nets", "segresnet", (2, 3)),
    "attention-unet": ("monai_nets", "attention_unet", (2, 3)),
    "unetr": ("monai_nets", "unetr", (2, 3)),
    "swinunetr": ("monai_nets", "swinunetr", (2, 3)),
    "umamba-bot": ("mamba", "umamba_bot", (2, 3)),
    "umamba-enc": ("mamba", "umamba_enc", (2, 3)),
    "ultralight-vm-unet": ("mamba", "ultralight_vm_unet", (2, 3)),
    "transunet": ("transformers", "transunet", (2,)),
    "nnformer": ("transformers", "nnformer", (3,)),
    "deeplabv3plus": ("deeplab", "deeplabv3plus", (2, 3)),
}


def build(
    name: str,
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    image_size: Sequence[int] | None = None,
    **options: Any,
) -> Baseline:
    """Return a new baseline with fresh weights: (B, in_channels, *S) -> logits (B, out_channels, *S).

    `image_size`: the size of the patches that it will see. UNETR, TransUNet, nnFormer and the networks with nnU-Net's
    rules (`dynunet`, `umamba-*`) are built for it; the others only check that they can take it.
    Raises ValueError for impossible settings or an image_size that the network cannot take (with one that fits),
    TypeError for an unknown option, ImportError when a library that the network needs is missing.
    """
    module, function, _ = BASELINES[name]
    check_channels(spatial_dims, in_channels, out_channels)
    if image_size is not None and (len(image_size) != spatial_dims or min(image_size) < 1):
        raise ValueError(
            f"image_size {tuple(image_size)}: {spatial_dims} positive numbers are needed in {spatial_dims}D"
        )
    builder = getattr(import_module(f"lightm.nets.baselines.{module}"), function)
    network: Baseline = builder(Shape(spatial_dims, in_channels, out_channels, image_size), **options)
    if image_size is not None:
        network.check_size(image_size)
    return network
