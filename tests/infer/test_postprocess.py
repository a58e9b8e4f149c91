"""Stray components: what is removed, and when a rule is chosen."""

from __future__ import annotations

import numpy as np

from lightm.infer.postprocess import apply_rules, choose_rules, keep_largest

TRUTH = np.array([[1, 1, 2, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]])


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


def test_nothing_to_remove_gives_the_same_array() -> None:
    assert keep_largest(TRUTH, (1, 2)) is TRUTH
    assert keep_largest(np.zeros((2, 2), int), (1,)).sum() == 0
    assert apply_rules(TRUTH, []) is TRUTH


def test_a_rule_is_chosen_where_it_helps_and_only_there() -> None:
    stray = TRUTH.copy()
    stray[2, 5] = 1
    assert choose_rules([stray, TRUTH], [TRUTH, TRUTH], (1, 2)) == [(1, 2)]
    assert choose_rules([TRUTH], [TRUTH], (1, 2)) == []
    assert choose_rules([], [], (1, 2)) == []


def test_a_class_of_two_parts_is_left_alone() -> None:
    lungs = np.array([[1, 1, 0, 1, 1]])
    assert choose_rules([lungs], [lungs], (1,)) == []
    # together the rule would remove the far 2; by itself class 1 may still lose its stray voxel
    truth = np.array([[1, 1, 1, 0, 2, 0, 0]])
    predicted = np.array([[1, 1, 1, 0, 2, 0, 1]])
    assert choose_rules([predicted], [truth], (1, 2)) == [(1,)]


def test_removing_what_is_spurious_counts_as_a_gain_and_ignored_voxels_do_not_count() -> None:
    truth = np.array([[1, 1, 0, 0, 9]])
    predicted = np.array([[1, 1, 0, 2, 0]])
    assert choose_rules([predicted], [truth], (1, 2)) == [(1, 2)]
    ignored = np.array([[1, 1, 0, 0, 1]])
    assert choose_rules([ignored], [truth], (1,), ignore_label=9) == []
