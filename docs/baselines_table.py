"""Where each baseline comes from, what was printed about its size, and the table of it all for docs/baselines.md.

After a change: `python docs/baselines_table.py` prints the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from lightm.lab.complexity.report import SOURCES
from lightm.nets.baselines import BASELINES, build


@dataclass(frozen=True)
class Facts:
    """What a baseline is, and what was printed about its size.

    `printed`: the count that its own paper prints, as printed, or None where none was found; `printed_for`: what that
    count belongs to, as arguments of `lightm.nets.create`, so that the same network can be counted here; `others`:
    counts that other papers print for it; `why`: what explains the difference; `here`: what was changed or chosen.
    """

    title: str
    printed: str | None
    printed_for: Mapping[str, Any] = field(default_factory=dict)
    others: str = ""
    why: str = ""
    here: str = ""


# What the table counts: an X-ray of 512 x 512 in 2 classes, a CT patch of 128^3 in 3; both of one channel.
COUNTED: dict[int, dict[str, Any]] = {
    2: {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "image_size": (512, 512)},
    3: {"spatial_dims": 3, "in_channels": 1, "out_channels": 3, "image_size": (128, 128, 128)},
}

_FIGURE = "LightM-UNet's figure: about"

FACTS: dict[str, Facts] = {
    "unet": Facts(
        "U-Net: Convolutional Networks for Biomedical Image Segmentation",
        None,
        here="MONAI's UNet: filters 16 to 256, two residual units a stage, strided convolutions, instance norm",
    ),
    "dynunet": Facts(
        "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation",
        None,
        others="LightM-UNet: 88.62 M in 3D, about 127 M in 2D; the FLARE 2021 baseline: 30,787,584 at 80x192x160, 5 "
        "classes",
        why="nnU-Net's code registers each convolution under two names and the encoder once more inside the decoder; a "
        "counter that adds up modules counts encoder layers four times and decoder layers twice, and so counted this "
        "network has 88.61 M and 126.53 M. The baseline has convolution biases (3,840) and deep supervision's heads "
        "(3,840), but no bias in the last layer (5): the rest agrees to the last parameter",
        here="stages by nnU-Net's rules from image_size and spacing; no deep supervision; no convolution biases",
    ),
    "segresnet": Facts(
        "3D MRI Brain Tumor Segmentation Using Autoencoder Regularization",
        None,
        others=f"{_FIGURE} 19 M in 3D, 6.6 M in 2D",
        why="agrees within the reading of a figure",
        here="MONAI's SegResNet: 32 filters, blocks 1-2-2-4, without the autoencoder branch",
    ),
    "attention-unet": Facts(
        "Attention U-Net: Learning Where to Look for the Pancreas",
        "6.40 M",
        {"spatial_dims": 3, "in_channels": 1, "out_channels": 2},
        why="MONAI's gates are not the authors' layer for layer; not resolved further",
        here="MONAI's AttentionUnet with the paper's quartered filters, 16 to 256",
    ),
    "unetr": Facts(
        "UNETR: Transformers for 3D Medical Image Segmentation",
        "92.58 M",
        {"spatial_dims": 3, "in_channels": 1, "out_channels": 14, "image_size": (96, 96, 96)},
        others=f"{_FIGURE} 94 M in 3D, 88 M in 2D",
        why="0.2% more; none of MONAI's options gives the printed count; not resolved further",
        here="MONAI's UNETR: ViT-B/16, 16 filters; without norms that MONAI builds for cross-attention and never uses",
    ),
    "swinunetr": Facts(
        "Swin UNETR: Swin Transformers for Semantic Segmentation of Brain Tumors in MRI Images",
        "61.98 M",
        {"spatial_dims": 3, "in_channels": 4, "out_channels": 3, "image_size": (128, 128, 128)},
        others=f"{_FIGURE} 63 M in 3D, 26 M in 2D",
        why="0.3% more; not resolved further",
        here="MONAI's SwinUNETR: 48 filters, two layers a stage, windows of 7",
    ),
    "umamba-bot": Facts(
        "U-Mamba: Enhancing Long-range Dependency for Biomedical Image Segmentation",
        None,
        others="LightM-UNet: 173.53 M in 3D, about 243 M in 2D",
        why="layers counted repeatedly as for dynunet, and the state-space layer not at all: so counted, this network "
        "has 173.53 M and 244.10 M",
        here="stages by nnU-Net's rules, two residual blocks a stage both ways, Mamba after the deepest; a residual "
        "around Mamba, which the authors' code lacks (`residual=False`); our scan",
    ),
    "umamba-enc": Facts(
        "U-Mamba: Enhancing Long-range Dependency for Biomedical Image Segmentation",
        None,
        here="as umamba-bot, with Mamba after every encoder stage",
    ),
    "ultralight-vm-unet": Facts(
        "UltraLight VM-UNet: Parallel Vision Mamba Significantly Reduces Parameters for Skin Lesion Segmentation",
        "0.049 M",
        {"spatial_dims": 2, "in_channels": 3, "out_channels": 2, "image_size": (256, 256)},
        why="agrees; the paper has one output channel, two here (9 parameters more)",
        here="in 3D every convolution, pooling and interpolation in 3D; logits, where the authors' code has a sigmoid",
    ),
    "transunet": Facts(
        "TransUNet: Transformers Make Strong Encoders for Medical Image Segmentation",
        None,
        {"spatial_dims": 2, "in_channels": 3, "out_channels": 9, "image_size": (224, 224)},
        others="105 M (DA-TransUNet's comparison)",
        why="agrees",
        here="R50-ViT-B/16 without the pre-trained weights; 2D alone",
    ),
    "nnformer": Facts(
        "nnFormer: Interleaved Transformer for Volumetric Segmentation",
        None,
        {
            "spatial_dims": 3,
            "in_channels": 1,
            "out_channels": 14,
            "image_size": (64, 128, 128),
            "patch": (2, 4, 4),
        },
        others="150.5 M (UNETR++, arXiv 2212.04497), 149.3 M (3D UX-Net, arXiv 2209.15076)",
        why="between the two, whose configurations are not printed",
        here="the widest configuration, 192 filters; tokens of 4^3 voxels; no deep supervision; 3D alone",
    ),
    "deeplabv3plus": Facts(
        "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation",
        None,
        here="ResNet-101 (or `backbone='resnet50'`), output stride 16, plain atrous convolutions; GroupNorm for batch "
        "norm (as many parameters), since batches here are small; in 3D all of it in 3D",
    ),
}


class _RealNumbers(TorchFunctionMode):
    """Make `torch.linspace` on the CPU: a schedule of rates is read back as numbers, which the meta device has not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def parameters(name: str, **arguments: Any) -> int:
    """Return the number of parameters of a baseline built with the arguments of `lightm.nets.create`.

    The network is built on the meta device: neither memory nor time for its weights.
    """
    with torch.device("meta"), _RealNumbers():
        return sum(p.numel() for p in build(name, **arguments).parameters())


