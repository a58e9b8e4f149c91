"""Windows cover the volume, weights sum to one, and an identity network gives its input back."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.inferers import sliding_window_inference
from torch import Tensor, nn
from torch.nn import functional

from lightm.errors import InputError, LightMError
from lightm.inference.native_space import class_indices
from lightm.inference.sliding import axis_weights, logit_slabs, window_starts

from .factories import InMemory


def sliding_logits(network: nn.Module, image: Tensor, **options: Any) -> Tensor:
    return torch.cat(list(logit_slabs(network, InMemory(image), **options)), dim=1)


@settings(max_examples=200, deadline=None)
@given(extra=st.integers(0, 90), window=st.integers(1, 40), overlap=st.floats(0, 0.95))
def test_windows_cover_an_axis_with_weights_that_sum_to_one(extra: int, window: int, overlap: float) -> None:
    length = window + extra
    starts = window_starts(length, window, overlap)
    assert starts[0] == 0
    assert starts[-1] == extra
    assert all(0 < b - a <= max(1, int(window * (1 - overlap))) for a, b in pairwise(starts))
    total = torch.zeros(length)
    for start, weights in zip(starts, axis_weights(length, window, starts), strict=True):
        assert (weights > 0).all()
        total[start : start + window] += weights
    torch.testing.assert_close(total, torch.ones(length))


def test_overlap_of_a_half_takes_half_steps() -> None:
    assert window_starts(64, 32, 0.5) == [0, 16, 32]
    assert window_starts(65, 32, 0.5) == [0, 11, 22, 33]
    assert window_starts(32, 32, 0.5) == [0]
    assert window_starts(80, 32, 0.0) == [0, 24, 48]


@pytest.mark.parametrize(
    ("shape", "patch"),
    [
        ((40, 33), (16, 16)),
        ((5, 40), (16, 8)),
        ((7, 6), (16, 16)),
        ((16, 16), (16, 16)),
        ((20, 17, 31), (8, 16, 8)),
        ((3, 30, 9), (8, 16, 16)),
        ((30, 3, 9), (8, 8, 16)),
        ((1, 1, 1), (8, 8, 8)),
        ((16, 8, 24), (8, 8, 8)),
    ],
)
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.75])
def test_identity_network_returns_its_input(shape: tuple[int, ...], patch: tuple[int, ...], overlap: float) -> None:
    image = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    sizes, counts = set(), []

    class Identity(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            sizes.add(tuple(x.shape))
            return x

    options = {"patch_size": patch, "overlap": overlap, "progress": lambda *done: counts.append(done)}
    slabs = list(logit_slabs(Identity(), InMemory(image), **options))  # type: ignore[arg-type]
    torch.testing.assert_close(torch.cat(slabs, dim=1), image, rtol=1e-5, atol=1e-5)
    assert sizes == {(1, 2, *patch)}
    assert max(slab.shape[1] for slab in slabs) <= patch[0]
    assert counts == [(i + 1, len(counts)) for i in range(len(counts))]
    assert torch.equal(image, torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)))


def test_agrees_with_monai_where_windows_agree() -> None:
    torch.manual_seed(0)
    network = nn.Conv2d(1, 3, 3, padding=1).requires_grad_(False)  # its zero padding makes windows differ
    image = torch.randn(1, 32, 64)
    starts = [window_starts(32, 16, 0.5), window_starts(64, 32, 0.5)]
    assert starts == [[0, 8, 16], [0, 16, 32]]
    # The raw Gaussians: MONAI divides by their sum over windows itself.
    raw = [axis_weights(n, n, [0])[0] for n in (16, 32)]
    assert torch.allclose(raw[0], torch.ones(16))  # a single window always weighs one
    gaussian = [torch.exp(-0.5 * ((torch.arange(n) - (n - 1) / 2) / (n / 8)) ** 2).clamp(min=1e-3) for n in (16, 32)]
    expected = sliding_window_inference(
        image[None],
        (16, 32),
        1,
        network,
        overlap=0.5,
        mode="gaussian",
        roi_weight_map=gaussian[0][:, None] * gaussian[1],
    )
    result = sliding_logits(network, image, patch_size=(16, 32), overlap=0.5)
    torch.testing.assert_close(result, expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
def test_mirroring_equals_the_mean_over_flips(dims: int) -> None:
    torch.manual_seed(0)
    network = (nn.Conv2d, nn.Conv3d)[dims - 2](1, 2, 3, padding=1).requires_grad_(False)
    image = torch.randn(1, *(8,) * dims)
    result = sliding_logits(network, image, patch_size=(8,) * dims, mirror_axes=range(dims))
    flips = [axes for n in range(dims + 1) for axes in combinations(range(1, dims + 1), n)]
    assert len(flips) == 2**dims
    expected = torch.stack([network(image.flip(axes)[None])[0].flip(axes) for axes in flips]).mean(0)
    torch.testing.assert_close(result, expected)


def test_no_gradient_and_no_inference_mode_leak() -> None:
    network = nn.Conv2d(1, 2, 1)
    slabs = logit_slabs(network, InMemory(torch.randn(1, 20, 8)), patch_size=(8, 8))
    first = next(slabs)
    assert not first.requires_grad
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": (8,)}, "expected 2 positive numbers"),
        ({"patch_size": (8, 8), "overlap": 1.0}, "below 1"),
        ({"patch_size": (8, 8), "overlap": -0.1}, "below 1"),
        ({"patch_size": (8, 8), "mirror_axes": (2,)}, "axes from 0 to 1"),
    ],
)
def test_refuses_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sliding_logits(nn.Identity(), torch.zeros(1, 8, 8), **options)


def test_network_of_another_shape_or_not_finite() -> None:
    with pytest.raises(LightMError, match="expected logits"):
        sliding_logits(nn.MaxPool2d(2), torch.zeros(1, 8, 8), patch_size=(8, 8))
    with pytest.raises(LightMError, match="NaN or infinite"):
        sliding_logits(nn.Identity(), torch.full((1, 8, 8), torch.nan), patch_size=(8, 8))


@pytest.mark.parametrize("grid", [(9, 6, 5), (1, 4, 3), (12, 7)])
@pytest.mark.parametrize("factor", [0.4, 1.0, 1.7, 3.0])
@pytest.mark.parametrize("depth", [1, 2, 5, 12])
def test_argmax_by_slab_equals_argmax_of_all_logits_at_full_size(
    grid: tuple[int, ...], factor: float, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightm.inference.native_space._CHUNK_VALUES", 500)  # several pieces a slab
    logits = torch.randn(3, *grid, generator=torch.Generator().manual_seed(1))
    shape = tuple(max(1, round(n * factor)) for n in grid)
    mode = "trilinear" if len(grid) == 3 else "bilinear"
    full = functional.interpolate(logits[None], shape, mode=mode, align_corners=False)[0]
    slabs = torch.split(logits, depth, dim=1)
    assert (class_indices(slabs, grid, shape) == full.argmax(0).numpy()).all()


def test_equal_logits_give_the_first_class() -> None:
    assert (class_indices([torch.zeros(4, 3, 5, 5)], (3, 5, 5), (6, 9, 5)) == 0).all()
