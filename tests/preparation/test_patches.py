from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightm.errors import InputError
from lightm.preparation.augment import AugmentConfig
from lightm.preparation.cache import PreprocessedCase, store
from lightm.preparation.patches import EpochSampler, PatchDataset, cut


def grid_case(folder: Path, name: str, label: np.ndarray) -> PreprocessedCase:
    """A case whose image numbers its voxels from 1 on, so that a patch tells where it was cut."""
    image = np.arange(1, label.size + 1, dtype=np.float32).reshape(1, *label.shape)
    return store(folder / name, name, image, label.astype(np.uint8), {"spacing_mm": [1.0] * label.ndim})


@pytest.fixture
def corner(tmp_path):
    """4x4, class 1 at (0, 0), class 2 at (3, 3)."""
    label = np.zeros((4, 4))
    label[0, 0], label[3, 3] = 1, 2
    return grid_case(tmp_path, "corner", label)


def test_cut_by_hand():
    grid = np.arange(16).reshape(4, 4)
    np.testing.assert_array_equal(cut(grid, (1, 2), (2, 2), -1), [[6, 7], [10, 11]])
    np.testing.assert_array_equal(cut(grid, (-1, 3), (2, 2), -1), [[-1, -1], [3, -1]])
    np.testing.assert_array_equal(cut(grid[None], (0, 0), (1, 2), 0), [[[0, 1]]])


def test_foreground_patches_hold_the_class_and_classes_are_drawn_evenly(corner):
    patches = PatchDataset([corner], patch_size=(2, 2), seed=1, foreground_fraction=1.0)
    seen = Counter()
    for index in range(400):
        image, label = patches[index]["image"], patches[index]["label"]
        # Each corner is in one 2x2 patch only: the patch is known to the voxel.
        if (label == 1).any():
            np.testing.assert_array_equal(image[0], [[1, 2], [5, 6]])
            seen[1] += 1
        else:
            np.testing.assert_array_equal(image[0], [[11, 12], [15, 16]])
            assert label[1, 1] == 2
            seen[2] += 1
    assert 160 < seen[1] < 240


def test_other_patches_lie_anywhere_evenly(corner):
    patches = PatchDataset([corner], patch_size=(2, 2), seed=1, foreground_fraction=0.0)
    starts = Counter(int(patches[index]["image"][0, 0, 0]) for index in range(900))
    assert set(starts) == {1, 2, 3, 5, 6, 7, 9, 10, 11}
    assert all(60 < count < 145 for count in starts.values())


def test_foreground_fraction_is_the_share_of_placed_patches(corner):
    patches = PatchDataset([corner], patch_size=(1, 1), seed=3, foreground_fraction=0.5)
    placed = sum(int(patches[index]["label"][0, 0] > 0) for index in range(800))
    expected = 800 * (0.5 + 0.5 * 2 / 16)
    assert abs(placed - expected) < 60


def test_a_foreground_voxel_lies_anywhere_in_its_patch(tmp_path):
    label = np.zeros((7, 7))
    label[3, 3] = 1
    case = grid_case(tmp_path, "middle", label)
    patches = PatchDataset([case], patch_size=(3, 3), seed=0, foreground_fraction=1.0)
    places = {tuple(int(i) for i in torch.nonzero(patches[index]["label"])[0]) for index in range(200)}
    assert places == {(row, column) for row in range(3) for column in range(3)}


def test_small_cases_are_padded_on_any_side(corner):
    patches = PatchDataset([corner], patch_size=(6, 4), seed=0)
    offsets = set()
    for index in range(60):
        sample = patches[index]
        assert sample["image"].shape == (1, 6, 4)
        rows = torch.nonzero(sample["label"][:, 0] != 255).ravel()
        assert len(rows) == 4
        offsets.add(int(rows[0]))
        np.testing.assert_array_equal(sample["image"][0, rows[0] : rows[0] + 4], np.arange(1, 17).reshape(4, 4))
        outside = sample["label"] == 255
        assert (sample["image"][0][outside] == 0).all()
        assert int(outside.sum()) == 8
    assert offsets == {0, 1, 2}


def test_items_have_the_types_a_network_needs(corner):
    sample = PatchDataset([corner], patch_size=(2, 2), seed=0)[0]
    assert (sample["image"].dtype, sample["label"].dtype, sample["case"]) == (torch.float32, torch.int64, "corner")


