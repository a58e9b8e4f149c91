"""The configuration of one training: what the command line, a YAML file, Python and the run folder share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from lightm.config_io import load_yaml, validated
from lightm.errors import InputError, did_you_mean
from lightm.files import write_text
from lightm.nets import DEFAULT
from lightm.options import PathText
from lightm.training.recipes import Recipe, current_name, get_recipe


class TrainConfig(Recipe):
    """Everything that decides a training run: the options of `lightm.train`, of `lightm train` and of its YAML file.

    The fields of `Recipe` (loss, lr, epochs, ...) override the recipe that `recipe` names; `resolved` fills in those
    that were not given. A run keeps its resolved configuration as `config.yaml`, which `--config` takes too. Without
    `epochs` a time budget alone ends the training. The nested form of earlier versions (`settings: {lr: ...}`) is
    read as well.

    >>> config = lightm.TrainConfig(recipe="arsl", lr=1e-3)
    >>> resolved = config.resolved(spatial_dims=3)
    >>> resolved.loss, resolved.lr, resolved.optimizer, resolved.patch_size
    ('ce+arsl', 0.001, 'sgd', 128)
    """

    dataset: PathText = Field("", description="Data set.", json_schema_extra={"cli": False})
    labels: PathText | None = Field(None, description="Folder of labels, when DATASET is a folder of images.")
    network: str = Field(DEFAULT, description="Network: a preset or a baseline.")
    network_options: dict[str, Any] = Field(default_factory=dict, description="Options of the network: {layer: spm}.")
    recipe: str = Field("default", description="Recipe: default, paper, arsl or released.")
    plan: PathText | None = Field(None, description="Plan to use instead of DATASET/plan.yaml.")
    split: PathText | None = Field(None, description="split.json of another run, to use the same split.")
    split_seed: int = Field(0, ge=0, description="Seed of the split.")
    folds: int | None = Field(None, ge=2, description="Number of folds, instead of 7:1:2.")
    fold: int = Field(0, ge=0, description="The fold to test.")
    seed: int = Field(0, ge=0, description="Seed of weights and patches.")
    max_time: str | float | None = Field(None, description="Time budget of the training: 90s, 15m, 2h.")
    patience: int | None = Field(None, ge=1, description="Epochs without a better EMA pseudo Dice before stopping.")
    val_patches: int = Field(16, ge=1, description="Patches per validation.")
    workers: int = Field(0, ge=0, description="Processes that prepare patches.")
    device: str = Field("cpu", description="cpu or cuda.")
    precision: str = Field("32-true", description="Floating-point precision of the training.")
    on_nan: Literal["stop", "skip"] = Field("stop", description="At a loss or gradient that is NaN: stop or skip.")
    nan_limit: int = Field(10, ge=1, description="Steps that --on-nan skip may skip.")
    postprocess: bool = Field(True, description="Choose post-processing on the validation cases.")
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
            for key in settings:
                if key not in Recipe.model_fields:
                    raise ValueError(f"unknown key 'settings.{key}'{did_you_mean(str(key), Recipe.model_fields)}")
            values = {**settings, **values}
        if "max_time_s" in values:
            values.setdefault("max_time", values.pop("max_time_s"))
        if values.pop("epochs_given", None) is False:
            values.pop("epochs", None)
        return values

    @field_validator("recipe")
    @classmethod
    def _current(cls, name: str) -> str:
        return current_name(name)

    @field_validator("max_time")
    @classmethod
    def _seconds(cls, given: str | float | None) -> float | None:
        return None if given is None else parse_duration(given)

    @property
    def settings(self) -> Recipe:
        """The settings of the recipe, with what overrides them."""
        return self

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


def resolve_config(dataset: str, spatial_dims: int, **fields: Any) -> TrainConfig:
    """Return a full configuration for a data set; `fields` as in TrainConfig.

    Raises InputError for unknown keys (with the nearest known one) and impossible values.
    """
    config = validated(TrainConfig, {**fields, "dataset": dataset}, "training configuration")
    return config.resolved(spatial_dims)


def load_config(path: Path) -> TrainConfig:
    """Read the `config.yaml` of a run, of an earlier version too; InputError names the file and the key."""
    return load_yaml(path, TrainConfig)


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
