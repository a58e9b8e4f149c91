"""Parts of the baselines: nnU-Net's rules, attention in windows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightm.nets.baselines.common import plan_stages
from lightm.nets.baselines.transformers import Attention, WindowLayer, from_windows, to_windows

# ---- nnU-Net's rules -----------------------------------------------------------------------------------------------


def test_the_rule_gives_nnunets_network_for_the_usual_patch() -> None:
    stages = plan_stages((128, 128, 128))
    assert stages.strides == ((1, 1, 1), *[(2, 2, 2)] * 5)
    assert stages.kernels == ((3, 3, 3),) * 6
    assert stages.channels == (32, 64, 128, 256, 320, 320)
    assert stages.divisor == (32, 32, 32)
    assert plan_stages((512, 512)).channels == (32, 64, 128, 256, 512, 512, 512, 512)


@pytest.mark.parametrize(
    ("size", "spacing", "strides", "thin"),
    [
        # what nnU-Net published for the Medical Segmentation Decathlon's hippocampus and prostate
        ((40, 56, 40), (1.0, 1.0, 1.0), [(2, 2, 2)] * 3, 0),
        ((20, 320, 256), (3.6, 0.62, 0.62), [(1, 2, 2)] * 2 + [(2, 2, 2)] * 2 + [(1, 2, 2)] * 2, 2),
        # an axis that runs out of voxels stays; a last axis is pooled alone from 12 voxels on, not from 8
        ((16, 48, 8), None, [(2, 2, 2), (2, 2, 1), (1, 2, 1)], 0),
        ((16, 32), None, [(2, 2), (2, 2)], 0),
    ],
)
def test_the_rule_at_other_patches(
    size: tuple[int, ...], spacing: tuple[float, ...] | None, strides: list[tuple[int, ...]], thin: int
) -> None:
    stages = plan_stages(size, spacing=spacing)
    dims = len(size)
    assert stages.strides == ((1,) * dims, *strides)
    assert stages.kernels == ((1, 3, 3),) * thin + ((3,) * dims,) * (len(strides) + 1 - thin)
    assert stages.divisor == tuple(torch.tensor(strides).prod(0).tolist())


# ---- parts ---------------------------------------------------------------------------------------------------------


def test_attention_is_the_softmax_of_scaled_products() -> None:
    torch.manual_seed(3)
    layer = Attention(6, 2, window=(2, 3)).double()
    x, context = torch.randn(2, 6, 6, dtype=torch.float64), torch.randn(2, 6, 6, dtype=torch.float64)
    assert layer.query is not None
    assert layer.table is not None
    q, (k, v) = layer.query(x), layer.key_value(context).chunk(2, -1)
    parts = []
    for head in range(2):
        at = slice(3 * head, 3 * head + 3)
        scores = q[..., at] @ k[..., at].transpose(1, 2) / 3**0.5
        for i in range(6):
            for j in range(6):
                row, column = i // 3 - j // 3 + 1, i % 3 - j % 3 + 2
                scores[:, i, j] += layer.table[head, 5 * row + column]
        parts.append(scores.softmax(-1) @ v[..., at])
    torch.testing.assert_close(layer(x, context), layer.out(torch.cat(parts, -1)))


def test_windows_come_back_where_they_were() -> None:
    x = torch.randn(2, 8, 4, 12, 3)
    assert torch.equal(from_windows(to_windows(x, (4, 4, 4)), (4, 4, 4), (8, 4, 12)), x)


def reached(layer: WindowLayer, place: int) -> set[int]:
    """Which places along a line of 12 voxels the voxel at `place` changes."""
    x = torch.randn(1, 4, 4, 12, 4)
    changed = x.clone()
    changed[0, 0, 0, place, 0] += 1.0  # one channel: LayerNorm takes out what all have in common
    with torch.no_grad():
        moved: Tensor = (layer(changed) - layer(x)).abs().amax((0, 1, 2, 4))
    return set(torch.nonzero(moved > 1e-7).flatten().tolist())


def test_shifted_windows_meet_their_neighbours_but_not_across_the_border() -> None:
    torch.manual_seed(4)
    plain, shifted = (WindowLayer(4, 2, (4, 4, 4), shifted=kind, skip=False) for kind in (False, True))
    assert reached(plain, 5) == {4, 5, 6, 7}
    assert reached(shifted, 5) == {2, 3, 4, 5}
    assert reached(shifted, 0) == {0, 1}
    assert reached(shifted, 11) == {10, 11}
