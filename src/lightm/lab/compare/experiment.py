"""An experiment: which networks, losses, recipes and seeds are compared on which data, as one YAML."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, field_validator, model_validator

from lightm.config_io import load_yaml, save_yaml
from lightm.errors import InputError, did_you_mean
from lightm.lab.complexity import known_names
from lightm.losses import create_loss
from lightm.training.config import RECIPES, RENAMED, parse_duration

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+(), -]{0,63}")
_PARTS = ("network", "loss", "recipe")


class Strict(BaseModel):
    """A model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid")


class PhantomData(Strict):
    """Phantoms to make as the data set; the arguments of `lightm.phantoms`."""

    kind: Literal["liver", "vessels", "xray", "brain"]
    cases: int = Field(24, ge=4)
    size: int = Field(64, ge=24)
    seed: int = Field(0, ge=0)


class NetworkChoice(Strict):
    """A network of the grid: a preset or baseline with its options."""

    network: str
    options: dict[str, Any] = Field(default_factory=dict)


class LossChoice(Strict):
    """A loss of the grid, such as `ce+arsl`, with its options."""

    loss: str
    options: dict[str, Any] = Field(default_factory=dict)


class RecipeChoice(Strict):
    """A recipe of the grid with the settings that differ from it."""

    recipe: str
    settings: dict[str, Any] = Field(default_factory=dict)


class Baseline(Strict):
    """The configuration that all others are tested against; what is left out is the first of its list."""

    network: str | None = None
    loss: str | None = None
    recipe: str | None = None


