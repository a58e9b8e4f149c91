"""Numbers in print that are not the sums over the tensors, computed as those who printed them must have.

For the pages that `draw_presets.py` writes.

Two of them:

- The report writes Mamba's convolution as E E K + E parameters, those of a full convolution. It is depthwise: E K + E.
- The paper prints 1.87 M (3D) and 1.09 M (2D) parameters. A counter that adds up the weights of the modules whose
  `forward` is called does not see a Mamba layer: its fused path takes the weights of in_proj, conv1d, x_proj, dt_proj
  and out_proj, and A_log and D, without calling a module. It sees the LayerNorms, the projections and the convolutions;
  GroupNorm has no rule in the counter named in the authors' repository (thop).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightm.lab.complexity import Account, formulas
from lightm.lab.complexity.formulas import KERNEL_SIZE, LayerSettings, settings_of
from lightm.lab.complexity.report import giga
from lightm.nets.presets import PRESETS

PAPER_COUNTS = {3: 1.87e6, 2: 1.09e6}
"""What the paper prints, by number of axes."""

# presets that stand for the paper's network or its code
THE_PAPERS = tuple(f"lightm-unet{kind}" for kind in ("", "-small", "-released", "-released-small"))

# parameters of a Mamba layer that its fused path reads without calling the module that holds them
DIRECT = ("in_proj", "out_proj", "x_proj", "dt_proj", "A_log", "d_skip", "conv1d")
# the rest of what a counter of called modules leaves out: bare parameters, and a norm without a rule
BARE = ("skip scale", "group norms")


@dataclass(frozen=True)
class FullConvolution:
    """The report's count of Mamba's convolution beside the true one, and the network's total with each."""

    formula: str
    printed: int
    true_formula: str
    true: int
    total_as_printed: int
    total: int


@dataclass(frozen=True)
class CalledModules:
    """What a counter of called modules sees of this network, and of the one that it gives the paper's numbers for."""

    seen: int
    unseen: dict[str, int]
    printed: float
    first_upload_seen: int
    first_upload_total: int
    first_upload_multiply_adds: int
    first_upload_setting: str


def full_convolution(account: Account) -> FullConvolution | None:
    """Return the first erratum for a network with Mamba's convolution, else None."""
    table = account.parameters
    settings = settings_of(account.name, account.options)[1] if account.name in PRESETS else {}
    parts = [part for part in table.parts if part.source == "conv1d"]
    if not parts or settings.get("ssm") == "mamba2":
        return None
    counted = sum(part.counted for part in parts)
    printed = 0
    for part in parts:  # E K + E of every set of weights: one, or with g parts that share none g
        sets = settings["parts"] if (part.formula or "").startswith("g ") else 1
        inner = part.counted // sets // (KERNEL_SIZE + 1)
        printed += sets * (inner * inner * KERNEL_SIZE + inner)
    return FullConvolution(
        formula="E E K + E",
        printed=printed,
        true_formula="E K + E",
        true=counted,
        total_as_printed=table.total - counted + printed,
        total=table.total,
    )


def called_modules(account: Account) -> CalledModules | None:
    """Return the second erratum for a network that stands for the paper's, else None."""
    if account.name not in THE_PAPERS or account.options.get("ssm") == "mamba2":
        return None
    table, spatial_dims = account.parameters, len(account.spatial)
    sources = table.by("source")
    unseen = {source: sources[source] for source in (*DIRECT, *BARE) if source in sources}
    batch, spatial = (2, (128, 128, 128)) if spatial_dims == 3 else (12, (512, 512))
    upload = first_upload(spatial, account.in_channels, account.out_channels, batch)
    return CalledModules(
        seen=table.total - sum(unseen.values()),
        unseen=unseen,
        printed=PAPER_COUNTS[spatial_dims],
        first_upload_seen=upload[0],
        first_upload_total=upload[1],
        first_upload_multiply_adds=upload[2],
        first_upload_setting=f"{batch} images of {' x '.join(map(str, spatial))}",
    )


def first_upload(
    spatial: Sequence[int], in_channels: int, out_channels: int, batch: int, filters: int = 32
) -> tuple[int, int, int]:
    """Parameters seen, all parameters and multiply-adds seen of the code as its authors first uploaded it.

    That network is the released one with full 3^d convolutions for the depthwise ones: a full convolution as stem,
    two of them in every decoder stage, a full pointwise head. The counter takes 4 multiply-adds an element of a
    LayerNorm, 11 an output of bilinear interpolation and none of trilinear interpolation.
    """
    dims, voxels = len(spatial), 1
    for size in spatial:
        voxels *= size
    taps = 3**dims
    layer = LayerSettings(inner_norm=False, vector_scale=False, one_norm=True)
    seen = taps * in_channels * filters
    work, hidden, width = seen * voxels, 0, filters
    for stage, blocks in enumerate((1, 2, 2, 4)):
        layers = [(width, width)] * (2 * blocks)
        if stage:
            layers = [(width, 2 * width), *[(2 * width, 2 * width)] * (2 * blocks)]
        for number, (channels, out) in enumerate(layers):
            widening = bool(stage) and number == 0
            seen += 2 * channels + channels * out + out
            work += (2 * 4 * channels + channels * out) * voxels  # the one LayerNorm is called twice
            hidden += sum(term.value for term in formulas.vss(channels, layer)) + 1  # the 1: the scalar s
            hidden += 0 if widening else 2 * channels  # GroupNorm
            if widening:
                voxels //= 2**dims
        width *= 2 if stage else 1
    for _ in range(3):
        half = width // 2
        seen += width * half + 2 * taps * half * half
        work += width * half * voxels
        voxels *= 2**dims
        work += (2 * taps * half * half + (11 * half if dims == 2 else 0)) * voxels
        hidden += 2 * 2 * half
        width = half
    seen += width * out_channels + out_channels
    work += width * out_channels * voxels
    hidden += 2 * width
    return seen, seen + hidden, batch * work


def errata_lines(account: Account) -> list[str]:
    """Numbers in print that are not those of the tensors, each with what explains it."""
    lines = []
    if (wrong := full_convolution(account)) is not None:
        lines.append(
            f"Mamba's convolution is depthwise, {wrong.true_formula} = {wrong.true:,} parameters over all layers. The "
            f"report's {wrong.formula}, a full convolution, would give {wrong.printed:,}, and "
            f"{wrong.total_as_printed:,} in all instead of {wrong.total:,}."
        )
    if (seen := called_modules(account)) is not None:
        dims = len(account.spatial)
        lines.append(
            f"The paper prints {seen.printed / 1e6:.2f} M in {dims}D. A counter that adds up the modules whose forward "
            "is called misses what Mamba's fused path reads directly (in_proj, conv1d, x_proj, dt_proj, out_proj, "
            "A_log, D), bare parameters and GroupNorm. Of this network it sees "
            f"{seen.seen:,} of {account.parameters.total:,}, which is not the printed number. Of the code as first "
            "uploaded (32 filters, the released layers, full convolutions for the depthwise ones) it sees "
            f"{seen.first_upload_seen:,}, {_verdict(seen.first_upload_seen, seen.printed)}; that network has "
            f"{seen.first_upload_total:,} parameters, and {giga(seen.first_upload_multiply_adds)} G multiply-adds are "
            f"seen of it for {seen.first_upload_setting}."
        )
    return lines


def _verdict(seen: int, printed: float) -> str:
    equal = round(seen / 1e6, 2) == round(printed / 1e6, 2)
    return "which is the printed number to its last digit" if equal else "which is not the printed number either"