def make_many(folder: Path, count: int = 5) -> list[PreprocessedCase]:
    rng = np.random.default_rng(0)
    return [grid_case(folder, f"c{number}", rng.integers(0, 3, (6, 7, 8))) for number in range(count)]


def same(first: dict, second: dict) -> bool:
    return first["case"] == second["case"] and all(torch.equal(first[key], second[key]) for key in ("image", "label"))


def test_every_case_comes_once_a_turn_in_a_new_order(tmp_path):
    patches = PatchDataset(make_many(tmp_path), patch_size=(2, 2, 2), seed=0)
    turns = [tuple(patches[turn * 5 + i]["case"] for i in range(5)) for turn in range(6)]
    assert all(sorted(turn) == ["c0", "c1", "c2", "c3", "c4"] for turn in turns)
    assert len(set(turns)) > 3


def test_an_item_depends_on_seed_and_index_alone(tmp_path):
    cases = make_many(tmp_path)
    options = {"patch_size": (4, 4, 4), "augment": AugmentConfig(rotation_probability=1.0)}
    first = PatchDataset(cases, seed=7, **options)
    forward = [first[index] for index in range(12)]
    second = PatchDataset(cases, seed=7, **options)
    backward = [second[index] for index in reversed(range(12))][::-1]
    assert all(same(a, b) for a, b in zip(forward, backward, strict=True))
    other = PatchDataset(cases, seed=8, **options)
    assert not all(same(forward[index], other[index]) for index in range(12))
    assert not same(forward[0], forward[5])


def test_workers_change_nothing(tmp_path):
    patches = PatchDataset(make_many(tmp_path), patch_size=(4, 4, 4), seed=7, augment=AugmentConfig())
    alone = list(DataLoader(patches, sampler=EpochSampler(8, start_epoch=3), batch_size=2))
    helped = list(DataLoader(patches, sampler=EpochSampler(8, start_epoch=3), batch_size=2, num_workers=2))
    for first, second in zip(alone, helped, strict=True):
        assert torch.equal(first["image"], second["image"])
        assert torch.equal(first["label"], second["label"])


def test_iterating_ends(tmp_path):
    assert len(list(PatchDataset(make_many(tmp_path), patch_size=(2, 2, 2), seed=0))) == 5


def test_epochs_follow_each_other():
    sampler = EpochSampler(3)
    assert (list(sampler), len(sampler)) == ([0, 1, 2], 3)
    sampler.set_epoch(2)
    assert list(sampler) == [6, 7, 8]
    assert list(EpochSampler(3, start_epoch=1)) == [3, 4, 5]
    with pytest.raises(InputError, match="length 0"):
        EpochSampler(0)


def test_wrong_use_is_told(corner, tmp_path):
    bare = store(tmp_path / "bare", "bare", np.zeros((1, 4, 4), np.float32), None, {})
    for cases, options, message in [
        ([], {"patch_size": (2, 2)}, "no cases"),
        ([bare], {"patch_size": (2, 2)}, "case bare has no label map"),
        ([corner], {"patch_size": (2, 2, 2)}, "does not fit case corner"),
        ([corner], {"patch_size": (0, 2)}, "at least one voxel"),
        ([corner], {"patch_size": (2, 2), "foreground_fraction": 2}, "from 0 to 1"),
        ([corner], {"patch_size": (2, 2), "augment": AugmentConfig(mirror_axes=[2])}, "in 2D axes 0 to 1"),
    ]:
        with pytest.raises(InputError, match=message):
            PatchDataset(cases, seed=0, **options)
    with pytest.raises(IndexError):
        PatchDataset([corner], patch_size=(2, 2), seed=0)[-1]


def test_regions_are_drawn_evenly_and_their_classes_by_their_voxels(tmp_path):
    label = np.zeros((1, 8))
    label[0, [0, 1, 2]], label[0, 7] = 1, 2
    case = grid_case(tmp_path, "row", label)
    patches = PatchDataset(
        [case], patch_size=(1, 1), seed=1, foreground_fraction=1.0, label_regions=((1, 2), (2,), (3,))
    )
    seen = Counter(int(patches[index]["image"]) for index in range(800))
    assert set(seen) == {1, 2, 3, 8}
    # Half fall to the region (1, 2), three quarters of these to class 1; none to the region without voxels.
    assert abs(seen[8] - 800 * (1 / 2 + 1 / 8)) < 60
    assert all(60 < seen[voxel] < 145 for voxel in (1, 2, 3))
