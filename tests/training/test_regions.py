"""Training on regions, with ignored slices, and on classes that training cases lack."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightm
from lightm import read_volume, write_volume
from lightm.errors import InputError
from lightm.losses import CrossEntropy
from lightm.nets import load_model
from lightm.training import train_model
from lightm.training.loop import found_and_there
from tests.helpers import make_balls

REGIONS: dict[str, Any] = {"background": 0, "ball": [1, 2], "core": [2]}
SHORT: dict[str, Any] = {"epochs": 1, "steps_per_epoch": 3, "val_patches": 2, "device": "cpu", "lr": 0.1}


def network(outputs: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv3d(1, outputs, 3, padding=1)


def labelled(root: Path, **changes: Any) -> Path:
    content = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
    (root / "dataset.json").write_text(json.dumps({**content, **changes}), encoding="utf-8")
    return root


@pytest.fixture
def regions(tmp_path: Path) -> Path:
    return labelled(make_balls(tmp_path / "Dataset001_Balls"), labels=REGIONS, regions_class_order=[1, 2])


def relabel(root: Path, change: Any) -> None:
    for number, path in enumerate(sorted((root / "labelsTr").iterdir())):
        volume = read_volume(path, kind="label")
        write_volume(path, volume.with_data(change(number, volume.data.copy())), kind="label")


def test_found_and_there_by_hand() -> None:
    logits = torch.tensor([[[1.0, -1.0, 2.0, -3.0], [-1.0, 0.5, 1.0, -3.0]]])
    target = torch.tensor([[1, 2, 2, 255]])
    ball, core = found_and_there(logits, target, ((1, 2), (2,)))
    assert [mask.tolist() for mask in ball] == [[[True, False, True, False]], [[True, True, True, False]]]
    assert [mask.tolist() for mask in core] == [[[False, True, True, False]], [[False, True, True, False]]]
    (one,) = found_and_there(logits, target, ())
    assert [mask.tolist() for mask in one] == [[[False, True, False, False]], [[True, False, False, False]]]


def test_a_run_on_regions_from_data_to_report(regions: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = network()
    with caplog.at_level(logging.INFO, "lightm"):
        result = lightm.train(regions, tmp_path / "run", network=net, postprocess=False, **SHORT)
    assert "ce is the binary cross-entropy" in caplog.text
    with (result.run_dir / "history.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert {"pseudo_dice/ball", "pseudo_dice/core"} <= row.keys()
    assert np.isfinite(float(row["train_loss"]))
    _, info = load_model(result.model, network=net)
    assert info["plan"]["regions"] == {"ball": [1, 2], "core": [2]}
    assert info["plan"]["regions_class_order"] == [1, 2]
    assert "- regions: ball = [1, 2], core = [2]" in (result.model / "card.md").read_text(encoding="utf-8")
    assert result.evaluation is not None
    assert result.evaluation.labels == {"ball": [1, 2], "core": [2]}
    for row in result.evaluation.rows:
        truth, found = (
            read_volume(folder / f"{row.case}.nii.gz", kind="label").data
            for folder in (regions / "labelsTr", result.run_dir / "predictions")
        )
        assert set(np.unique(found)) <= {0, 1, 2}
        values = result.evaluation.labels[row.class_name]
        assert row.voxels_label == np.isin(truth, values).sum()
        assert row.voxels_pred == np.isin(found, values).sum()
    report = result.report.read_text(encoding="utf-8")
    assert "core [2]" in report
    again = lightm.evaluate(result.run_dir / "predictions", regions / "labelsTr", cases="predicted")
    assert again.rows == result.evaluation.rows


def test_a_resumed_run_is_the_uninterrupted_one(regions: Path, tmp_path: Path) -> None:
    options = {**SHORT, "schedule": "constant", "test": False, "postprocess": False}
    lightm.train(regions, tmp_path / "parts", network=network(), **options)
    lightm.resume(tmp_path / "parts", network=network(), epochs=2)
    lightm.train(regions, tmp_path / "whole", network=network(), **{**options, "epochs": 2})
    parts, whole = ((tmp_path / name / "history.csv").read_text().splitlines() for name in ("parts", "whole"))
    assert len(parts) == 3
    assert [line.split(",")[:7] for line in parts] == [line.split(",")[:7] for line in whole]


def test_slices_that_nobody_annotated_do_not_count(regions: Path, tmp_path: Path) -> None:
    labelled(regions, labels={**REGIONS, "ignore": 7})

    def annotate(number: int, label: np.ndarray) -> np.ndarray:
        label[::2] = 7  # every second slice
        return label

    relabel(regions, annotate)
    assert lightm.check(regions).ok
    result = lightm.train(regions, tmp_path / "run", network=network(), **SHORT)
    assert result.evaluation is not None
    for row in result.evaluation.rows:
        truth = read_volume(regions / "labelsTr" / f"{row.case}.nii.gz", kind="label").data
        found = read_volume(result.run_dir / "predictions" / f"{row.case}.nii.gz", kind="label").data
        assert 7 not in found
        values = result.evaluation.labels[row.class_name]
        assert row.voxels_pred == (np.isin(found, values) & (truth != 7)).sum()


def test_a_loss_of_ones_own_gets_regions_or_is_refused(regions: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []

    def own(logits: Tensor, target: Tensor) -> Tensor:
        seen.append(tuple(target.shape))
        return nn.functional.binary_cross_entropy_with_logits(logits, target.clamp(max=1).to(logits.dtype))

    train_model(regions, tmp_path / "own", network=network(), loss=own, **SHORT)
    assert all(shape[1] == 2 for shape in seen)
    softmax = CrossEntropy(spatial_dims=3, num_classes=2)
    with pytest.raises(InputError, match="loss CrossEntropy takes the softmax"):
        train_model(regions, tmp_path / "softmax", network=network(), loss=softmax, **SHORT)
    assert not (tmp_path / "softmax" / "run.json").exists()


def test_a_plan_of_other_regions_is_refused(regions: Path, tmp_path: Path) -> None:
    lightm.plan(regions, out=tmp_path / "plan.yaml")
    labelled(regions, labels={"background": 0, "rest": [1, 2], "core": [2]})
    with pytest.raises(InputError, match=r"made for labels .*'ball'.*has .*'rest'"):
        train_model(regions, tmp_path / "run", network=network(), plan=tmp_path / "plan.yaml", **SHORT)


def test_a_class_without_cases_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = labelled(make_balls(tmp_path / "data"), labels={"background": 0, "shell": 1, "core": 2, "ghost": 3})
    (problem,) = lightm.check(data).problems
    assert problem.severity == "warning"
    result = lightm.train(data, tmp_path / "run", network=network(4), postprocess=False, **SHORT)
    assert "'ghost' (label 3) occurs in no case that is used" in caplog.text
    assert result.evaluation is not None
    assert {row.status for row in result.evaluation.rows if row.class_name == "ghost"} <= {"absent", "spurious"}


@pytest.mark.parametrize("with_regions", [False, True])
@pytest.mark.parametrize("holder", range(6))
def test_a_class_of_one_case_is_trained_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, holder: int, with_regions: bool
) -> None:
    data = make_balls(tmp_path / "data")
    relabel(data, lambda number, label: label if number == holder else np.minimum(label, 1))
    if with_regions:
        labelled(data, labels=REGIONS, regions_class_order=[1, 2])
    said = [str(problem) for problem in lightm.check(data).problems]
    assert any("'core' (value 2) occurs in one case only; `lightm train` keeps it in training" in line for line in said)
    result = train_model(data, tmp_path / "run", network=network(2 if with_regions else 3), **SHORT)
    assert f"ball_{holder:02d}" in result.split.train
    assert sorted([*result.split.train, *result.split.val, *result.split.test]) == [f"ball_{i:02d}" for i in range(6)]
    assert result.split.val
    assert result.split.test
    assert "cannot learn it" not in caplog.text


def test_a_split_that_is_given_stays_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = make_balls(tmp_path / "data")
    relabel(data, lambda number, label: label if number == 5 else np.minimum(label, 1))
    names = [f"ball_{i:02d}" for i in range(6)]
    split = lightm.Split(kind="by hand", seed=0, train=names[:4], val=names[4:5], test=names[5:])
    result = train_model(data, tmp_path / "run", network=network(3), split=split, **SHORT)
    assert result.split == split
    assert "'core' (label 2) occurs in no case that is used" in caplog.text


def test_background_alone_is_refused(tmp_path: Path) -> None:
    data = make_balls(tmp_path / "data")
    relabel(data, lambda number, label: np.zeros_like(label))
    with pytest.raises(InputError, match="background only, so there is nothing to learn"):
        train_model(data, tmp_path / "run", network=network(3), **SHORT)


def test_one_region_in_2d_with_previews(tmp_path: Path) -> None:
    data = make_balls(tmp_path / "data", dims=2)
    labelled(data, labels={"background": 0, "ball": [1, 2]}, regions_class_order=[2])
    torch.manual_seed(0)
    net = nn.Conv2d(1, 1, 3, padding=1)
    result = lightm.train(data, tmp_path / "run", network=net, loss="ce+arsl", **SHORT)
    assert result.evaluation is not None
    assert result.evaluation.labels == {"ball": [1, 2]}
    predictor = lightm.load(result.model, network=net)
    images = sorted((data / "imagesTr").iterdir())[:1]
    (found,) = lightm.predict(predictor, images, tmp_path / "out", preview=True, statistics=True)
    assert set(np.unique(read_volume(found, kind="label").data)) <= {0, 2}
    assert (tmp_path / "out" / "previews" / "ball_00.png").stat().st_size > 1000
    assert ",1 2," in (tmp_path / "out" / "statistics.csv").read_text()
