"""The configuration of one training: what the command line, a YAML file and the run folder share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lightm.errors import InputError, did_you_mean
from lightm.files import write_text
from lightm.nets import DEFAULT
from lightm.training.recipes import Recipe, get_recipe


class TrainConfig(BaseModel):
    """Everything that decides a training run, resolved; written to the run folder as `config.yaml`.

    `settings` is the recipe with its overrides applied. `max_time_s` ends the training after that many seconds and
    is what the learning rate falls over; `epochs_given` says that the number of epochs was asked for, else a time
    budget alone decides. `patience`: epochs without a better moving pseudo Dice before the training stops. `on_nan`:
    "stop" at a loss or gradient that is not finite, or "skip" up to `nan_limit` such steps.
    """

    model_config = ConfigDict(extra="forbid")

    dataset: str
    labels: str | None = None
    network: str = DEFAULT
    network_options: dict[str, Any] = Field(default_factory=dict)
    recipe: str = "default"
    settings: Recipe
    seed: int = Field(0, ge=0)
    split_seed: int = Field(0, ge=0)
    folds: int | None = Field(None, ge=2)
    fold: int = Field(0, ge=0)
    split: str | None = None
    max_time_s: float | None = Field(None, gt=0)
    epochs_given: bool = False
    patience: int | None = Field(None, ge=1)
    val_patches: int = Field(16, ge=1)
    workers: int = Field(0, ge=0)
    device: str = "cpu"
    precision: str = "32-true"
    on_nan: Literal["stop", "skip"] = "stop"
    nan_limit: int = Field(10, ge=1)

    def save(self, path: Path) -> None:
        """Write the configuration as YAML."""
        write_text(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


def resolve_config(
    dataset: str,
    spatial_dims: int,
    *,
    recipe: str = "default",
    settings: dict[str, Any] | None = None,
    **fields: Any,
) -> TrainConfig:
    """Return a full configuration: the recipe's settings, overridden by `settings`; `fields` as in TrainConfig.

    Raises InputError for unknown keys (with the nearest known one) and impossible values.
    """
    base = get_recipe(recipe, spatial_dims).model_dump()
    overrides = dict(settings or {})
    augment = overrides.pop("augment", {})
    merged = {**base, **overrides, "augment": {**base["augment"], **augment}}
    return _validated({"dataset": dataset, "recipe": recipe, "settings": merged, **fields}, "training configuration")


def load_config(path: Path) -> TrainConfig:
    """Read the `config.yaml` of a run; InputError names the file and the key that is wrong."""
    return _validated(read_yaml(path), str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; InputError for a missing file, no YAML, or no mapping."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no keys; a mapping `key: value` is expected")
    return content


USER_KEYS = [
    "network",
    "network_options",
    "recipe",
    "settings",
    "seed",
    "split_seed",
    "folds",
    "fold",
    "split",
    "max_time",
    "epochs",
    "patience",
    "val_patches",
    "workers",
    "device",
    "precision",
    "on_nan",
    "nan_limit",
    "loss",
    "lr",
    "batch_size",
    "patch_size",
    "labels",
]


def read_user_config(path: Path) -> dict[str, Any]:
    """Read the YAML that a user gives to `lightm train --config`: the options of `train` by name."""
    content = read_yaml(path)
    for key in content:
        if key not in USER_KEYS:
            raise InputError(
                f"{path}: unknown key '{key}'{did_you_mean(str(key), USER_KEYS)} Known: {', '.join(USER_KEYS)}."
            )
    return content


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


def _validated(values: dict[str, Any], where: str) -> TrainConfig:
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        hint = ""
        if first["type"] == "extra_forbidden":
            model = Recipe if first["loc"][0] == "settings" else TrainConfig
            hint = did_you_mean(str(first["loc"][-1]), model.model_fields)
            raise InputError(f"{where}: unknown key '{key}'{hint}") from error
        raise InputError(f"{where}: {key}: {first['msg']} (got {first['input']!r})") from error
