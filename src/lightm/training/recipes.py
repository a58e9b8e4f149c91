"""Recipes: everything that a training needs besides the data, the network and the seed, by name."""

from __future__ import annotations

import logging
from typing import Any, Literal

from pydantic import Field

from lightm.errors import InputError, did_you_mean
from lightm.options import Options, Sizes
from lightm.preparation.augment import AugmentConfig

_log = logging.getLogger(__name__)


class Recipe(Options):
    """Settings of a training; every field can be overridden by the run's configuration.

    `schedule` falls from `lr` to 0 over the run: "poly" with (1 - progress)^0.9, "cosine" with half a cosine,
    "constant" not at all; progress is that of the steps or that of the time budget, whichever is further.
    """

    loss: str = Field("ce+dice", description="Loss, such as ce+dice or ce+arsl.")
    loss_options: dict[str, Any] = Field(default_factory=dict, description="Options of the loss: {gamma: 2}.")
    optimizer: Literal["adamw", "adam", "sgd"] = Field("adamw", description="adamw, adam or sgd.")
    lr: float = Field(1e-3, gt=0, description="Learning rate.")
    momentum: float = Field(0.99, ge=0, lt=1, description="Nesterov momentum of sgd.")
    weight_decay: float = Field(1e-2, ge=0, description="Weight decay.")
    eps: float = Field(1e-8, gt=0, description="Epsilon of adamw and adam.")
    clip_norm: float | None = Field(1.0, gt=0, description="Largest norm of the gradients.")
    schedule: Literal["poly", "cosine", "constant"] = Field("poly", description="poly, cosine or constant.")
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rate rises.")
    epochs: int = Field(100, ge=1, description="Epochs.")
    steps_per_epoch: int = Field(50, ge=1, description="Optimiser steps per epoch.")
    patch_size: Sizes | int | None = Field(None, description="Patch in voxels, z,y,x: 40,56,40; default: the plan's.")
    batch_size: int | None = Field(None, ge=1, description="Patches per step; default: the plan's.")
    foreground_fraction: float = Field(0.5, ge=0, le=1, description="Share of patches that are centred on foreground.")
    augment: AugmentConfig = Field(default_factory=AugmentConfig, description="Augmentation: {mirror_axes: [0, 1]}.")


def _published(loss: str, spatial_dims: int) -> Recipe:
    """LightM-UNet, section 3.2: SGD 1e-4, polynomial decay, 100 epochs, 2 patches of 128^3 or 12 of 512^2.

    The epoch of 250 steps, Nesterov momentum 0.99, weight decay 3e-5 and clipping at 12 are nnU-Net's, on which the
    paper and the report ran.
    """
    return Recipe(
        loss=loss,
        optimizer="sgd",
        lr=1e-4,
        momentum=0.99,
        weight_decay=3e-5,
        clip_norm=12.0,
        schedule="poly",
        epochs=100,
        steps_per_epoch=250,
        patch_size=128 if spatial_dims == 3 else 512,
        batch_size=2 if spatial_dims == 3 else 12,
        foreground_fraction=0.33,
    )


def _default(spatial_dims: int) -> Recipe:
    return Recipe(lr=1e-2, warmup_steps=20)


def _paper(spatial_dims: int) -> Recipe:
    return _published("ce+dice", spatial_dims)


def _arsl(spatial_dims: int) -> Recipe:
    return _published("ce+arsl", spatial_dims)


def _released(spatial_dims: int) -> Recipe:
    """The released code's trainer: Adam 1e-4, weight decay 1e-5, eps 1e-5, gradient norm 12."""
    return _published("ce+dice", spatial_dims).model_copy(
        update={"optimizer": "adam", "lr": 1e-4, "weight_decay": 1e-5, "eps": 1e-5, "clip_norm": 12.0}
    )


RECIPES = {"default": _default, "paper": _paper, "arsl": _arsl, "released": _released}
RENAMED = {"seed": "arsl"}
"""Names of earlier versions, which still work."""


def current_name(name: str) -> str:
    """Return a recipe's name of today; one of an earlier version is logged."""
    if name in RENAMED:
        _log.info("the recipe '%s' is called '%s' now", name, RENAMED[name])
    return RENAMED.get(name, name)


def get_recipe(name: str, spatial_dims: int) -> Recipe:
    """Return the recipe of that name for 2D or 3D data; InputError for an unknown name."""
    name = current_name(name)
    if name not in RECIPES:
        raise InputError(f"unknown recipe '{name}'{did_you_mean(name, RECIPES)} Known: {', '.join(RECIPES)}.")
    return RECIPES[name](spatial_dims)
