"""Several models as one: the mean of their probabilities, against computing it whole; memory, record and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightm
from lightm.errors import InputError
from lightm.images.volume import Volume
from lightm.inference import Predictor
from lightm.inference.budget import MARGIN, resident_bytes

from .factories import PlanMaker


class Linear(nn.Module):
    """Logits that are a slope times the voxel, for three classes, so that windows and flips change nothing."""

    def __init__(self, slopes: tuple[float, float, float], calls: list[int] | None = None) -> None:
        super().__init__()
        self.slopes, self.calls = torch.tensor(slopes).view(1, 3, 1, 1, 1), calls

    def forward(self, x: Tensor) -> Tensor:
        return self.slopes * x


LABELS = {"background": 0, "a": 3, "b": 7}
SLOPES = ((0.0, 0.02, -0.03), (0.0, -0.01, 0.04), (0.01, 0.0, 0.005))


def image(shape: tuple[int, ...] = (13, 20, 17)) -> Volume:
    data = np.random.default_rng(0).normal(0, 60, shape).astype(np.float32)
    return Volume(data, (1.0, 1.0, 1.0), np.diag([-1.0, 1.0, -1.0, 1.0]))


def test_the_mean_of_probabilities_against_computing_it_whole(make_plan: PlanMaker, tmp_path: Path) -> None:
    plan = make_plan((1, 1, 1), (8, 8, 8), labels=LABELS)
    other = make_plan((1, 1, 1), (8, 16, 8), labels=LABELS)  # another patch, so windows come in another order
    models = [Predictor(Linear(s), p, "cpu") for s, p in zip(SLOPES, (plan, other, plan), strict=True)]
    scan, soft = image(), tmp_path / "soft.nii.gz"
    counted: list[tuple[int, int]] = []
    found = Predictor.ensemble(models).predict_volumes(
        [scan], probabilities=soft, progress=lambda done, total: counted.append((done, total))
    )
    logits = torch.tensor(SLOPES, dtype=torch.float64).view(3, 3, 1, 1, 1) * torch.from_numpy(scan.data).double()
    mean = torch.softmax(logits, 1).mean(0)
    top = mean.topk(2, 0).values
    clear = ((top[0] - top[1]) > 1e-6).numpy()  # beyond what float32 can tell
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(found.data[clear], np.array([0, 3, 7])[mean.argmax(0).numpy()][clear])
    single = models[0].predict_volumes([scan])
    assert (single.data != found.data).any()
    stored = np.asarray(nibabel.load(soft).dataobj)  # (x, y, z, class)
    np.testing.assert_allclose(stored.transpose(3, 2, 1, 0), mean.numpy(), atol=0.6 / 255)
    assert counted[-1][0] == counted[-1][1] == len(counted)


def test_models_of_other_spacings_and_a_limit_of_memory_give_the_same_labels(make_plan: PlanMaker) -> None:
    plans = [make_plan(step, (8, 8, 8), labels=LABELS) for step in ((1, 1, 1), (2.0, 1.5, 1.5))]
    scan = image((24, 30, 28))

    def predict(limit: int | None) -> np.ndarray:
        models = [Predictor(Linear(s), p, "cpu", max_memory=limit) for s, p in zip(SLOPES, plans, strict=False)]
        return Predictor.ensemble(models).predict_volumes([scan]).data

    free = predict(None)
    assert len(np.unique(free)) == 3
    np.testing.assert_array_equal(predict((resident_bytes() or 0) + MARGIN + (300 << 20)), free)
    with pytest.raises(InputError, match="needs at least"):
        predict(resident_bytes() or 1)


def test_regions_are_averaged_too(make_plan: PlanMaker) -> None:
    regions = {"whole": [1, 2], "core": [2]}
    plan = make_plan((1, 1, 1), (8, 8, 8), labels={"background": 0, "label_1": 1, "label_2": 2})
    plan = plan.model_copy(update={"regions": regions, "regions_class_order": [1, 2]})

    class Two(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return self.slopes[:, :2] * x

    scan = image()
    slopes = ((0.02, 0.01, 0.0), (0.03, -0.02, 0.0))
    found = Predictor.ensemble([Predictor(Two(s), plan, "cpu") for s in slopes]).predict_volumes([scan])
    logits = torch.tensor(slopes)[:, :2].view(2, 2, 1, 1, 1) * torch.from_numpy(scan.data)
    whole, core = (torch.sigmoid(logits).mean(0) > 0.5).numpy()
    np.testing.assert_array_equal(found.data, np.where(core, 2, np.where(whole, 1, 0)))


def test_models_that_do_not_fit_together_are_refused(make_plan: PlanMaker) -> None:
    plan = make_plan((1, 1, 1), (8, 8, 8), labels=LABELS)
    for change in ({"labels": {"background": 0, "a": 3, "c": 7}}, {"channels": ["MR"]}):
        other = plan.model_copy(update=change)
        with pytest.raises(InputError, match=f"cannot be averaged, their {next(iter(change))} differ"):
            Predictor.ensemble([Predictor(Linear(SLOPES[0]), plan, "cpu"), Predictor(Linear(SLOPES[0]), other, "cpu")])


@pytest.mark.slow
def test_folds_as_an_ensemble_and_its_record(tmp_path: Path) -> None:
    data = lightm.phantoms("xray", tmp_path / "data", cases=4, size=32)
    short = {"epochs": 1, "steps_per_epoch": 2, "val_patches": 1, "patch_size": [32, 32], "test": False}
    folds = [lightm.train(data, tmp_path / f"{k}", folds=2, fold=k, seed=k, **short).run_dir for k in range(2)]
    written = lightm.predict(folds, data, tmp_path / "out", cases=["xray_000"])
    assert len(written) == 1
    record = json.loads((tmp_path / "out" / "prediction.json").read_text(encoding="utf-8"))
    assert [Path(one["path"]).parent.name for one in record["model"]["models"]] == ["0", "1"]
    assert record["model"]["name"].startswith("mean of 2: ")
    lightm.predict(folds, data, tmp_path / "out", cases=["xray_000"], resume=True)  # the same models: nothing to do
    with pytest.raises(InputError, match="made with another model"):
        lightm.predict(folds[::-1], data, tmp_path / "out", cases=["xray_000"], resume=True)
    plain = lightm.load(folds, postprocess=False)
    lightm.predict(plain, data, tmp_path / "plain", cases=["xray_000"])
    record = json.loads((tmp_path / "plain" / "prediction.json").read_text(encoding="utf-8"))
    assert record["options"]["postprocess"] is False
    with pytest.raises(InputError, match="one module cannot hold"):
        lightm.load(folds, network=nn.Identity())
    with pytest.raises(InputError, match="no model"):
        lightm.load([])
