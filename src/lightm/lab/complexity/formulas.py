"""Closed forms of the parameters of every layer, from its settings alone: no tensor is looked at here.

Symbols: C width of a layer, O width behind its projection, E = expand C inner width, N states, R = ceil(C / 16) rank
of dt, K kernel size, d axes. With g parts, C', E' and R' are those of one part, C' = C / g, with g sets of weights, or
1 when shared. Sources: Eq. 7-9 of the LightM-UNet report with Mamba's depthwise convolution (arXiv 2312.00752);
Mamba-2's core (arXiv 2405.21060, section 7) has E / P heads of P channels, and one projection of C gives all.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightm.nets.lightm_unet import LightMUNet, ReleasedLightMUNet
from lightm.nets.presets import PRESETS

KERNEL_SIZE = 4  # of Mamba's causal convolution
HEAD = 16  # channels of a head of Mamba-2, or all of them where there are fewer

MATRIX, CONVOLUTION, STATE, NORM, SCALE = "matmul", "convolution", "state space", "normalisation", "scale"


@dataclass(frozen=True)
class Term:
    """The parameters of one source in one layer: where they stand, the closed form and its value."""

    source: str
    kind: str
    formula: str
    value: int
    stage: str = ""
    layer: str = ""


@dataclass(frozen=True)
class LayerSettings:
    """What the size of a state-space layer depends on, beside its widths."""

    state_size: int = 16
    expand: int = 2
    inner_norm: bool = True
    vector_scale: bool = True
    one_norm: bool = False
    parts: int = 1
    shared: bool = False
    ssm: str = "mamba1"


def vss(channels: int, layer: LayerSettings) -> Iterator[Term]:
    """The state-space module of width C, or the g modules of width C / g."""
    several = layer.parts > 1
    c = channels // layer.parts
    e, n, r, k = layer.expand * c, layer.state_size, math.ceil(c / 16), KERNEL_SIZE
    sets = 1 if layer.shared else layer.parts
    mark, times = "'" if several else "", several and not layer.shared

    def term(source: str, kind: str, formula: str, value: int) -> Term:
        written = formula.replace("C", "C" + mark).replace("E", "E" + mark).replace("R", "R" + mark)
        if times and written.startswith("2 "):
            written = "2 g" + written[1:]
        elif times:
            written = f"g ({written})" if "+" in written else f"g {written}"
        return Term(source, kind, written, sets * value)

    if layer.ssm == "mamba2":
        heads = e // min(HEAD, e)
        yield term("in_proj", MATRIX, "C (2 E + 2 N + E / P)", c * (2 * e + 2 * n + heads))
        yield term("out_proj", MATRIX, "E C", e * c)
        yield term("dt_proj", MATRIX, "E / P", heads)  # its bias; the weights are in in_proj
        yield term("A_log", STATE, "E / P", heads)
        yield term("d_skip", STATE, "E / P", heads)
        yield term("conv1d", CONVOLUTION, "(E + 2 N) (K + 1)", (e + 2 * n) * (k + 1))
        if layer.inner_norm:
            yield term("inner norm", NORM, "2 E", 2 * e)
        return
    yield term("in_proj", MATRIX, "2 E C", 2 * e * c)
    yield term("out_proj", MATRIX, "E C", e * c)
    yield term("x_proj", MATRIX, "E (R + 2 N)", e * (r + 2 * n))
    yield term("dt_proj", MATRIX, "R E + E", r * e + e)
    yield term("A_log", STATE, "E N", e * n)
    yield term("d_skip", STATE, "E", e)
    yield term("conv1d", CONVOLUTION, "E K + E", e * k + e)
    if layer.inner_norm:
        yield term("inner norm", NORM, "2 E", 2 * e)


def mixing_layer(channels: int, out: int, layer: LayerSettings) -> Iterator[Term]:
    """RVM or SPM: the state-space module with its LayerNorms, the scaled residual and the projection C -> O."""
    yield from vss(channels, layer)
    norms = 1 if layer.one_norm else 2
    yield Term("layer norms", NORM, "2 C" if layer.one_norm else "4 C", norms * 2 * channels)
    yield _skip_scale(channels, layer.vector_scale)
    yield Term("projection", MATRIX, "C O + O", channels * out + out)


def stem(image: int, width: int, dims: int, *, full: bool = False) -> Iterator[Term]:
    """A depthwise convolution of the image's I channels, then a pointwise one; or a full convolution with biases."""
    if full:
        yield Term("full convolution", CONVOLUTION, f"3^{dims} I O + O", 3**dims * image * width + width)
    else:
        yield Term("depthwise", CONVOLUTION, f"3^{dims} I", 3**dims * image)
        yield Term("pointwise", MATRIX, "I O", image * width)


def decoder_stage(channels: int, dims: int, *, vector_scale: bool) -> Iterator[Term]:
    """Reduction C -> H = C / 2, two GroupNorms, a depthwise and a pointwise convolution and a scaled residual."""
    h = channels // 2
    yield Term("reduction", MATRIX, "C H", channels * h)
    yield Term("group norms", NORM, "4 H", 4 * h)
    yield Term("depthwise", CONVOLUTION, f"3^{dims} H", 3**dims * h)
    yield Term("pointwise", MATRIX, "H H", h * h)
    scale = _skip_scale(h, vector_scale)
    yield replace(scale, formula=scale.formula.replace("C", "H"))


