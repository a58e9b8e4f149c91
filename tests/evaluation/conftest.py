"""A small run folder with images, labels, predictions and an evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from lightm.evaluation.folder import evaluate_folder
from lightm.images.io import write_volume
from lightm.images.volume import Volume

HISTORY = """epoch,step,train_loss,val_loss,pseudo_dice,pseudo_dice_smoothed,lr,epoch_seconds,\
pseudo_dice/organ,pseudo_dice/lesion
0,10,1.5,1.6,0.2,0.2,0.001,3.0,0.3,0.1
1,20,1.0,1.2,0.4,0.22,0.0006,3.1,0.5,0.3
2,30,0.8,,0.6,0.258,0.0002,2.9,0.7,0.5
"""


def box(shape: tuple[int, ...], start: int, stop: int, value: int = 1) -> np.ndarray:
    """An array of zeros with a cube of `value`."""
    array = np.zeros(shape, dtype=np.uint8)
    array[(slice(start, stop),) * len(shape)] = value
    return array


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a data set and a run on it, evaluated, and gives the run's folder."""

    def make(*, dims: int = 3, names: tuple[str, ...] = ("a", "b", "c", "d"), evaluate: bool = True) -> Path:
        data, run = tmp_path / "Dataset001_Test", tmp_path / "run"
        for folder in (data / "imagesTr", data / "labelsTr", run / "predictions"):
            folder.mkdir(parents=True)
        ending = ".nii.gz" if dims == 3 else ".png"
        shape, spacing = ((14, 16, 18), (2.0, 1.0, 1.0)) if dims == 3 else ((20, 24), (1.0, 1.0))
        rng = np.random.default_rng(0)
        for number, name in enumerate(names):
            label = box(shape, 3, 11)
            label[(slice(5, 8),) * dims] = 2
            pred = np.roll(label, min(number, 2), axis=0)
            if number == 3:
                pred[pred == 2] = 0
            image = (20 * label + rng.integers(0, 20, shape)).astype(np.uint8)
            write_volume(data / "imagesTr" / f"{name}_0000{ending}", Volume.from_spacing(image, spacing))
            write_volume(data / "labelsTr" / f"{name}{ending}", Volume.from_spacing(label, spacing), kind="label")
            write_volume(run / "predictions" / f"{name}{ending}", Volume.from_spacing(pred, spacing), kind="label")
        labels = {"background": 0, "organ": 1, "lesion": 2}
        description = {
            "channel_names": {"0": "CT"},
            "labels": labels,
            "numTraining": len(names),
            "file_ending": ending,
        }
        (data / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
        config = {
            "dataset": str(data),
            "network": "lightm-unet",
            "recipe": "default",
            "settings": {"loss": "ce+arsl", "lr": 0.001},
            "seed": 7,
        }
        (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        plan = {
            "dataset": data.name,
            "spatial_dims": dims,
            "channels": ["CT"],
            "labels": labels,
            "patch_size": [16] * dims,
            "batch_size": 2,
            "spacing_mm": list(spacing),
            "normalization": [{"scheme": "ct", "clip_low": 0.0, "clip_high": 60.0}],
        }
        (run / "plan.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
        split = {"kind": "7:1:2", "seed": 3, "train": ["x", "y"], "val": ["z"], "test": list(names)}
        (run / "split.json").write_text(json.dumps(split), encoding="utf-8")
        (run / "history.csv").write_text(HISTORY, encoding="utf-8")
        record = {
            "command": "lightm train <data> --seed 7",
            "versions": {"lightm-unet": "0.1.0", "torch": "2.13.0"},
            "seed": 7,
            "data_hash": "c0ffee" * 10,
            "backend": "numba",
            "train_seconds": 754.0,
            "parameters": 2468013,
            "network": "lightm-unet",
            "status": "finished",
        }
        (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
        if evaluate:
            evaluate_folder(run / "predictions", data / "labelsTr", out=run / "evaluation", bootstrap=200)
        return run

    return make
