"""Memory of the machine and of this process."""

from __future__ import annotations

import threading

import pytest

from lightm import memory


def test_a_call_that_fails_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    if memory.resident() is None:
        pytest.skip("this system does not say what a process holds")
    monkeypatch.setattr(memory, "reset_high_water", lambda: False)  # so that a thread samples
    seen: list[str] = []

    def fail() -> None:
        seen.extend(thread.name for thread in threading.enumerate())
        raise RuntimeError("no such patch")

    with pytest.raises(RuntimeError, match="no such patch"):
        memory.peak_of(fail)
    assert "lightm-peak" in seen
    assert "lightm-peak" not in [thread.name for thread in threading.enumerate()]


def test_what_can_be_had_is_part_of_what_there_is() -> None:
    total, available = memory.total_bytes(), memory.available_bytes()
    if total is None or available is None:
        pytest.skip("this system does not say")
    assert 0 < available <= total
