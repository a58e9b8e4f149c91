"""One case of a run: reading ahead, whose errors are whose, and the preview's slices, contours and letters."""

from __future__ import annotations

import io
import threading
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightm.evaluation.figures import class_colour
from lightm.evaluation.pictures import overlay_prediction
from lightm.images.volume import Volume
from lightm.inference.one_case import each_read, preview_png


def test_the_next_is_read_while_the_present_one_is_worked_on_and_no_further() -> None:
    begun = [threading.Event() for _ in range(4)]
    names: dict[int, str] = {}

    def read(item: int) -> int:
        names[item] = threading.current_thread().name
        begun[item].set()
        return item * 10

    for item, reading in each_read(range(4), read, ahead=True):
        if item < 3:
            assert begun[item + 1].wait(10)
            time.sleep(0.02)
        assert not any(event.is_set() for event in begun[item + 2 :])
        assert reading.take() == item * 10
    assert set(names.values()) == {"lightm-read"}


def test_without_reading_ahead_an_item_is_read_when_it_is_taken() -> None:
    done: list[tuple[int, str]] = []
    for item, reading in each_read("abc", lambda x: done.append((x, threading.current_thread().name)), ahead=False):
        assert [x for x, _ in done] == list("abc")[: "abc".index(item)]
        reading.take()
    assert done == [(x, threading.main_thread().name) for x in "abc"]


@pytest.mark.parametrize("ahead", [False, True])
def test_an_error_belongs_to_its_item(ahead: bool) -> None:
    results: list[object] = []

    def read(item: int) -> int:
        if item == 1:
            raise MemoryError("one")
        return item

    for _, reading in each_read([0, 1, 2], read, ahead=ahead):
        try:
            results.append(reading.take())
        except MemoryError as error:
            results.append(str(error))
    assert results == [0, "one", 2]


def test_an_interrupt_does_not_wait_for_the_reader() -> None:
    release = threading.Event()

    def read(item: int) -> int:
        if item:
            release.wait(30)
        return item

    started = time.monotonic()
    readings = each_read([0, 1], read, ahead=True)
    next(readings)
    with pytest.raises(KeyboardInterrupt):
        readings.throw(KeyboardInterrupt)
    assert time.monotonic() - started < 10
    release.set()


def coloured(png: bytes, index: int) -> tuple[int, np.ndarray]:
    """How many pixels have a class's colour, and the picture."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    wanted = [int(class_colour(index)[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels - wanted).max(axis=2) < 12).sum()), pixels


@pytest.mark.slow
def test_contours_show_what_was_found_in_any_orientation() -> None:
    data = np.zeros((12, 20, 16), np.uint8)
    data[4:8, 6:12, 5:9] = 1
    image = np.random.default_rng(0).normal(size=data.shape).astype(np.float32)
    straight = Volume.from_spacing(data, (3.0, 1.0, 1.0))
    with_one, _ = coloured(preview_png(straight.with_data(image), straight, {"organ": 1, "other": 2}), 0)
    empty = straight.with_data(np.zeros_like(data))
    without, _ = coloured(preview_png(straight.with_data(image), empty, {"organ": 1, "other": 2}), 0)
    assert with_one > 2 * without + 500  # the legend alone without it
    # The same volume stored along other axes gives the same picture.
    affine = np.array([[0, 0, -1.0, 15], [-1, 0, 0, 19], [0, 3, 0, 0], [0, 0, 0, 1]])
    stored = [np.ascontiguousarray(a.transpose(2, 0, 1)[::-1, :, ::-1]) for a in (data, image)]
    turned, picture = (Volume(array, (1.0, 3.0, 1.0), affine) for array in stored)
    assert np.array_equal(turned.to_canonical().data, data)
    assert preview_png(picture, turned, {"organ": 1}) == preview_png(straight.with_data(image), straight, {"organ": 1})


def middle(lines: Any) -> tuple[float, float]:
    points = np.concatenate(lines.get_segments())
    x, y = (points.min(axis=0) + points.max(axis=0)) / 2
    return float(x), float(y)


def test_letters_and_directions() -> None:
    pred = np.zeros((10, 12), np.uint8)
    pred[9, 11] = 1  # most anterior, most to the right
    figure = overlay_prediction([("axial, slice 1 of 1", pred * 1.0, pred, (1.0, 1.0))], {"organ": 1})
    whole = figure.axes[0]
    assert [text.get_text() for text in whole.texts] == ["R", "L", "A", "P"]
    (lines,) = whole.collections
    assert middle(lines) == (0.5, 0.5)  # on the picture's left, and on top
    flat = overlay_prediction([("image", pred * 1.0, pred, (1.0, 1.0))], {"organ": 1})
    assert not flat.axes[0].texts
    (lines,) = flat.axes[0].collections
    assert middle(lines) == (11.5, 9.5)


def test_a_2d_image() -> None:
    data = np.zeros((30, 40), np.uint8)
    data[10:20, 10:30] = 1
    labels = Volume.from_spacing(data, (1.0, 1.0))
    count, pixels = coloured(preview_png(labels.with_data(data * 100), labels, {"lung": 1}), 0)
    assert count > 500
    assert pixels.shape[2] == 3
