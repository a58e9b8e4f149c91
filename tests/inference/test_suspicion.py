"""What a model says of images that its training images were never like, and of those that need more than there is."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import nibabel
import numpy as np
import pytest

from lightm import memory
from lightm.errors import InputError
from lightm.images.io import write_volume
from lightm.images.volume import Volume
from lightm.inference.folder import predict_folder
from lightm.inference.predictor import Predictor
from lightm.nets.folder import save_model
from lightm.nets.presets import create
from lightm.preparation.plan import ChannelNormalization, Plan

from .factories import PlanMaker, Threshold

SHAPE = (8, 16, 16)


@pytest.fixture
def plan(make_plan: PlanMaker) -> Plan:
    made = make_plan((2.0, 1.0, 1.0), (8, 16, 16))
    seen = made.fingerprint.intensities[0].model_copy(update={"image_low": [-1000, -950], "image_high": [200, 300]})
    extents = {"extent_mm_min": [12.0, 12.0, 12.0], "extent_mm_max": [20.0, 20.0, 20.0]}
    return made.model_copy(
        update={"fingerprint": made.fingerprint.model_copy(update={"intensities": [seen], **extents})}
    )


def scan(shape: tuple[int, ...] = SHAPE, spacing: tuple[float, ...] = (2.0, 1.0, 1.0)) -> Volume:
    data = np.linspace(-1000, 250, int(np.prod(shape))).reshape(shape)
    return Volume.from_spacing(data.astype(np.float32), spacing)


def remarks(plan: Plan, volume: Volume) -> list[str]:
    found: list[str] = []
    Predictor(Threshold(0), plan, "cpu").predict_volumes([volume], remark=found.append)
    return found


def test_a_usual_image_is_no_reason_for_words(plan: Plan) -> None:
    assert remarks(plan, scan()) == []
    assert remarks(plan, scan((5, 12, 18), (2.9, 1.2, 0.8))) == []


@pytest.mark.parametrize("change", [lambda x: x + 1024, lambda x: (x + 1000) / 5, lambda x: (x + 1000) / 1250])
def test_intensities_of_another_scale_are_said(plan: Plan, change) -> None:  # type: ignore[no-untyped-def]
    odd = scan().with_data(np.asarray(change(scan().data), np.float32))
    (told,) = remarks(plan, odd)
    assert told.startswith("channel 'CT': intensities from")
    older = plan.fingerprint.intensities[0].model_copy(update={"image_low": None, "image_high": None})
    known = plan.fingerprint.model_copy(update={"intensities": [older]})
    assert remarks(plan.model_copy(update={"fingerprint": known}), odd) == []
    assert remarks(plan.model_copy(update={"normalization": [ChannelNormalization(scheme="zscore")]}), odd) == []


def test_spacing_and_field_of_view_are_said(plan: Plan) -> None:
    (told,) = remarks(plan, scan((2, 16, 16), (7.0, 1.0, 1.0)))
    assert told.startswith("voxels of 1 x 1 x 7 mm (x, y, z), against 1 x 1 x 2 mm")
    (told,) = remarks(plan, scan((8, 16, 60)))
    assert told.startswith("a field of view of 60 x 16 x 16 mm (x, y, z), against 12 x 12 x 12 to 20 x 20 x 20 mm")


@pytest.mark.parametrize("limit", [None, "4GB"])
def test_a_run_says_it_once_per_case_and_keeps_it(
    plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture, limit: str | None
) -> None:
    described = {"name": "lightm-small", "spatial_dims": 3, "in_channels": 1, "out_channels": 2}
    net = create(**described)  # type: ignore[arg-type]
    content = plan.model_dump(mode="json")
    save_model(tmp_path / "model", network=described, state_dict=net.state_dict(), plan=content, training={})
    odd = scan().with_data(scan().data + 1024)
    header = nibabel.Nifti1Header()
    header.set_data_shape(SHAPE[::-1])
    header.set_zooms((1, 1, 2))
    placeless = Volume(odd.data, odd.spacing_mm, header.get_base_affine(), (0, 0))
    write_volume(tmp_path / "in" / "odd.nii.gz", placeless)
    write_volume(tmp_path / "in" / "usual.nii.gz", scan())
    with caplog.at_level(logging.WARNING, "lightm"):
        predict_folder(tmp_path / "model", tmp_path / "in", tmp_path / "out", max_memory=limit, device="cpu")
    told = [message for message in caplog.messages if ".nii.gz: " in message]
    assert len(told) == 2
    assert all(message.startswith(str(tmp_path / "in" / "odd.nii.gz")) for message in told)
    assert "neither sform nor qform is set" in told[0]
    assert "intensities from" in told[1]
    record = json.loads((tmp_path / "out" / "prediction.json").read_text(encoding="utf-8"))
    assert [case["remarks"] for case in record["cases"]] == [told, []]


def test_sizes_are_refused_before_memory_is_asked_for(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    coarse = Volume.from_spacing(np.zeros((40, 40, 40), np.int16), (500.0, 500.0, 500.0))
    with pytest.raises(InputError, match=r"at the plan's spacing of 1 x 1 x 2 mm, shape \(10000, 20000, 20000\)"):
        remarks(plan, coarse)
    monkeypatch.setattr(memory, "available_bytes", lambda: 50_000_000)
    with pytest.raises(InputError, match=r"\(100, 400, 400\) at the model's spacing.* are there; set a limit"):
        remarks(plan, Volume.from_spacing(np.zeros((50, 50, 50), np.int16), (4.0, 8.0, 8.0)))
