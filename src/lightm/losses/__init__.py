"""Losses by name: cross-entropies, Dice, (focal) Tversky, the adaptive region-specific loss, and sums of them."""

from __future__ import annotations

import inspect
from typing import Any

from lightm.errors import InputError, did_you_mean
from lightm.losses.base import IGNORE_INDEX, SegmentationLoss, WeightedSum
from lightm.losses.overlap import Dice, FocalTversky, Tversky
from lightm.losses.region_adaptive import AdaptiveRegion
from lightm.losses.voxelwise import BinaryCrossEntropy, CrossEntropy, TopK

LOSSES: dict[str, type[SegmentationLoss]] = {
    "arsl": AdaptiveRegion,
    "bce": BinaryCrossEntropy,
    "ce": CrossEntropy,
    "dice": Dice,
    "focal-tversky": FocalTversky,
    "topk": TopK,
    "tversky": Tversky,
}
NAMES = (*sorted(LOSSES), "bce+dice", "ce+arsl", "ce+dice", "ce+focal-tversky", "ce+tversky", "topk+dice")

__all__ = [
    "IGNORE_INDEX",
    "LOSSES",
    "NAMES",
    "AdaptiveRegion",
    "BinaryCrossEntropy",
    "CrossEntropy",
    "Dice",
    "FocalTversky",
    "SegmentationLoss",
    "TopK",
    "Tversky",
    "WeightedSum",
    "create_loss",
]


def create_loss(name: str, *, spatial_dims: int, num_classes: int, **options: Any) -> SegmentationLoss:
    """Return the loss called `name`, one of LOSSES ("ce", "dice", "arsl", ...), or a sum such as "ce+dice".

    A sum joins any of them with "+"; `weights=(1.0, 0.5)` weighs its parts in the order of the name (default
    1 each). Every other option goes to the parts that know it: `include_background` and `batch` (overlap
    losses), `smooth` (Dice), `alpha`, `beta` (Tversky), `gamma` (focal Tversky), `k` (topk), `regions`,
    `region_size`, `skip_empty`, ... (ARSL), `class_weights` (ce, bce).

    The result is called as loss(logits (B, K, *spatial), target (B, *spatial) class indices, 255 = ignore)
    and returns a float32 scalar. Raises InputError for an unknown name or option.

    >>> import torch
    >>> loss = lightm.loss("ce+dice", spatial_dims=2, num_classes=2)
    >>> logits, target = torch.zeros(1, 2, 8, 8), torch.zeros(1, 8, 8, dtype=torch.long)
    >>> round(loss(logits, target).item(), 3)
    1.693
    """
    parts = [part.strip() for part in name.lower().split("+")]
    for part in parts:
        if part not in LOSSES:
            hint = did_you_mean(name.lower(), NAMES) if len(parts) == 1 else did_you_mean(part, LOSSES)
            raise InputError(
                f"unknown loss {name!r}: expected one of {', '.join(sorted(LOSSES))}, or a sum such as ce+dice{hint}"
            )
    if len(set(parts)) < len(parts):
        raise InputError(f"loss {name!r} names a part twice; weigh the parts with weights=(...) instead")
    known = {part: _options(LOSSES[part]) for part in parts}
    weights = options.pop("weights", None)
    if weights is not None and len(parts) == 1:
        raise InputError(f"loss {name!r} has one part: weights={weights!r} has nothing to weigh; leave it out")
    for option in options:
        if not any(option in names for names in known.values()):
            valid = sorted(set().union(*known.values()) | ({"weights"} if len(parts) > 1 else set()))
            raise InputError(
                f"loss {name!r} has no option {option!r}: expected one of {', '.join(valid)}"
                f"{did_you_mean(option, valid)}"
            )
    losses = [
        LOSSES[part](
            spatial_dims=spatial_dims,
            num_classes=num_classes,
            **{key: value for key, value in options.items() if key in known[part]},
        )
        for part in parts
    ]
    return losses[0] if len(losses) == 1 else WeightedSum(losses, weights)


def _options(loss: type[SegmentationLoss]) -> set[str]:
    return set(inspect.signature(loss).parameters) - {"spatial_dims", "num_classes"}
