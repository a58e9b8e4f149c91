"""Losses by name: cross-entropies, Dice, (focal) Tversky, the adaptive region-specific loss, sums of them, own ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from lightm.errors import InputError, did_you_mean
from lightm.losses.base import IGNORE_INDEX, CustomLoss, SegmentationLoss, WeightedSum
from lightm.losses.overlap import Dice, FocalTversky, Tversky
from lightm.losses.region_adaptive import AdaptiveRegion
from lightm.losses.voxelwise import BinaryCrossEntropy, CrossEntropy, TopK
from lightm.registry import Registry

LossBuilder = Callable[..., Any]


def _wrap(builder: Any) -> LossBuilder:
    if not callable(builder):
        raise InputError(
            f"loss builder {builder!r}: expected a class or function that is called as builder(spatial_dims=..., "
            "num_classes=..., **options) and returns a loss, a callable of logits and target"
        )
    result: LossBuilder = builder
    return result


LOSSES: Registry[LossBuilder] = Registry(
    "loss",
    "lightm.losses",
    _wrap,
    hint="Sums such as ce+dice are known too; add a loss with lightm.register_loss(name, builder).",
)
for _name, _builder in {
    "arsl": AdaptiveRegion,
    "bce": BinaryCrossEntropy,
    "ce": CrossEntropy,
    "dice": Dice,
    "focal-tversky": FocalTversky,
    "topk": TopK,
    "tversky": Tversky,
}.items():
    LOSSES.add_built_in(_name, _builder)
NAMES = (*LOSSES.names(), "bce+dice", "ce+arsl", "ce+dice", "ce+focal-tversky", "ce+tversky", "topk+dice")

__all__ = [
    "IGNORE_INDEX",
    "LOSSES",
    "NAMES",
    "AdaptiveRegion",
    "BinaryCrossEntropy",
    "CrossEntropy",
    "CustomLoss",
    "Dice",
    "FocalTversky",
    "SegmentationLoss",
    "TopK",
    "Tversky",
    "WeightedSum",
    "create_loss",
    "loss",
    "register_loss",
]


def register_loss(name: str, builder: LossBuilder, *, overwrite: bool = False) -> None:
    """Make a loss of one's own known by a name, wherever LightM takes the name of a loss: alone or in a sum.

    builder: a class or function, called as builder(spatial_dims=..., num_classes=..., **options), of which it needs to
    take only what it uses; it returns a callable (logits (B, K, *S), target (B, *S) class indices) -> scalar tensor,
    which is used as `CustomLoss` describes: ignored voxels are labelled 255 (`IGNORE_INDEX`). A subclass of
    `SegmentationLoss` gets what its own `compute` is given.

    The command line and other programs know the name if a package declares it as an entry point of the group
    "lightm.losses" (in pyproject.toml: `[project.entry-points."lightm.losses"]`, `my-loss = "my_package:MyLoss"`).

    Raises InputError for a name that is taken (LightM's own are never replaced, others with `overwrite`) or is not one
    lower-case word, and for a builder that cannot be called.

    >>> import torch
    >>> from torch.nn.functional import cross_entropy
    >>> def smoothed(smoothing=0.1):
    ...     return lambda logits, target: cross_entropy(
    ...         logits, target, label_smoothing=smoothing, ignore_index=255
    ...     )
    >>> lightm.register_loss("smoothed-example", smoothed, overwrite=True)
    >>> both = lightm.loss("smoothed-example+dice", spatial_dims=2, num_classes=3, smoothing=0.2)
    >>> both(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)).shape
    torch.Size([])
    """
    LOSSES.register(name, builder, overwrite=overwrite)


def loss(
    name: str,
    *,
    spatial_dims: int = 3,
    num_classes: int = 2,
    label_regions: Sequence[Sequence[int]] | None = None,
    **options: Any,
) -> SegmentationLoss:
    """Return the loss called `name` ("ce", "dice", "arsl", ..., or a registered one), or a sum such as "ce+dice".

    A sum joins any of them with "+"; `weights=(1.0, 0.5)` weighs its parts in the order of the name (default 1 each).
    Every other option goes to the parts that know it: `include_background` and `batch` (overlap losses), `smooth`
    (Dice), `alpha`, `beta` (Tversky), `gamma` (focal Tversky), `k` (topk), `class_weights` (ce, bce), `regions`,
    `region_size`, `skip_empty`, ... (ARSL).

    The result is called as loss(logits (B, K, *spatial), target (B, *spatial) class indices, 255 = ignore) and returns
    a float32 scalar. Raises InputError for an unknown name or option.

    label_regions: the class indices of each of K overlapping regions, [[1, 2], [2]], for networks with one sigmoid for
    each. Binary cross-entropy takes the place of cross-entropy then (`bce` of `ce`), as in nnU-Net; the others count
    overlap region by region. InputError for a registered loss that does not take them.

    >>> import torch
    >>> criterion = lightm.loss("ce+dice", spatial_dims=2, num_classes=2)
    >>> logits, target = torch.zeros(1, 2, 8, 8), torch.zeros(1, 8, 8, dtype=torch.long)
    >>> round(criterion(logits, target).item(), 3)
    1.693
    """
    parts = [part.strip() for part in name.lower().split("+")]
    if label_regions is not None:
        parts = ["bce" if part == "ce" else part for part in parts]
    if len(parts) == 1 and parts[0] not in LOSSES:
        hint = did_you_mean(parts[0], NAMES)  # sums too
        if hint:
            raise InputError(f"unknown loss {name!r}{hint} Known: {', '.join(sorted(LOSSES.names()))}, and sums.")
    builders = {part: LOSSES[part] for part in parts}
    if len(builders) < len(parts):
        if label_regions is not None and {"ce", "bce"} <= set(name.lower().split("+")):
            raise InputError(f"loss {name!r}: of regions ce is bce; name one of the two")
        raise InputError(f"loss {name!r} names a part twice; weigh the parts with weights=(...) instead")
    known = {part: _options(builder) for part, builder in builders.items()}
    weights = options.pop("weights", None)
    if weights is not None and len(parts) == 1:
        raise InputError(f"loss {name!r} has one part: weights={weights!r} has nothing to weigh; leave it out")
    for option in options:
        if not any(taken is None or option in taken for taken in known.values()):
            valid = sorted({name for taken in known.values() for name in taken or ()} - _SIZES)
            valid += ["weights"] if len(parts) > 1 else []
            raise InputError(
                f"loss {name!r} has no option {option!r}: expected one of {', '.join(valid)}"
                f"{did_you_mean(option, valid)}"
            )
    sizes: dict[str, Any] = {"spatial_dims": spatial_dims, "num_classes": num_classes}
    if label_regions is not None:
        sizes["label_regions"] = tuple(map(tuple, label_regions))
    losses = [_build(part, builder, known[part], sizes, options) for part, builder in builders.items()]
    return losses[0] if len(losses) == 1 else WeightedSum(losses, weights)


create_loss = loss  # inside of this package, where a variable is called loss

_SIZES = {"spatial_dims", "num_classes", "label_regions"}


def _build(
    name: str, builder: LossBuilder, taken: set[str] | None, sizes: dict[str, Any], options: dict[str, Any]
) -> SegmentationLoss:
    given = {key: value for key, value in {**options, **sizes}.items() if taken is None or key in taken}
    try:
        made = builder(**given)
    except (TypeError, ValueError) as error:
        if LOSSES.is_built_in(name):
            raise
        raise InputError(f"loss '{name}': {error}") from error
    if isinstance(made, SegmentationLoss):
        return knowing_regions(made, sizes.get("label_regions"), f"loss '{name}'")
    if not callable(made):
        raise InputError(f"loss '{name}': its builder returned {type(made).__name__}, expected a callable")
    return CustomLoss(made, **sizes)


def knowing_regions(made: SegmentationLoss, regions: Sequence[Sequence[int]] | None, what: str) -> SegmentationLoss:
    """Return the loss if it was made for these label regions, or for none; InputError else."""
    if regions is not None and made.label_regions is None:
        raise InputError(
            f"{what} takes the softmax of classes that exclude each other, but the labels are regions; use another "
            "loss, such as ce+dice, or give label_regions to a loss of your own"
        )
    if made.label_regions != regions:
        raise InputError(f"{what} was made for label_regions={made.label_regions}, but the labels have {regions}")
    return made


def _options(builder: LossBuilder) -> set[str] | None:
    """Names of the arguments that a builder takes; None: any."""
    parameters = inspect.signature(builder).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name for parameter in parameters}