class Experiment(Strict):
    """A comparison of configurations (network, loss and recipe) on one data set, one plan and one split.

    Data are either `dataset` (with `labels` where images and labels are two folders), a path relative to the
    experiment's file, or `phantom`. `networks`, `losses` and `recipes` are lists of names, or mappings from a label of
    one's own to a choice with options. Every configuration is trained once with every seed; `epochs` and `max_time`,
    at least one of them, are per training. `total_time` limits a call of the whole comparison, `jobs` is how many
    trainings run side by side, each on an equal share of the cores.
    """

    name: str
    dataset: str | None = None
    labels: str | None = None
    phantom: PhantomData | None = None
    networks: dict[str, NetworkChoice] = Field(min_length=1)
    losses: dict[str, LossChoice] = Field(min_length=1)
    recipes: dict[str, RecipeChoice] = Field(min_length=1)
    seeds: list[int] = Field(default_factory=lambda: [0], min_length=1)
    baseline: Baseline = Field(default_factory=Baseline)
    epochs: int | None = Field(None, ge=1)
    max_time: str | float | None = None
    total_time: str | float | None = None
    jobs: int = Field(1, ge=1)
    patch_size: list[int] | None = None
    batch_size: int | None = Field(None, ge=1)
    spacing_mm: list[PositiveFloat] | None = None
    plan: str | None = None
    split: str | None = None
    split_seed: int = Field(0, ge=0)
    val_patches: int = Field(16, ge=1)
    nsd_tolerance_mm: float = Field(1.0, ge=0)
    device: str = "cpu"

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        filled = {"losses": ["ce+dice"], "recipes": ["default"], **values}
        for key, part in zip(("networks", "losses", "recipes"), _PARTS, strict=True):
            filled[key] = _labelled(filled.get(key), part)
        return filled

    @field_validator("name")
    @classmethod
    def _short_name(cls, name: str) -> str:
        return _checked_name(name)

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) != len(seeds) or min(seeds) < 0:
            raise ValueError(f"seeds must be different numbers of 0 or more, got {seeds}")
        return seeds

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        if (self.dataset is None) == (self.phantom is None):
            raise ValueError("give one of `dataset` (a folder) and `phantom` (kind, cases, size, seed)")
        if self.epochs is None and self.max_time is None:
            raise ValueError("give `epochs`, `max_time` or both: they end each training")
        for key in ("max_time", "total_time"):
            if (given := getattr(self, key)) is not None:
                with _as_value_error():
                    parse_duration(given)
        for label, network in self.networks.items():
            _known("network", label, network.network, known_names())
        for label, recipe in self.recipes.items():
            _known("recipe", label, recipe.recipe, [*RECIPES, *RENAMED])
        for label, loss in self.losses.items():
            with _as_value_error(f"loss '{label}': "):
                create_loss(loss.loss, spatial_dims=3, num_classes=2, **loss.options)
        for part, labels in self._labels().items():
            given = getattr(self.baseline, part)
            if given is not None and given not in labels:
                raise ValueError(f"baseline.{part}: '{given}' is none of {', '.join(labels)}")
        return self

    def _labels(self) -> dict[str, list[str]]:
        return {"network": list(self.networks), "loss": list(self.losses), "recipe": list(self.recipes)}

    @property
    def baseline_method(self) -> tuple[str, str, str]:
        labels = self._labels()
        network, loss, recipe = (getattr(self.baseline, part) or labels[part][0] for part in _PARTS)
        return network, loss, recipe

    def method_name(self, method: tuple[str, str, str]) -> str:
        """The labels of a method that differ between methods, joined; the network's where none does."""
        labels = self._labels()
        shown = [name for name, part in zip(method, _PARTS, strict=True) if len(labels[part]) > 1]
        return ", ".join(shown) if shown else method[0]

    def methods(self) -> list[tuple[str, str, str]]:
        """All (network, loss, recipe) of the grid, the baseline first."""
        labels = self._labels()
        grid = [(n, lo, r) for n in labels["network"] for lo in labels["loss"] for r in labels["recipe"]]
        first = self.baseline_method
        return [first, *(method for method in grid if method != first)]

    def trials(self) -> list[Trial]:
        """Every training of the grid; all methods with the first seed before the second, so that a part is balanced."""
        return [Trial(*method, seed) for seed in self.seeds for method in self.methods()]

    def settings_of(self, trial: Trial) -> dict[str, Any]:
        """The arguments of `lightm.train` for a trial, but data, folders, plan and split."""
        network, loss, recipe = self.networks[trial.network], self.losses[trial.loss], self.recipes[trial.recipe]
        return {
            "network": network.network,
            "network_options": network.options,
            "recipe": recipe.recipe,
            "settings": {**recipe.settings, "loss_options": loss.options},
            "loss": loss.loss,
            "seed": trial.seed,
            "epochs": self.epochs,
            "max_time": self.max_time,
            "val_patches": self.val_patches,
            "device": self.device,
        }

    def fingerprint(self, trial: Trial) -> str:
        """Sixteen hex digits that change with anything which decides a trial's result, but for data, plan and split."""
        text = json.dumps(self.settings_of(trial), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write the experiment, all defaults filled in, as YAML."""
        save_yaml(path, self, "A comparison; run it (again) with `lightm compare`.")


@dataclass(frozen=True)
class Trial:
    """One training of the grid: labels of network, loss and recipe, and the seed."""

    network: str
    loss: str
    recipe: str
    seed: int

    @property
    def method(self) -> tuple[str, str, str]:
        return self.network, self.loss, self.recipe

    @property
    def id(self) -> str:
        """Name of the trial's run folder."""
        parts = (self.network, self.loss, self.recipe, f"seed{self.seed}")
        return "__".join(map(file_name, parts))


def file_name(label: str) -> str:
    """A label as a part of a file name: spaces, commas and parentheses become dashes."""
    return re.sub(r"[ ,()]+", "-", label).strip("-")


def load_experiment(path: Path | str) -> Experiment:
    """Read an experiment; InputError names file and key, or says what does not go together.

    Relative paths in it are taken from the file's folder.
    """
    path = Path(path)
    experiment = load_yaml(path, Experiment)
    base = path.resolve().parent
    paths = {key: getattr(experiment, key) for key in ("dataset", "labels", "plan", "split")}
    ids = [trial.id for trial in experiment.trials()]
    if len(set(ids)) != len(ids):
        raise InputError(f"{path}: two labels differ only in spaces, commas, brackets and dashes; rename one")
    return experiment.model_copy(update={key: str(base / path) for key, path in paths.items() if path is not None})


def _labelled(given: Any, part: str) -> Any:
    """A list of names as a mapping from name to choice; mappings may hold names too."""
    if isinstance(given, str):
        given = [given]
    if isinstance(given, list) and all(isinstance(item, str) for item in given):
        if len(set(given)) != len(given):
            raise ValueError(f"{part}: a name occurs twice in {given}; give the two labels of their own")
        given = {name: name for name in given}
    if not isinstance(given, Mapping):
        return given
    for label in given:
        _checked_name(str(label))
    return {str(label): {part: value} if isinstance(value, str) else value for label, value in given.items()}


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"'{name}' is no usable name: up to 64 letters, digits, spaces and _ . + - , ( )")
    return name


def _known(what: str, label: str, name: str, names: list[str]) -> None:
    if name not in names:
        raise ValueError(f"{what} '{label}': '{name}' is not known{did_you_mean(name, names)}")


@contextmanager
def _as_value_error(prefix: str = "") -> Iterator[None]:
    """pydantic adds the key to a plain ValueError."""
    try:
        yield
    except (InputError, TypeError) as error:
        raise ValueError(f"{prefix}{error}") from error
