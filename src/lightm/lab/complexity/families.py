"""Whole networks as closed forms: which layers of which widths a preset's settings call for, stage by stage."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from lightm.lab.complexity import formulas
from lightm.lab.complexity.formulas import LayerSettings, Term
from lightm.nets.lightm_unet import LightMUNet, ReleasedLightMUNet
from lightm.nets.presets import PRESETS


def settings_of(name: str, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return what builds a preset and its complete settings: defaults, then the preset's, then the options."""
    build, given = PRESETS[name]
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(build).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
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
    return formulas.merged(family(spatial_dims, in_channels, out_channels, settings))


def _at(stage: str, layer: str, terms: Iterable[Term]) -> Iterator[Term]:
    return (replace(term, stage=stage, layer=layer) for term in terms)


def _layer_settings(settings: Mapping[str, Any]) -> LayerSettings:
    spm = settings["layer"] != "rvm"
    return LayerSettings(
        state_size=settings["state_size"],
        expand=settings["expand"],
        inner_norm=settings.get("inner_norm", True),
        vector_scale=settings.get("vector_scale", True),
        one_norm=settings.get("one_norm", False),
        parts=settings["parts"] if spm else 1,
        shared=settings["layer"] == "spm-shared",
        ssm=settings["ssm"],
    )


def _lightm_unet(dims: int, image: int, classes: int, settings: Mapping[str, Any]) -> Iterator[Term]:
    layer, width = _layer_settings(settings), settings["base_channels"]
    stem = formulas.full_stem if settings["stem"] == "conv" else formulas.depthwise_stem
    yield from _at("stem", "", stem(image, width, dims))

    def mixing(stage: str, number: int, out: int) -> Iterator[Term]:
        label = f"layer {number}"
        if settings["position_conv"]:
            yield from _at(stage, label, [formulas.position_conv(width, dims)])
        yield from _at(stage, label, formulas.mixing_layer(width, out, layer))

    for block, count in enumerate(settings["encoder_layers"], start=1):
        for number in range(1, count + 1):
            yield from mixing(f"encoder {block}", number, 2 * width if number == count else width)
        width *= 2
    for number in range(1, settings["bottleneck_layers"] + 1):
        yield from mixing("bottleneck", number, width)
    for stage in range(1, len(settings["encoder_layers"]) + 1):
        terms = formulas.decoder_stage(width, dims, vector_scale=settings.get("vector_scale", True))
        yield from _at(f"decoder {stage}", "", terms)
        width //= 2
    yield from _at("head", "", formulas.head(width, classes))


def _released(dims: int, image: int, classes: int, settings: Mapping[str, Any]) -> Iterator[Term]:
    layer = LayerSettings(
        state_size=settings["state_size"],
        expand=settings["expand"],
        inner_norm=False,
        vector_scale=False,
        one_norm=True,
    )
    width = settings["base_channels"]
    yield from _at("stem", "", formulas.depthwise_stem(image, width, dims))
    for stage, count in enumerate(settings["blocks_down"]):
        if stage:
            yield from _at(f"stage {stage}", "widening layer", formulas.mixing_layer(width, 2 * width, layer))
            width *= 2
        for block in range(1, count + 1):
            for number in (1, 2):
                label = f"block {block}, layer {number}"
                yield from _at(f"stage {stage}", label, [formulas.group_norm(width)])
                yield from _at(f"stage {stage}", label, formulas.mixing_layer(width, width, layer))
    for stage in range(1, len(settings["blocks_up"]) + 1):
        yield from _at(f"decoder {stage}", "", formulas.decoder_stage(width, dims, vector_scale=False))
        width //= 2
    yield from _at("head", "", formulas.head(width, classes))
