"""What post-processing changes in label maps, what it leaves, and how its rules are read."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from lightm.errors import InputError
from lightm.inference.postprocess import (
    Change,
    DropSmall,
    FillHoles,
    KeepLargest,
    Postprocess,
    Step,
    Trial,
    apply_rules,
    component_sizes,
    describe,
    read_postprocess,
    unit_of,
)


def keep_largest(labels: np.ndarray, values: tuple[int, ...]) -> np.ndarray:
    return apply_rules(labels, [KeepLargest(values=values)])


def drop_small(labels: np.ndarray, value: int, below: float, spacing_mm: tuple[float, ...]) -> np.ndarray:
    return apply_rules(labels, [DropSmall(value=value, below=below, unit=unit_of(labels.ndim))], spacing_mm)


def fill_holes(labels: np.ndarray, value: int) -> np.ndarray:
    return apply_rules(labels, [FillHoles(value=value)])


TRUTH = np.array([[1, 1, 2, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]])


# ---- the largest component ----------------------------------------------------------------------------------


def test_only_the_largest_component_of_the_values_stays() -> None:
    stray = TRUTH.copy()
    stray[2, 4:] = 1
    stray[0, 5] = 2
    assert keep_largest(stray, (1, 2)).tolist() == TRUTH.tolist()
    only_ones = keep_largest(stray, (1,))
    assert only_ones[2].tolist() == [0] * 6
    assert only_ones[0, 5] == 2
    assert stray[2, 4] == 1, "the input is left alone"


def test_components_join_over_faces_not_corners() -> None:
    assert keep_largest(np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0]]), (1,)).tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]
    cube = np.zeros((3, 3, 3), np.uint8)
    cube[0, 0, 0] = cube[1, 0, 0] = cube[2, 1, 0] = 4
    assert np.argwhere(keep_largest(cube, (4,))).tolist() == [[0, 0, 0], [1, 0, 0]]


def test_of_equally_large_components_the_first_stays() -> None:
    assert keep_largest(np.array([[0, 1, 0, 1, 0, 1]]), (1,)).tolist() == [[0, 1, 0, 0, 0, 0]]


# ---- small components ---------------------------------------------------------------------------------------


def test_components_below_a_volume_go() -> None:
    labels = np.zeros((6, 6, 6), np.uint8)
    labels[0, 0, :2], labels[2, 2, :3], labels[4:, 4:, 4:], labels[0, 5, 5] = 1, 1, 1, 2
    spacing = (5.0, 2.0, 1.0)  # 0.01 ml a voxel
    cleaned = drop_small(labels, 1, 0.03, spacing)
    expected = labels.copy()
    expected[0, 0, :2] = 0
    assert np.array_equal(cleaned, expected), "one of exactly that volume stays, and so do other classes"
    assert not (drop_small(labels, 1, 1.0, spacing) == 1).any()
    assert drop_small(labels, 1, 0.02, spacing) is labels


def test_in_2d_the_size_is_an_area_and_counts_pixels_where_there_is_no_spacing() -> None:
    image = np.array([[3, 0, 3, 3], [0, 0, 0, 3]], np.uint8)
    assert drop_small(image, 3, 2, (1.0, 1.0)).tolist() == [[0, 0, 3, 3], [0, 0, 0, 3]]
    assert drop_small(image, 3, 0.6, (0.5, 1.0)).tolist() == [[0, 0, 3, 3], [0, 0, 0, 3]]
    assert drop_small(image, 3, 0.5, (0.5, 1.0)) is image


def test_a_size_needs_the_spacing_and_the_unit_of_the_dimension() -> None:
    step = DropSmall(value=1, below=1.0, unit="ml")
    with pytest.raises(InputError, match="needs the voxel spacing"):
        apply_rules(np.zeros((2, 2, 2), np.uint8), [step])
    with pytest.raises(InputError, match=r"1 ml does not fit a label map with 2 axes.*mm2"):
        apply_rules(TRUTH, [step], (1.0, 1.0))


# ---- holes --------------------------------------------------------------------------------------------------


def test_holes_are_filled_and_other_classes_in_them_stay() -> None:
    ring = np.array([[1, 1, 1, 1, 1, 0], [1, 0, 2, 1, 0, 1], [1, 0, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    expected = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 2, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    assert fill_holes(ring, 1).tolist() == expected.tolist()
    assert fill_holes(ring, 2) is ring
    assert ring[1, 1] == 0, "the input is left alone"


def test_what_reaches_the_border_of_the_image_is_no_hole() -> None:
    bay = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    assert fill_holes(bay, 1) is bay
    shell = np.ones((3, 3, 3), np.uint8)
    shell[1, 1, 1] = 0
    open_shell = shell.copy()
    open_shell[1, 1, 0] = 0
    assert fill_holes(shell, 1).sum() == 27
    assert fill_holes(open_shell, 1) is open_shell
    assert fill_holes(shell[1], 1).sum() == 9


# ---- all of them --------------------------------------------------------------------------------------------

maps = arrays.arrays(np.uint8, arrays.array_shapes(min_dims=2, max_dims=3, max_side=7), elements=st.integers(0, 3))


def _steps(dims: int) -> list[Step]:
    sized = DropSmall(value=1, below=0.0035 if dims == 3 else 3.5, unit="ml" if dims == 3 else "mm2")
    return [KeepLargest(values=(1, 2)), KeepLargest(values=(2,)), sized, FillHoles(value=1), FillHoles(value=3)]


@settings(max_examples=150, deadline=None)
@given(maps)
def test_every_step_does_what_it_says_by_another_way(labels: np.ndarray) -> None:
    """Compared with whole-image scipy, without boxes; idempotent; in place the same; the input is left alone."""
    given_map, spacing = labels.copy(), (1.0,) * labels.ndim
    for step in _steps(labels.ndim):
        cleaned = apply_rules(labels, [step], spacing)
        assert np.array_equal(labels, given_map)
        expected = labels.copy()
        if isinstance(step, FillHoles):
            expected[ndimage.binary_fill_holes(labels == step.value) & (labels == 0)] = step.value
        else:
            values = step.values if isinstance(step, KeepLargest) else (step.value,)
            components, count = ndimage.label(np.isin(labels, values))
            sizes = [int((components == number).sum()) for number in range(1, count + 1)]
            for number, size in enumerate(sizes, 1):
                keep = size >= 3.5 if isinstance(step, DropSmall) else number == sizes.index(max(sizes)) + 1
                if not keep:
                    expected[components == number] = 0
            assert component_sizes(np.isin(labels, values)).tolist() == sizes
        assert np.array_equal(cleaned, expected)
        assert (cleaned is labels) == np.array_equal(expected, labels), "untouched where there is nothing to do"
        assert apply_rules(cleaned, [step], spacing) is cleaned, "idempotent"
        at_once = labels.copy()
        assert apply_rules(at_once, [step], spacing, in_place=True) is at_once
        assert np.array_equal(at_once, expected)


@settings(max_examples=50, deadline=None)
@given(maps)
def test_steps_follow_one_another(labels: np.ndarray) -> None:
    steps, spacing, expected = _steps(labels.ndim), (1.0,) * labels.ndim, labels
    for step in steps:
        expected = apply_rules(expected, [step], spacing)
    assert np.array_equal(apply_rules(labels, steps, spacing), expected)


def test_nothing_to_do_gives_the_same_array() -> None:
    assert keep_largest(TRUTH, (1, 2)) is TRUTH
    assert keep_largest(np.zeros((2, 2), int), (1,)).sum() == 0
    assert apply_rules(TRUTH, []) is TRUTH
    assert apply_rules(TRUTH, [(1, 2), (7,)]) is TRUTH


def test_values_above_a_byte_and_arrays_in_any_order() -> None:
    labels = np.zeros((4, 5, 6), np.int16)
    labels[0, 0, 0], labels[2:, 2:, 2:] = 700, 700
    for form in (labels, np.asfortranarray(labels), labels[::-1, :, ::-1]):
        cleaned = apply_rules(form, [KeepLargest(values=(700,))])
        assert cleaned.dtype == np.int16
        assert int((cleaned == 700).sum()) == int((labels == 700).sum()) - 1


def test_memory_is_six_bytes_a_voxel_of_the_box() -> None:
    rng = np.random.default_rng(0)
    labels = np.zeros((120, 160, 160), np.uint8)
    box = labels[10:110, 20:140, 20:140]
    box[ndimage.gaussian_filter(rng.normal(size=box.shape), 3) > 0] = 1
    rules: list[Step] = [
        DropSmall(value=1, below=0.01, unit="ml"),
        KeepLargest(values=(1, 2)),
        FillHoles(value=1),
    ]
    before = labels.sum()
    for rule in rules:
        tracemalloc.start()
        apply_rules(labels, [rule], (1.0, 1.0, 1.0), in_place=True)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 6 * box.size + (8 << 20), (rule, peak / box.size)
    assert labels.sum() != before


@pytest.mark.parametrize("seed", range(8))
def test_what_changes_is_counted_for_each_class(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, (12, 11, 10)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.6] = 0
    for step in _steps(3):
        changes: dict[int, Change] = {}
        cleaned = apply_rules(labels, [step], (1.0, 1.0, 1.0), changes=changes)
        for value in (1, 2):
            change = changes.get(value, Change())
            assert change.removed_voxels == np.count_nonzero((labels == value) & (cleaned != value))
            assert change.filled_voxels == np.count_nonzero((labels != value) & (cleaned == value))
        if isinstance(step, FillHoles):
            holes = ndimage.label(labels != step.value)[0]
            filled = np.unique(holes[(labels == 0) & (cleaned == step.value)])
            assert changes.get(step.value, Change()).filled_holes == len(filled)
            continue
        values = step.values if isinstance(step, KeepLargest) else (step.value,)
        parts = ndimage.label(np.isin(labels, values))[0]
        for value in values:
            gone = np.unique(parts[(labels == value) & (cleaned == 0)])
            assert changes.get(value, Change()).removed_components == len(gone)


def test_changes_of_several_steps_add_up_and_are_told() -> None:
    labels = np.array([[1, 0, 1, 1, 1], [0, 0, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [2, 0, 0, 0, 1]], np.uint8)
    steps: list[Step] = [KeepLargest(values=(1,)), FillHoles(value=1), DropSmall(value=2, below=2, unit="mm2")]
    changes: dict[int, Change] = {}
    apply_rules(labels, steps, (1.0, 1.0), changes=changes)
    assert {value: str(change) for value, change in changes.items()} == {
        1: "2 components (2 voxels) removed and 1 hole (1 voxels) filled",
        2: "1 component (1 voxels) removed",
    }
    again = labels[:3, 2:]
    changes.clear()
    apply_rules(again, steps[:1], changes=changes)
    assert changes == {}
    assert str(Change()) == "nothing changed"


# ---- the record in model.json -------------------------------------------------------------------------------


def test_a_record_goes_to_json_and_back() -> None:
    tried = tuple(Trial(step=step, what="cleans", taken=True, why="helps", gain={3: 0.5}, p=0.01) for step in _steps(3))
    steps = (*_steps(3), KeepLargest(values=(3,), gain={3: 0.25}))
    record = Postprocess(steps=steps, cases=4, dsc_before={3: 0.5}, tried=tried, why="no time")
    text = json.dumps({"postprocess": record.model_dump(mode="json")})
    assert read_postprocess(json.loads(text), "model.json") == record


def test_older_models_hold_the_largest_components_alone() -> None:
    old = read_postprocess({"postprocess": {"keep_largest": [[1, 2], [1]]}}, "model.json")
    assert old.steps == (KeepLargest(values=(1, 2)), KeepLargest(values=(1,)))
    assert read_postprocess({"postprocess": {"keep_largest": []}}, "model.json") == Postprocess()
    assert read_postprocess({}, "model.json") == Postprocess()


HOSTILE: list[Any] = [
    None,
    [],
    "keep_largest",
    {"keep_largest": 3},
    {"keep_largest": [3]},
    {"keep_largest": [["1; import os"]]},
    {"keep_largest": [[0]]},
    {"keep_largest": [[]]},
    {"keep_largest": [[2**70]]},
    {"keep_largest": [[1]] * 1001},
    {"keep_largest": [[1]], "steps": []},
    {"steps": {}},
    {"steps": [{"rule": "run", "value": 1}]},
    {"steps": [{"value": 1}]},
    {"steps": [{"rule": "drop_small", "value": 1, "below": float("nan"), "unit": "ml"}]},
    {"steps": [{"rule": "drop_small", "value": 1, "below": -1, "unit": "ml"}]},
    {"steps": [{"rule": "drop_small", "value": 1, "below": 1, "unit": "cups"}]},
    {"steps": [{"rule": "fill_holes", "value": -1}]},
    {"steps": [{"rule": "fill_holes", "value": 1, "then": "more"}]},
    {"steps": [], "cases": -1},
    {"steps": [], "tried": [{"step": {"rule": "run"}}]},
    {"steps": [], "dsc_before": {"a": 1}},
]


@pytest.mark.parametrize("content", HOSTILE, ids=lambda content: repr(content)[:40])
def test_a_record_that_does_not_fit_is_one_error(content: Any) -> None:
    with pytest.raises(InputError, match=r"^model\.json: postprocess: "):
        read_postprocess({"postprocess": content}, "model.json")


def test_steps_are_told_in_words() -> None:
    names = {1: "liver", 2: "tumour"}
    told = [describe(step, names) for step in _steps(3)]
    assert told == [
        "keep the largest component of liver and tumour",
        "keep the largest component of tumour",
        "drop components of liver below 0.0035 ml",
        "fill holes in liver",
        "fill holes in 3",
    ]


def test_a_real_label_map_is_its_own_clean_up() -> None:
    """A hippocampus is one component a part and has no holes; voxels strewn over it are found again."""
    folder = Path(__file__).parents[2].parent / "shared" / "data"
    found = sorted(folder.glob("*ippocampus*/labelsTr/*.nii.gz"))
    if not found:
        pytest.skip("the real data (../shared/data) are not here")
    from lightm.images.io import read_volume

    volume = read_volume(found[0], kind="label")
    labels = volume.data
    spoilt = labels.copy()
    spoilt[0, 0, 0] = 1
    inner = np.argwhere(ndimage.binary_erosion(labels == 1))[0]
    spoilt[tuple(inner)] = 0
    steps: list[Step] = [DropSmall(value=1, below=0.002, unit="ml"), FillHoles(value=1)]
    assert np.array_equal(apply_rules(spoilt, steps, volume.spacing_mm), labels)
