"""Plans small enough to know what they do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from lightm.data.fingerprint import ChannelIntensities, Fingerprint
from lightm.data.plan import ChannelNormalization, Plan

from .made import PlanMaker


@pytest.fixture
def make_plan() -> PlanMaker:
    def make(
        spacing_mm: Sequence[float],
        patch_size: Sequence[int],
        *,
        channels: Sequence[str] = ("CT",),
        labels: dict[str, int] | None = None,
        **options: Any,
    ) -> Plan:
        labels = labels or {"background": 0, "bright": 1}
        spacing, dims = list(spacing_mm), len(spacing_mm)
        # Values from -1000 to 1000 pass through "ct" unchanged.
        scheme = ChannelNormalization(scheme="ct", clip_low=-1000, clip_high=1000, mean=0, std=1)
        stats = ChannelIntensities(mean=0, std=1, median=0, low=-1, high=1, min=-1, max=1)
        return Plan(
            dataset="made",
            spatial_dims=dims,  # type: ignore[arg-type]
            channels=list(channels),
            labels=labels,
            file_ending=".nii.gz",
            spacing_mm=spacing,
            patch_size=list(patch_size),
            batch_size=1,
            normalization=[scheme] * len(channels),
            fingerprint=Fingerprint(
                cases=1,
                data_hash="0",
                shape_min=[8] * dims,
                shape_median=[8] * dims,
                shape_max=[8] * dims,
                spacing_mm_min=spacing,
                spacing_mm_median=spacing,
                spacing_mm_max=spacing,
                intensities=[stats] * len(channels),
                class_fractions=dict.fromkeys(labels, 0.5),
                class_cases=dict.fromkeys(labels, 1),
            ),
            **options,
        )

    return make
