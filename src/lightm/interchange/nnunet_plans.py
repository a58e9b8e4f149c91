"""nnU-Net's plans as far as LightM's plan can express them, with remarks on all that it cannot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from lightm.errors import InputError, did_you_mean
from lightm.preparation.plan import ChannelNormalization

_LARGEST = 3.4e38  # float32's; clipping there changes nothing
_FLAT_SPACING = 900  # mm; nnU-Net gives true 2D images 999 along the axis that they have not


@dataclass
class NnunetPlan:
    """What was found: spacing in mm and patch in voxels, both in the order (z, y, x) or (y, x)."""

    spacing_mm: list[float]
    patch_size: list[int]
    normalization: list[ChannelNormalization]
    batch_size: int = 2
    intensities: list[dict[str, float]] = field(default_factory=list)
    median_shape: list[int] | None = None
    dataset: str | None = None
    remarks: list[str] = field(default_factory=list)


def read_nnunet_plans(
    plans: Mapping[str, Any], configuration: str | None, spatial_dims: int, channels: int
) -> NnunetPlan:
    """Take from nnU-Net's plans (version 2) what a plan of LightM holds.

    configuration: `2d`, `3d_fullres`, `3d_lowres`, ...; by default the one of that many dimensions. Normalisation:
    CTNormalization, ZScoreNormalization, NoNormalization and RGBTo01Normalization have equivalents; for others, and
    for a z-score inside a mask, the z-score over the whole image is taken and a remark made.
    Raises InputError for plans without the configuration, of other dimensions, or with values of a wrong kind.
    """
    known = plans.get("configurations")
    if not isinstance(known, dict) or not known:
        raise InputError("no 'configurations'; expected plans of nnU-Net version 2, such as nnUNetPlans.json")
    name = configuration or ("2d" if spatial_dims == 2 else "3d_fullres")
    chosen = _inherited(known, name)
    spacing = _numbers(chosen, "spacing", name)
    patch = [int(size) for size in _numbers(chosen, "patch_size", name)]
    if len(spacing) != spatial_dims or len(patch) != spatial_dims:
        raise InputError(
            f"configuration '{name}' has a patch of {len(patch)} axes, the network {spatial_dims}; choose another with "
            f"--configuration ({', '.join(known)})"
        )
    remarks = []
    if chosen.get("previous_stage"):
        remarks.append(f"'{name}' expects the prediction of '{chosen['previous_stage']}' as input, which is not given")
    original = plans.get("original_median_spacing_after_transp")
    if spatial_dims == 2 and _fits(original, 3) and _number(original[0], "original spacing") < _FLAT_SPACING:
        remarks.append("the network was trained on slices of volumes; `lightm predict` takes 2D images for it")
    order = plans.get("transpose_forward")
    axes = list(range(3))
    if isinstance(order, list) and order != axes and sorted(order) == axes:
        if spatial_dims == 3:
            spacing = [spacing[order.index(axis)] for axis in axes]
            patch = [patch[order.index(axis)] for axis in axes]
        remarks.append(
            f"nnU-Net permuted the axes by {order} before the network, LightM does not; predictions will differ"
        )
    stats = plans.get("foreground_intensity_properties_per_channel")
    stats = stats if isinstance(stats, dict) else {}
    schemes = chosen.get("normalization_schemes")
    if not isinstance(schemes, list) or len(schemes) != channels:
        raise InputError(
            f"configuration '{name}' has not one of 'normalization_schemes' for each of {channels} channels"
        )
    masks = chosen.get("use_mask_for_norm")
    normalization = [
        _scheme(
            str(scheme), stats.get(str(index)), bool(masks[index]) if _fits(masks, channels) else False, index, remarks
        )
        for index, scheme in enumerate(schemes)
    ]
    shape = chosen.get("median_image_size_in_voxels")
    return NnunetPlan(
        spacing_mm=spacing,
        patch_size=patch,
        batch_size=max(1, int(_number(chosen.get("batch_size", 2), "batch_size"))),
        normalization=normalization,
        intensities=[found for index in range(channels) if (found := _intensities(stats.get(str(index))))],
        median_shape=[round(float(size)) for size in shape] if _fits(shape, spatial_dims) else patch,
        dataset=plans["dataset_name"] if isinstance(plans.get("dataset_name"), str) else None,
        remarks=remarks,
    )


def _inherited(known: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The configuration with what it takes over from others; they may not go in circles."""
    result: dict[str, Any] = {}
    seen: list[str] = []
    while True:
        chosen = known.get(name)
        if not isinstance(chosen, dict) or name in seen:
            near = did_you_mean(name, known)
            raise InputError(f"no configuration '{name}'{near or '.'} Known: {', '.join(known)}")
        result = {**chosen, **result}
        seen.append(name)
        if not isinstance(chosen.get("inherits_from"), str):
            return result
        name = chosen["inherits_from"]


def _scheme(name: str, stats: Any, masked: bool, channel: int, remarks: list[str]) -> ChannelNormalization:
    if name == "CTNormalization":
        found = _intensities(stats)
        if found and found["low"] < found["high"] and found["std"] > 0:
            return ChannelNormalization(
                scheme="ct", clip_low=found["low"], clip_high=found["high"], mean=found["mean"], std=found["std"]
            )
        raise InputError(
            f"channel {channel} is normalised by CTNormalization, but its "
            "'foreground_intensity_properties_per_channel' are missing or not usable; give a plan.yaml of LightM"
        )
    if name == "NoNormalization":
        return ChannelNormalization(scheme="none")
    if name == "RGBTo01Normalization":
        return ChannelNormalization(scheme="rgb_to_0_1")
    if name == "RescaleTo01Normalization":
        return ChannelNormalization(scheme="rescale_to_0_1")
    if name != "ZScoreNormalization":
        remarks.append(
            f"channel {channel}: {name} has no equivalent here; the z-score is used, predictions will differ"
        )
    elif masked:
        remarks.append(
            f"channel {channel}: nnU-Net's z-score looks only at voxels that are not zero, LightM's at all; on images "
            "with a background of zeros predictions will differ"
        )
    return ChannelNormalization(scheme="zscore")


def _intensities(stats: Any) -> dict[str, float]:
    """nnU-Net's figures under LightM's names, or nothing when they are not complete."""
    names = {"low": "percentile_00_5", "high": "percentile_99_5"}
    result = {}
    for key in ("mean", "std", "median", "low", "high", "min", "max"):
        value = stats.get(names.get(key, key)) if isinstance(stats, dict) else None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return {}
        result[key] = float(value)
    return result


def _fits(value: Any, length: int) -> TypeGuard[list[Any]]:
    return isinstance(value, (list, tuple)) and len(value) == length


def _numbers(chosen: Mapping[str, Any], key: str, name: str) -> list[float]:
    value = chosen.get(key)
    if not isinstance(value, Sequence) or isinstance(value, str) or not 2 <= len(value) <= 3:
        raise InputError(f"configuration '{name}': '{key}' is {value!r}; expected 2 or 3 numbers")
    return [_number(part, key) for part in value]


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"'{key}' holds {value!r}, which is no number")
    return float(value)
