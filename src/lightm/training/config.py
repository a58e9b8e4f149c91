"""Recipes, and the configuration of one training: what the command line, YAML, Python and the run folder share."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, model_validator

from lightm.config_io import load_yaml, validated
from lightm.errors import InputError, did_you_mean
from lightm.files import write_text
from lightm.nets import DEFAULT
from lightm.options import Names, Options, PathText, Sizes
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


def _published(spatial_dims: int, **changes: Any) -> Recipe:
    """LightM-UNet, section 3.2: SGD 1e-4, polynomial decay, 100 epochs, 2 patches of 128^3 or 12 of 512^2.

    The epoch of 250 steps, Nesterov momentum 0.99, weight decay 3e-5 and clipping at 12 are nnU-Net's, on which the
    paper and the report ran.
    """
    values: dict[str, Any] = {
        "loss": "ce+dice",
        "optimizer": "sgd",
        "lr": 1e-4,
        "momentum": 0.99,
        "weight_decay": 3e-5,
        "clip_norm": 12.0,
        "schedule": "poly",
        "epochs": 100,
        "steps_per_epoch": 250,
        "patch_size": 128 if spatial_dims == 3 else 512,
        "batch_size": 2 if spatial_dims == 3 else 12,
        "foreground_fraction": 0.33,
    }
    return Recipe(**{**values, **changes})


RECIPES: dict[str, Callable[[int], Recipe]] = {
    "default": lambda spatial_dims: Recipe(lr=1e-2, warmup_steps=20),
    "paper": _published,
    "arsl": lambda spatial_dims: _published(spatial_dims, loss="ce+arsl"),
    # the released code's trainer
    "released": lambda spatial_dims: _published(spatial_dims, optimizer="adam", weight_decay=1e-5, eps=1e-5),
}
RENAMED = {"seed": "arsl"}
"""Names of earlier versions, which still work."""


def current_name(name: str) -> str:
    """Return today's name of a recipe; one of an earlier version is logged."""
    if name in RENAMED:
        _log.info("the recipe '%s' is called '%s' now", name, RENAMED[name])
    return RENAMED.get(name, name)


def get_recipe(name: str, spatial_dims: int) -> Recipe:
    """Return the recipe of that name for 2D or 3D data; InputError for an unknown name."""
    name = current_name(name)
    if name not in RECIPES:
        raise InputError(f"unknown recipe '{name}'{did_you_mean(name, RECIPES)} Known: {', '.join(RECIPES)}.")
    return RECIPES[name](spatial_dims)


def parse_duration(text: str | float) -> float:
    """Return seconds from "90s", "15m", "2h", "1h30m" or a number of seconds; InputError for anything else."""
    if isinstance(text, int | float) and not isinstance(text, bool):
        seconds = float(text)
    else:
        compact = str(text).strip().lower()
        match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?", compact)
        if not compact or match is None:
            raise InputError(f"duration '{text}': write it as 90s, 15m, 2h or 1h30m")
        hours, minutes, rest = (float(part or 0) for part in match.groups())
        seconds = 3600 * hours + 60 * minutes + rest
    if seconds <= 0:
        raise InputError(f"duration '{text}': must be longer than nothing")
    return seconds


Duration = Annotated[str | float, AfterValidator(parse_duration)]
"""A time in seconds, or as text such as "15m"; a float in seconds once validated."""


