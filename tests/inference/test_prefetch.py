"""Reading ahead: what is read when, and whose errors are whose."""

from __future__ import annotations

import threading
import time

import pytest

from lightm.inference.prefetch import each_read


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