def table(names: Sequence[str] = tuple(BASELINES)) -> str:
    """Return the table of docs/baselines.md: sources, printed counts, and counts here from the tensors, as Markdown."""
    head = ["network", "source", "printed there", "the same, counted here", "2D here", "3D here"]
    lines = [f"| {' | '.join(head)} |", "| --- | --- | --- | --- | ---: | ---: |"]
    for name in names:
        known, dims = FACTS[name], BASELINES[name][2]
        same = "-"
        if known.printed_for:
            same = f"{parameters(name, **known.printed_for):,} ({_words(known.printed_for)})"
        counts = [f"{parameters(name, **COUNTED[d]):,}" if d in dims else "-" for d in (2, 3)]
        row = [f"`{name}`", f"{known.title}. {SOURCES[name]}", known.printed or "none found", same, *counts]
        lines.append(f"| {' | '.join(row)} |")
    lines += [
        "",
        "| network | what other papers print | why counts differ | chosen here |",
        "| --- | --- | --- | --- |",
    ]
    for name in names:
        known = FACTS[name]
        lines.append(f"| `{name}` | {known.others or '-'} | {known.why or '-'} | {known.here} |")
    return "\n".join(lines) + "\n"


def _words(arguments: Any) -> str:
    size = arguments.get("image_size")
    words = [f"{arguments['in_channels']} channel(s)", f"{arguments['out_channels']} classes"]
    return ", ".join([*words, *([] if size is None else ["x".join(str(n) for n in size)])])


if __name__ == "__main__":
    print(table(), end="")
