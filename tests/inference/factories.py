"""What several test files use: a network that thresholds, and the type of the plan fixture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lightm.images.io import write_volume
from lightm.images.lazy import Box
from lightm.images.volume import Volume
from lightm.preparation.plan import Plan

MODEL = Path("model")  # of the fixture `model`, in the working folder

PlanMaker = Callable[..., Plan]


class Threshold(nn.Module):
    """Two classes from the first channel: foreground where it is above the threshold."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.threshold - x[:, :1], x[:, :1] - self.threshold], dim=1)


class InMemory:
    """A tensor (C, *spatial) that is read like a `NetworkGrid`."""

    def __init__(self, image: Tensor) -> None:
        self.image = image
        self.shape = tuple(image.shape[1:])

    def read(self, box: Box) -> np.ndarray:
        part: np.ndarray = self.image[(slice(None), *box)].numpy()
        return part


def add(path: Path, *, seed: int = 0, shape: tuple[int, ...] = (5, 12, 9)) -> Volume:
    """Write an image of noise around zero, and return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    volume = Volume.from_spacing(data, (2.0, 1.0, 1.0)[-len(shape) :])
    write_volume(path, volume)
    return volume
