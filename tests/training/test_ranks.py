"""Two processes that train together, each on half of every batch, against one process with the whole batch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from lightning_fabric import Fabric

from lightm import open_dataset
from lightm.datasets.split import make_split
from lightm.preparation.plan import make_plan
from lightm.preparation.preprocess import preprocess_dataset
from lightm.training.config import resolve_config
from lightm.training.loaders import PatchLoaders, RankSampler
from lightm.training.record import Run
from lightm.training.run import build, fit
from lightm.training.settle import build_fabric
from tests.helpers import make_balls
from tests.training.test_train import SMALL, history

pytestmark = pytest.mark.slow


def test_ranks_share_the_indices_of_an_epoch_from_where_it_was_left() -> None:
    samplers = [RankSampler(12, rank, 3) for rank in range(3)]
    for sampler in samplers:
        sampler.set_epoch(2)
    assert [list(sampler) for sampler in samplers] == [[24, 27, 30, 33], [25, 28, 31, 34], [26, 29, 32, 35]]
    samplers[1].used = 6
    assert list(samplers[1]) == [31, 34]


def _train(fabric: Fabric, root: str, batch_size: int) -> None:
    data = open_dataset(Path(root) / "data")
    plan, split = make_plan(data), make_split([case.id for case in data.cases], seed=0)
    options: dict[str, Any] = {**SMALL, "settings": {**SMALL["settings"], "epochs": 1}, "val_patches": 4}
    config = resolve_config(str(data.root), 3, **options)
    plan = plan.model_copy(update={"patch_size": [16, 16, 16], "batch_size": batch_size})
    cases = {case.id: case for case in preprocess_dataset(data, plan, Path(root) / "cache")}
    run = Run(Path(root) / f"run{fabric.world_size}", config, fabric, data, plan, split)
    patches = PatchLoaders(run, [cases[i] for i in split.train], [cases[i] for i in split.val])
    fit(run, *build(run), patches)


@pytest.mark.skipif(sys.platform == "win32", reason="no gloo by files there")
def test_two_ranks_train_as_one_with_the_whole_batch(tmp_path: Path) -> None:
    make_balls(tmp_path / "data", size=24)
    _train(build_fabric("cpu"), str(tmp_path), 2)
    pair = build_fabric("cpu", devices=2, strategy="ddp_spawn")
    pair.launch(_train, str(tmp_path), 1)
    (alone,), (shared,) = history(tmp_path / "run1"), history(tmp_path / "run2")
    for name, value in alone.items():  # the Dice counts voxels, of which a rounded logit moves a few
        assert float(shared[name]) == pytest.approx(float(value), rel=2e-2 if "dice" in name else 1e-3, nan_ok=True), (
            name
        )
    assert (tmp_path / "run2" / "model" / "model.json").is_file()
