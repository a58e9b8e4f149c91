"""The examples of the report's recipes fit the data sets that `lightm convert` makes of the downloads' layouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lightm.datasets.convert import convert_dataset
from lightm.datasets.discovery import open_dataset
from lightm.losses import create_loss
from lightm.nets import create
from lightm.preparation.plan import make_plan
from lightm.training.config import TrainConfig
from lightm.training.settle import choose_split, with_sizes
from tests.datasets.test_convert import make_lits, make_msd, make_xrays

ROOT = Path(__file__).resolve().parents[1]
CASES: dict[str, tuple[str, Callable[[Path], Path], list[int], int]] = {
    "lits": ("lits", lambda path: make_lits(path, cases=10), [128, 128, 128], 2),
    "montgomery_shenzhen": ("montgomery-shenzhen", make_xrays, [512, 512], 12),
    "msd": ("msd", make_msd, [128, 128, 128], 2),
}


@pytest.mark.parametrize("name", CASES)
def test_the_example_resolves_on_the_converted_data(name: str, tmp_path: Path) -> None:
    kind, make, patch, batch = CASES[name]
    convert_dataset(kind, make(tmp_path / "src"), tmp_path / "out")
    data = open_dataset(tmp_path / "out")
    plan = make_plan(data)
    given = TrainConfig.of(ROOT / "examples" / f"{name}.yaml", {}, "train")
    config = given.resolved(plan.spatial_dims)
    plan = with_sizes(plan, config)
    assert (plan.patch_size, plan.batch_size) == (patch, batch)
    assert (config.loss, config.optimizer, config.lr, config.schedule) == ("ce+arsl", "sgd", 1e-4, "poly")
    assert config.epochs == 100
    assert config.folds is None
    split = choose_split(data, config)
    assert split.kind == "7:1:2"
    if name == "lits":
        assert [len(part) for part in (split.train, split.val, split.test)] == [7, 1, 2]
    create(config.network, plan.spatial_dims, len(plan.channels), len(plan.labels), **config.network_options)
    create_loss(config.loss, spatial_dims=plan.spatial_dims, num_classes=len(plan.labels), **config.loss_options)