class TrainConfig(Recipe):
    """Everything that decides a training run: the options of `lightm.train`, of `lightm train` and of its YAML file.

    The fields of `Recipe` (loss, lr, epochs, ...) override the recipe that `recipe` names; `resolved` fills in those
    that were not given. A run keeps its resolved configuration as `config.yaml`, which `--config` takes too. Without
    `epochs` a time budget alone ends the training. The nested form of earlier versions (`settings: {lr: ...}`) is
    read too.

    >>> config = lightm.TrainConfig(recipe="arsl", lr=1e-3)
    >>> resolved = config.resolved(spatial_dims=3)
    >>> resolved.loss, resolved.lr, resolved.optimizer, resolved.patch_size
    ('ce+arsl', 0.001, 'sgd', 128)
    """

    dataset: PathText = Field("", description="Data set.", json_schema_extra={"cli": False})
    labels: PathText | None = Field(None, description="Folder of labels, when DATASET is a folder of images.")
    channels: Names | None = Field(None, description="Names of the channels: CT, or T1,T2.")
    trust_image_geometry: bool = Field(False, description="Take labels to lie where the image does.")
    network: str = Field(DEFAULT, description="Network: a preset or a baseline.")
    network_options: dict[str, Any] = Field(default_factory=dict, description="Options of the network: {layer: spm}.")
    recipe: Annotated[str, AfterValidator(current_name)] = Field(
        "default", description="Recipe: default, paper, arsl or released."
    )
    plan: PathText | None = Field(None, description="Plan to use instead of DATASET/plan.yaml.")
    split: PathText | None = Field(
        None, description="split.json of another run, or nnU-Net's splits_final.json (then with --fold)."
    )
    split_seed: int = Field(0, ge=0, description="Seed of the split.")
    folds: int | None = Field(None, ge=2, description="Number of folds, instead of 7:1:2; 5 with --fold.")
    fold: Annotated[int, Field(ge=0)] | Literal["all"] | None = Field(
        None, description="The fold to test, from 0; all: train on every case."
    )
    group_by: str | None = Field(
        None,
        description="Regular expression; cases in which it finds the same, as of one patient, stay in one part.",
        json_schema_extra={"text": True},
    )
    seed: int = Field(0, ge=0, description="Seed of weights and patches.")
    max_time: Duration | None = Field(None, description="Time budget of the training: 90s, 15m, 2h.")
    patience: int | None = Field(None, ge=1, description="Epochs without a better smoothed Dice before stopping.")
    val_patches: int = Field(16, ge=1, description="Patches per validation.")
    workers: int | None = Field(
        None, ge=0, description="Processes that prepare patches; default: none on the CPU, up to 4 beside a GPU."
    )
    device: str = Field("auto", description="auto (a GPU if there is one), cpu, cuda, cuda:1, mps or gpu.")
    precision: str = Field(
        "auto", description="32-true, bf16-mixed or 16-mixed; auto: bf16-mixed on a GPU that has it, else 32-true."
    )
    on_nan: Literal["stop", "skip"] = Field("stop", description="At a loss or gradient that is NaN: stop or skip.")
    nan_limit: int = Field(10, ge=1, description="Steps that --on-nan skip may skip.")
    val_cases: int = Field(
        20, ge=0, description="Whole validation cases, at most, that choose weights and post-processing; 0: none."
    )
    postprocess: bool = Field(True, description="Choose post-processing on the whole validation cases.")
    test: bool = Field(True, description="Predict and score the test cases and write the report.")

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, given: Any) -> Any:
        """Take the nested form of earlier versions."""
        if not isinstance(given, Mapping):
            return given
        values = dict(given)
        if (settings := values.pop("settings", None)) is not None:
            if not isinstance(settings, Mapping):
                raise ValueError(f"settings: expected keys and values, got {settings!r}")
            for key in (key for key in settings if key not in Recipe.model_fields):
                raise ValueError(f"unknown key 'settings.{key}'{did_you_mean(str(key), Recipe.model_fields)}")
            values = {**settings, **values}
        if "max_time_s" in values:
            values.setdefault("max_time", values.pop("max_time_s"))
        if values.pop("epochs_given", None) is False:
            values.pop("epochs", None)
        if "folds" in values and values["folds"] is None and values.get("fold") == 0:
            del values["fold"]  # as runs of earlier versions say that there are no folds
        return values

    @model_validator(mode="after")
    def _five(self) -> TrainConfig:
        if isinstance(self.fold, int) and self.folds is None and self.split is None:
            self.folds = 5
        if self.folds is not None and self.fold is None:
            self.fold = 0
        return self

    @property
    def reading(self) -> dict[str, Any]:
        """How `open_dataset` is to open the data set."""
        return self.model_dump(include={"labels", "channels", "trust_image_geometry"})

    @property
    def max_time_s(self) -> float | None:
        """The time budget in seconds; the learning rate falls over it."""
        return None if self.max_time is None else float(self.max_time)

    @property
    def epochs_given(self) -> bool:
        """Whether the number of epochs was asked for; else a time budget alone decides."""
        return "epochs" in self.model_fields_set

    def resolved(self, spatial_dims: int) -> TrainConfig:
        """Return the configuration with all that was not given taken from its recipe; InputError for an unknown one."""
        recipe, given = get_recipe(self.recipe, spatial_dims), self.model_fields_set
        update = {name: getattr(recipe, name) for name in Recipe.model_fields if name not in given}
        if "augment" in given:
            changes = {name: getattr(self.augment, name) for name in self.augment.model_fields_set}
            update["augment"] = recipe.augment.model_copy(update=changes)
        config = self.model_copy(update=update)
        if not self.epochs_given:
            config.model_fields_set.discard("epochs")
        return config

    def save(self, path: Path) -> None:
        """Write the configuration as YAML; epochs that were not asked for stay out, so that they are not later."""
        content = self.model_dump(mode="json", exclude=None if self.epochs_given else {"epochs"})
        write_text(path, yaml.safe_dump(content, sort_keys=False))


class ResumeOptions(Options):
    """What may change when a run is resumed; all else is as it was started."""

    dataset: PathText | None = Field(None, description="Where the data set is now, if it was moved.")
    labels: PathText | None = Field(None, description="Where its folder of labels is now, if it was moved.")
    epochs: int | None = Field(None, ge=1, description="Epochs of the whole run.")
    max_time: Duration | None = Field(None, description="Time budget of the whole run: 90s, 15m, 2h.")
    patience: int | None = Field(None, ge=1, description="Epochs without a better smoothed Dice before stopping.")
    workers: int | None = Field(None, ge=0, description="Processes that prepare patches.")
    val_cases: int | None = Field(None, ge=0, description="Whole validation cases that choose weights; 0: none.")
    postprocess: bool | None = Field(None, description="Choose post-processing on the whole validation cases.")
    test: bool | None = Field(None, description="Predict and score the test cases and write the report.")


def resolve_config(dataset: str, spatial_dims: int, **fields: Any) -> TrainConfig:
    """Return a full configuration of the fields of TrainConfig; InputError names unknown keys and impossible values."""
    return validated(TrainConfig, {**fields, "dataset": dataset}, "training configuration").resolved(spatial_dims)


def load_config(path: Path) -> TrainConfig:
    """Read the `config.yaml` of a run, of an earlier version too; InputError names the file and the key."""
    return load_yaml(path, TrainConfig)