def head(width: int, classes: int) -> Iterator[Term]:
    """GroupNorm, a scale and an offset per channel, and the pointwise convolution to the O classes."""
    yield Term("group norms", NORM, "2 C", 2 * width)
    yield Term("depthwise", CONVOLUTION, "2 C", 2 * width)
    yield Term("pointwise", MATRIX, "C O + O", width * classes + classes)


def _skip_scale(channels: int, vector: bool) -> Term:
    return Term("skip scale", SCALE, "C" if vector else "1", channels if vector else 1)


def _merged(terms: Iterable[Term]) -> list[Term]:
    """Terms with equal stage, layer and source as one, their formulas joined."""
    found: dict[tuple[str, str, str], Term] = {}
    for term in terms:
        key = (term.stage, term.layer, term.source)
        if (before := found.get(key)) is not None:
            formula = before.formula if term.formula == before.formula else f"{before.formula} + {term.formula}"
            term = replace(before, formula=formula, value=before.value + term.value)
        found[key] = term
    return list(found.values())


# Whole networks -------------------------------------------------------------------------------------------------------


def settings_of(name: str, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return what builds a preset and its complete settings: defaults, then the preset's, then the options."""
    build, given = PRESETS[name]
    parameters = inspect.signature(build).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return build, {**defaults, **given, **options}


def has_closed_form(name: str) -> bool:
    """Whether the whole of this network is covered by closed forms, as all of the LightM-UNet family are."""
    return name in PRESETS and PRESETS[name][0] in (LightMUNet, ReleasedLightMUNet)


def network_terms(
    name: str, spatial_dims: int, in_channels: int, out_channels: int, options: Mapping[str, Any]
) -> list[Term]:
    """Return the closed forms of every layer of a preset with a closed form, in the order of computation."""
    build, settings = settings_of(name, options)
    family = _lightm_unet if build is LightMUNet else _released
    return _merged(family(spatial_dims, in_channels, out_channels, settings))


def _at(stage: str, layer: str, terms: Iterable[Term]) -> Iterator[Term]:
    return (replace(term, stage=stage, layer=layer) for term in terms)


def _lightm_unet(dims: int, image: int, classes: int, settings: Mapping[str, Any]) -> Iterator[Term]:
    width, vector = settings["base_channels"], settings.get("vector_scale", True)
    layer = LayerSettings(
        state_size=settings["state_size"],
        expand=settings["expand"],
        inner_norm=settings.get("inner_norm", True),
        vector_scale=vector,
        one_norm=settings.get("one_norm", False),
        parts=settings["parts"] if settings["layer"] != "rvm" else 1,
        shared=settings["layer"] == "spm-shared",
        ssm=settings["ssm"],
    )
    yield from _at("stem", "", stem(image, width, dims, full=settings["stem"] == "conv"))

    def mixing(stage: str, number: int, out: int) -> Iterator[Term]:
        if settings["position_conv"]:
            conv = Term("position conv", CONVOLUTION, f"3^{dims} C", 3**dims * width)
            yield from _at(stage, f"layer {number}", [conv])
        yield from _at(stage, f"layer {number}", mixing_layer(width, out, layer))

    for block, count in enumerate(settings["encoder_layers"], start=1):
        for number in range(1, count + 1):
            yield from mixing(f"encoder {block}", number, 2 * width if number == count else width)
        width *= 2
    for number in range(1, settings["bottleneck_layers"] + 1):
        yield from mixing("bottleneck", number, width)
    for stage in range(1, len(settings["encoder_layers"]) + 1):
        yield from _at(f"decoder {stage}", "", decoder_stage(width, dims, vector_scale=vector))
        width //= 2
    yield from _at("head", "", head(width, classes))


def _released(dims: int, image: int, classes: int, settings: Mapping[str, Any]) -> Iterator[Term]:
    width, states, expand = (settings[key] for key in ("base_channels", "state_size", "expand"))
    layer = LayerSettings(states, expand, inner_norm=False, vector_scale=False, one_norm=True)
    yield from _at("stem", "", stem(image, width, dims))
    for stage, count in enumerate(settings["blocks_down"]):
        if stage:
            yield from _at(f"stage {stage}", "widening layer", mixing_layer(width, 2 * width, layer))
            width *= 2
        for block in range(1, count + 1):
            for number in (1, 2):
                label = f"block {block}, layer {number}"
                norm = Term("group norms", NORM, "2 C", 2 * width)
                yield from _at(f"stage {stage}", label, [norm, *mixing_layer(width, width, layer)])
    for stage in range(1, len(settings["blocks_up"]) + 1):
        yield from _at(f"decoder {stage}", "", decoder_stage(width, dims, vector_scale=False))
        width //= 2
    yield from _at("head", "", head(width, classes))
