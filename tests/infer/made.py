"""What several test files use: a network that thresholds, and the type of the plan fixture."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightm.data.plan import Plan

PlanMaker = Callable[..., Plan]


class Threshold(nn.Module):
    """Two classes from the first channel: foreground where it is above the threshold."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.threshold - x[:, :1], x[:, :1] - self.threshold], dim=1)
