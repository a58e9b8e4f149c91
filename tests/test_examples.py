"""The shipped configurations are valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightm.nets import create
from lightm.training.config import USER_KEYS, parse_duration, read_user_config, resolve_config

ROOT = Path(__file__).resolve().parents[1]
COMPARISONS = ("quick.yaml",)  # and examples/compare; tested in tests/lab/compare/test_experiment.py
TRAININGS = sorted(path for path in (ROOT / "examples").glob("*.yaml") if path.name not in COMPARISONS)


@pytest.mark.parametrize("path", TRAININGS, ids=lambda path: path.stem)
def test_every_example_resolves_to_a_configuration_and_a_network(path: Path) -> None:
    options = read_user_config(path)
    settings = dict(options.pop("settings", {}))
    settings.update({key: options.pop(key) for key in ("loss", "lr") if key in options})
    fields = {k: v for k, v in options.items() if k not in ("max_time", "batch_size", "patch_size", "epochs")}
    for dims in (2, 3):
        config = resolve_config("data", dims, settings=settings, **fields)
        create(config.network, dims, 1, 2, **config.network_options)
    parse_duration(options.get("max_time", "1h"))


def test_the_documented_keys_are_options_of_train() -> None:
    import inspect

    from lightm.training import train_model

    assert set(USER_KEYS) <= set(inspect.signature(train_model).parameters)
