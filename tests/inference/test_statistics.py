"""Statistics of label maps that can be counted by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from lightm.errors import InputError
from lightm.images.volume import Volume
from lightm.inference.statistics import class_statistics, write_statistics

CLASSES = {"organ": 1, "lesion": 5, "absent": 7}


def made() -> tuple[Volume, Volume]:
    """Four voxels of the organ in the middle, one of the lesion at the border; x runs to the left from +100 mm."""
    affine = np.array([[-2.0, 0, 0, 100], [0, 3.0, 0, -50], [0, 0, 4.0, 7], [0, 0, 0, 1]])
    labels, image = np.zeros((4, 5, 6), np.uint8), np.full((4, 5, 6), -1000, np.int16)
    for intensity, (z, y, x) in zip((1, 2, 3, 10), ((1, 2, 2), (1, 2, 3), (2, 2, 2), (2, 2, 3)), strict=True):
        labels[z, y, x], image[z, y, x] = 1, intensity
    labels[3, 1, 1], image[3, 1, 1] = 5, 42
    return Volume(labels, (4.0, 3.0, 2.0), affine), Volume(image, (4.0, 3.0, 2.0), affine)


def test_every_number_by_hand() -> None:
    organ, lesion, absent = class_statistics(*made(), CLASSES)
    assert (organ.voxels, organ.volume_ml) == (4, pytest.approx(4 * 24 / 1000))
    assert (organ.mean, organ.median, organ.min, organ.max) == (4.0, 2.5, 1.0, 10.0)
    assert organ.sd == pytest.approx(((9 + 4 + 1 + 36) / 4) ** 0.5)
    assert organ.centroid_mm == pytest.approx([100 - 2 * 2.5, -50 + 3 * 2.0, 7 + 4 * 1.5])
    assert organ.touches_border is False
    assert (lesion.voxels, lesion.mean, lesion.sd, lesion.touches_border) == (1, 42.0, 0.0, True)
    assert lesion.centroid_mm == pytest.approx([98.0, -47.0, 19.0])
    assert absent.model_dump(exclude={"class_name", "value"}, exclude_none=True) == {"voxels": 0, "volume_ml": 0.0}


@pytest.mark.parametrize("place", [(0, 1), (2, 1), (1, 0), (1, 3)])
def test_in_2d_pixels_are_counted_and_every_edge_is_a_border(place: tuple[int, int]) -> None:
    data = np.zeros((3, 4), np.uint8)
    data[1, 1] = 1
    labels = Volume.from_spacing(data, (0.5, 0.25))
    image = labels.with_data(np.arange(12, dtype=np.uint8).reshape(3, 4))
    (inside,) = class_statistics(labels, image, {"lung": 1})
    assert (inside.voxels, inside.volume_ml, inside.mean, inside.touches_border) == (1, None, 5.0, False)
    assert inside.centroid_mm == pytest.approx([0.25, 0.5])
    data[place] = 1
    assert class_statistics(labels, image, {"lung": 1})[0].touches_border is True


def test_the_single_slice_of_a_scan_is_no_border() -> None:
    data = np.zeros((1, 5, 5), np.uint8)
    data[0, 2, 2] = 1
    labels = Volume.from_spacing(data, (5.0, 1.0, 1.0))
    assert class_statistics(labels, labels, {"organ": 1})[0].touches_border is False


def test_other_shapes_are_refused() -> None:
    labels, image = made()
    with pytest.raises(InputError, match=r"label map of shape \(4, 5, 6\) on an image of shape \(3, 5, 6\)"):
        class_statistics(labels, Volume.from_spacing(image.data[1:], (4.0, 3.0, 2.0)), CLASSES)


def test_tables(tmp_path: Path) -> None:
    write_statistics(tmp_path, [("a", class_statistics(*made(), CLASSES))])
    with (tmp_path / "statistics.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(CLASSES)
    assert rows["organ"]["case"] == "a"
    assert (rows["organ"]["volume_ml"], rows["organ"]["centroid_y_mm"]) == ("0.096", "-44")
    assert rows["lesion"]["touches_border"] == "yes"
    assert (rows["absent"]["mean"], rows["absent"]["touches_border"], rows["absent"]["voxels"]) == ("", "", "0")
    content = json.loads((tmp_path / "statistics.json").read_text())
    assert content["cases"][0]["classes"][0]["mean"] == 4.0
