"""Small datasets on disk, made anew for every test that spoils them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lightm.data.io import write_volume
from lightm.data.volume import Volume


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


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a small dataset, 3D NIfTI by default, and returns its folder."""

    def make(name: str = "Dataset001_Small", **options: object) -> Path:
        return write_dataset(tmp_path / name, **options)  # type: ignore[arg-type]

    return make
