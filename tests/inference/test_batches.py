"""Windows in batches as on a GPU, sums that stay on its device, and what happens when its memory is too small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightm.errors import LightMError
from lightm.images.lazy import LazyVolume
from lightm.images.volume import Volume
from lightm.inference import sliding
from lightm.preparation.preprocess import NetworkGrid

from .factories import PlanMaker

PATCH = (8, 8, 8)


class Small(nn.Module):
    """A convolution that refuses more than `most` windows at once, as a GPU does whose memory is too small."""

    def __init__(self, most: int = 100) -> None:
        super().__init__()
        self.convolution, self.most, self.sizes = nn.Conv3d(1, 3, 3, padding=1), most, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        found: Tensor = self.convolution(x)
        return found


def slabs(make_plan: PlanMaker, network: nn.Module, batch: int | None, **more: Path) -> Tensor:
    data = np.random.default_rng(0).normal(0, 60, (21, 13, 18)).astype(np.float32)
    grid = NetworkGrid([LazyVolume.of(Volume(data, (1, 1, 1), np.eye(4)))], make_plan((1, 1, 1), PATCH))
    return torch.cat(list(sliding.logit_slabs(network, grid, patch_size=PATCH, batch=batch, **more)), dim=1)


@pytest.mark.parametrize("batch", [2, 3, 50])
def test_batches_give_what_single_windows_give(make_plan: PlanMaker, batch: int) -> None:
    torch.manual_seed(0)
    network = Small()
    single = slabs(make_plan, network, None)
    assert set(network.sizes) == {1}
    network.sizes.clear()
    torch.testing.assert_close(slabs(make_plan, network, batch), single, rtol=1e-5, atol=1e-4)
    assert max(network.sizes) == min(batch, 12)  # 12 windows start at one slice


def test_a_batch_that_is_too_large_is_halved_for_good(make_plan: PlanMaker) -> None:
    torch.manual_seed(0)
    network = Small(most=2)
    single = slabs(make_plan, network, 1)
    network.sizes.clear()
    torch.testing.assert_close(slabs(make_plan, network, 8), single, rtol=1e-5, atol=1e-4)
    assert network.sizes[:7] == [8, 4, 2, 2, 4, 2, 2]  # the first batch alone
    assert max(network.sizes[7:]) == 2


def test_one_window_that_is_too_large_is_one_clear_error(make_plan: PlanMaker) -> None:
    with pytest.raises(LightMError, match=r"out of memory for one window of \(8, 8, 8\); use --device cpu"):
        slabs(make_plan, Small(most=0), 4)


def test_sums_on_a_device_are_those_on_the_cpu(
    make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = Small()
    on_cpu = slabs(make_plan, network, 1)
    monkeypatch.setattr(
        sliding,
        "_sums_on",
        lambda device, classes, patch, lengths, folder: sliding._DeviceSums(device, classes, patch, lengths),
    )
    assert torch.equal(slabs(make_plan, network, 1), on_cpu)
    assert torch.equal(slabs(make_plan, network, 1, folder=tmp_path), on_cpu)
