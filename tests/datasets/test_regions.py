"""Region-based labels of dataset.json: what is read, refused, checked, planned and converted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import lightm
from lightm.datasets.convert import convert_dataset
from lightm.datasets.description import Description, read_description
from lightm.datasets.discovery import open_dataset
from lightm.errors import InputError
from lightm.labels import check_regions, mask_of, targets_of
from lightm.preparation.plan import load_plan, make_plan
from tests.helpers import describe, write_dataset

BRATS: dict[str, Any] = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}


def regions_of(root: Path, labels: dict[str, Any], order: Any) -> Description:
    describe(root, labels=labels, regions_class_order=order)
    return read_description(root / "dataset.json")


def test_regions_are_read_in_their_order_with_the_values_of_the_files(tmp_path: Path) -> None:
    found = regions_of(tmp_path, {**BRATS, "ignore": 4}, [1, "2", 3])
    assert found.regions == {"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)}
    assert found.regions_class_order == (1, 2, 3)
    assert found.labels == {"background": 0, "label_1": 1, "label_2": 2, "label_3": 3}
    assert found.ignore_label == 4
    assert found.targets == found.regions


def test_kits_order_where_a_value_between_stands_for_a_region(tmp_path: Path) -> None:
    labels = {"background": [0], "kidney and mass": [1, 2, 3], "mass": [2, 3], "tumour": [2]}
    assert regions_of(tmp_path, labels, [1, 3, 2]).regions_class_order == (1, 3, 2)


def test_lists_of_one_value_are_plain_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = regions_of(tmp_path, {"background": 0, "a": [2], "b": [1]}, [1, 2])
    assert (found.labels, found.regions) == ({"background": 0, "b": 1, "a": 2}, {})
    assert "regions_class_order is not used" in caplog.text


@pytest.mark.parametrize(
    ("labels", "order", "message"),
    [
        (BRATS, None, r"no regions_class_order; .*'whole', 'core', 'enhancing'"),
        (BRATS, [], "no regions_class_order"),
        (BRATS, [1, 2], r"\[1, 2\] has 2 value\(s\) for 3"),
        (BRATS, 1, "expected a list"),
        (BRATS, [1, 2, "x"], "expected a whole number"),
        (BRATS, [1, 2, 7], r"writes 7 where 'enhancing' is found, which holds \[3\]"),
        (BRATS, [3, 2, 3], "holds a value twice"),
        ({"background": 0, "core": [2], "whole": [1, 2]}, [2, 1], "'core' .* would always be replaced"),
        ({"background": 0, "a": [0, 1]}, [1], "holds 0, which is the background"),
        ({"background": 0, "a": [1, -2]}, [1], "values from 0 to 32767"),
        ({"background": 0, "a": [1, 40000]}, [1], "values from 0 to 32767"),
        ({"background": 0, "a": [1, 1.5]}, [1], "expected a whole number"),
        ({"background": 0, "a": [1, 1]}, [1], "each once"),
        ({"background": 0, "a": [1, 2], "b": []}, [1, 2], "'b' has no value"),
        ({"background": 0, "a": [1, 2], "b": [2, 1]}, [1, 2], "hold the same values"),
        ({"background": 0, "a": [1, 2], "ignore": 2}, [1], "the ignore label"),
        ({"background": 0, "a": [1, 2], "ignore": [3, 4]}, [1], "give it one value"),
        ({"a": [1, 2]}, [1], "no label has the value 0"),
        ({"background": 0, "all": list(range(1, 300))}, [1], "299 label values"),
        ({"background": 0, **{f"r{i}": [i, i + 1] for i in range(1, 70)}}, list(range(1, 70)), "at most 62"),
    ],
)
def test_what_cannot_be_is_named_with_its_file(tmp_path: Path, labels: Any, order: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        regions_of(tmp_path, labels, order)
    assert str(tmp_path / "dataset.json") in str(raised.value)


def test_overlap_that_a_label_map_cannot_give_back_is_found() -> None:
    assert check_regions({"a": [1, 2], "b": [2, 3]}, [1, 3]) == {2: 3}
    assert check_regions({"a": [1, 2, 3], "b": [2, 3], "c": [3]}, [1, 2, 3]) == {}


def test_masks_and_targets() -> None:
    array = np.array([0, 1, 2, 5])
    np.testing.assert_array_equal(mask_of(array, 2), array == 2)
    np.testing.assert_array_equal(mask_of(array, [1, 5]), [False, True, False, True])
    assert targets_of({"background": 0, "a": 4}, {}) == {"a": 4}


@pytest.fixture
def regions(tmp_path: Path) -> Path:
    root = write_dataset(tmp_path / "Dataset001_Regions")
    describe(root, labels={"background": 0, "organ": [1, 2], "lesion": [2]}, regions_class_order=[1, 2])
    return root


def test_check_counts_regions_and_says_what_train_will_do(regions: Path) -> None:
    result = lightm.check(regions)
    assert result.ok
    assert not result.problems
    assert result.summary["region_cases"] == {"organ": 3, "lesion": 3}
    labels = {"background": 0, "organ": [1, 2], "both": [2, 3], "ghost": [3, 4]}
    describe(regions, labels=labels, regions_class_order=[1, 2, 4])
    said = [str(problem) for problem in lightm.check(regions).problems]
    assert any("region 'ghost' (value 3, 4) occurs in no label map; `lightm train` goes on" in line for line in said)
    assert any("label 3 belongs to other regions than 4" in line for line in said)
    assert lightm.check(regions).ok


def test_a_value_in_no_region_is_an_error(regions: Path) -> None:
    describe(regions, labels={"background": 0, "organ": [1, 3]}, regions_class_order=[1])
    result = lightm.check(regions)
    assert not result.ok
    assert "label value 2 is not in dataset.json" in str(result.problems[0])


def test_a_plan_holds_regions_and_one_without_is_as_before(regions: Path, tmp_path: Path) -> None:
    plan = make_plan(open_dataset(regions))
    assert plan.outputs == ("organ", "lesion")
    assert plan.targets == {"organ": (1, 2), "lesion": (2,)}
    assert plan.label_regions == ((1, 2), (2,))
    plan.save(tmp_path / "plan.yaml")
    assert load_plan(tmp_path / "plan.yaml") == plan
    content = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**content, "regions_class_order": [2, 1]}, sort_keys=False))
    with pytest.raises(InputError, match="regions_class_order writes 1 where 'lesion' is found"):
        load_plan(tmp_path / "plan.yaml")
    describe(regions)
    plain = make_plan(open_dataset(regions))
    assert plain.outputs == ("background", "organ", "lesion")
    assert not {"regions", "regions_class_order"} & plain.model_dump().keys()


def test_a_conversion_keeps_regions(regions: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, target in (("imagesTr", "images"), ("labelsTr", "labels")):
        (source / target).mkdir()
        for path in (regions / name).iterdir():
            path.rename(source / target / path.name)
    labels = {"background": 0, "organ": [1, 2], "lesion": [2], "ignore": 9}
    describe(source, labels=labels, regions_class_order=[1, 2])
    converted = convert_dataset("folder", source, tmp_path / "out")
    content = json.loads((converted.folder / "dataset.json").read_text())
    assert (content["labels"], content["regions_class_order"]) == (labels, [1, 2])
    assert open_dataset(converted.folder).targets == {"organ": (1, 2), "lesion": (2,)}
