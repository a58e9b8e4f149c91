"""Plans small enough to know what they do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from lightm.preparation.fingerprint import ChannelIntensities, Fingerprint
from lightm.preparation.plan import ChannelNormalization, Plan

from .factories import MODEL, PlanMaker, Threshold


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


@pytest.fixture
def model(make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model folder `model` in the working folder, whose network thresholds at zero. The plan can be exchanged."""
    place = tmp_path_factory.mktemp("place")
    monkeypatch.chdir(place)
    plan = make_plan((2.0, 1.0, 1.0), (8, 8, 8)).model_dump(mode="json")
    content = {
        "schema_version": 1, "lightm_version": "0", "network": {"name": "threshold"}, "plan": plan, "training": {},
        "weights_sha256": "0" * 64,
    }  # fmt: skip
    MODEL.mkdir()
    (MODEL / "model.json").write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.setattr("lightm.nets.folder.load_model", lambda folder: (Threshold(0.0), content))
    return content
