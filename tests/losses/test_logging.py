"""What a run with the adaptive region-specific loss writes of its alpha and beta."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from lightm.losses import AdaptiveRegion, create_loss
from lightm.training import train_model
from tests.helpers import make_balls

SMALL = {
    "network": "lightm-unet-small",
    "network_options": {"base_channels": 8, "bottleneck_layers": 1},
    "settings": {"steps_per_epoch": 2, "loss_options": {"a": 0.25, "b": 0.5}},
    "val_patches": 2,
    "epochs": 2,
}


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "history.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_alpha_and_beta_of_each_class_stand_in_the_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    compute = AdaptiveRegion.compute

    def watched(self: AdaptiveRegion, batch: object) -> torch.Tensor:
        value = compute(self, batch)  # type: ignore[arg-type]
        if torch.is_grad_enabled():
            assert self.last_coefficients is not None
            seen.append(torch.cat(self.last_coefficients))
        return value

    monkeypatch.setattr(AdaptiveRegion, "compute", watched)
    data = make_balls(tmp_path / "Dataset001_Discs", dims=2, size=16)
    train_model(data, tmp_path / "run", loss="ce+arsl", **SMALL)  # type: ignore[arg-type]
    rows = rows_of(tmp_path / "run")
    columns = [f"arsl_{which}/{name}" for which in ("alpha", "beta") for name in ("shell", "core")]
    assert len(rows) == 2
    assert len(seen) == 4
    for epoch, row in enumerate(rows):
        mean = torch.stack(seen[2 * epoch : 2 * epoch + 2]).mean(0)
        assert [float(row[name]) for name in columns] == pytest.approx(mean.tolist(), rel=1e-5)
        for name in ("shell", "core"):  # alpha + beta = 2A + B where there is any error
            assert float(row[f"arsl_alpha/{name}"]) + float(row[f"arsl_beta/{name}"]) == pytest.approx(1, abs=1e-3)


def test_other_losses_write_no_such_columns(tmp_path: Path) -> None:
    data = make_balls(tmp_path / "Dataset001_Discs", dims=2, size=16)
    options = {**SMALL, "settings": {"steps_per_epoch": 1}, "epochs": 1}
    train_model(data, tmp_path / "run", loss="ce+tversky", **options)  # type: ignore[arg-type]
    assert not any("arsl" in name for name in rows_of(tmp_path / "run")[0])


@pytest.mark.parametrize("options", [{}, {"skip_empty": True}, {"batch": True}, {"include_background": True}])
def test_the_last_coefficients_are_those_of_the_call(options: dict[str, bool]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 3, 8, 8, generator=generator)
    target = torch.randint(0, 3, (2, 8, 8), generator=generator)
    target[0, :3] = 255
    loss = create_loss("arsl", spatial_dims=2, num_classes=3, regions=4, **options)
    assert isinstance(loss, AdaptiveRegion)
    loss(logits.requires_grad_(), target)
    assert loss.last_coefficients is not None
    for value, expected in zip(loss.last_coefficients, loss.coefficients(logits, target), strict=True):
        torch.testing.assert_close(value, expected)
        assert not value.requires_grad
