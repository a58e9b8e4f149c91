"""Small data sets for tests, bright balls (label 1) with a darker core (label 2) or boxes, and trainings to kill."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from lightm import Volume, write_volume
from lightm.training.loop import Training

TINY: dict[str, Any] = {"network": "lightm-unet-small", "network_options": {"base_channels": 8, "bottleneck_layers": 1}}


def make_balls(root: Path, *, cases: int = 6, size: int = 16, dims: int = 3, classes: int = 2, seed: int = 0) -> Path:
    """Write a data set in the nnU-Net raw layout: NIfTI in 3D, PNG in 2D."""
    ending = ".nii.gz" if dims == 3 else ".png"
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    grid = np.stack(np.meshgrid(*[np.arange(size)] * dims, indexing="ij"))
    for i in range(cases):
        rng = np.random.default_rng((seed, i))
        centre = rng.uniform(0.35 * size, 0.65 * size, dims).reshape(-1, *[1] * dims)
        radius = np.sqrt(((grid - centre) ** 2).sum(0))
        label = (radius < 0.32 * size).astype(np.uint8)
        if classes == 2:
            label[radius < 0.16 * size] = 2
        image = 60.0 + 90.0 * (label == 1) + 40.0 * (label == 2) + rng.normal(0, 8, label.shape)
        image = image.astype(np.float32) if dims == 3 else image.clip(0, 255).astype(np.uint8)
        affine, spacing = np.diag([1.5, 1.0, 1.0, 1.0]) if dims == 3 else np.eye(4), (1.0, 1.0, 1.5)
        spacing = spacing if dims == 3 else (1.0, 1.0)
        write_volume(root / "imagesTr" / f"ball_{i:02d}_0000{ending}", Volume(image, spacing, affine))
        write_volume(root / "labelsTr" / f"ball_{i:02d}{ending}", Volume(label, spacing, affine))
    labels = {"background": 0, "shell": 1, "core": 2} if classes == 2 else {"background": 0, "ball": 1}
    description = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": cases, "file_ending": ending}
    (root / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    return root


def write_dataset(root: Path, *, cases: int = 3, shape: tuple[int, ...] = (6, 8, 10), ending: str = ".nii.gz") -> Path:
    """Write a dataset of random images with a box of class 1 and a smaller one of class 2."""
    rng = np.random.default_rng(0)
    spacing = (2.0, 1.0, 1.0)[-len(shape) :] if ending != ".png" else (1.0,) * len(shape)
    for index in range(cases):
        label = np.zeros(shape, np.uint8)
        label[tuple(slice(1, 5) for _ in shape)] = 1
        label[tuple(slice(2, 4) for _ in shape)] = 2
        image = rng.integers(20, 90, shape) + 60 * label
        image = image.astype(np.uint8 if ending == ".png" else np.int16)
        write_volume(root / f"imagesTr/case_{index}_0000{ending}", Volume.from_spacing(image, spacing))
        write_volume(root / f"labelsTr/case_{index}{ending}", Volume.from_spacing(label, spacing))
    describe(root, numTraining=cases, file_ending=ending)
    return root


def describe(root: Path, **changes: object) -> None:
    """Write dataset.json with the usual content, changed."""
    content: dict[str, object] = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "organ": 1, "lesion": 2},
        "file_ending": ".nii.gz",
        **changes,
    }
    root.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in content.items() if value is not None}
    (root / "dataset.json").write_text(json.dumps(kept), encoding="utf-8")


def docs_script(name: str) -> ModuleType:
    """A script of docs/ as a module."""
    path = Path(__file__).resolve().parents[1] / "docs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Killed(BaseException):
    """What ends a training at once, as a signal that nothing can catch."""


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """For a `with` statement around a training, which is killed when it comes to this step."""
    before = Training.loss_of

    def killing(self: Training, batch: dict[str, Any]) -> Any:
        if self.state.step == step:
            raise Killed
        return before(self, batch)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Training, "loss_of", killing)
        with pytest.raises(Killed):
            yield
