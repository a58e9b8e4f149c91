"""Memory of large results is used again, and never while anyone can still see it."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from lightm.ops import memory, selective_scan
from lightm.ops.memory import LARGEST, SMALLEST, Results

FLOATS = SMALLEST // 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_plain_tensor(dtype: torch.dtype) -> None:
    y = Results().empty((3, FLOATS, 2), dtype)
    assert (y.shape, y.dtype, y.is_contiguous(), y.device.type) == ((3, FLOATS, 2), dtype, True, "cpu")
    y.fill_(3)
    assert (y == 3).all()


def test_freed_memory_is_used_again_when_it_fits() -> None:
    pool = Results()
    y = pool.empty((2 * FLOATS,), torch.float32)
    at = y.data_ptr()
    del y
    assert pool.empty((2, FLOATS), torch.float32).data_ptr() == at
    smaller = pool.empty((FLOATS,), torch.float32)
    assert smaller.data_ptr() == at
    del smaller
    assert pool.empty((FLOATS * 2 + 1,), torch.float32).numel() == FLOATS * 2 + 1  # too large: another block


def test_what_can_still_be_seen_is_not_used_again() -> None:
    pool = Results()
    y = pool.empty((FLOATS,), torch.float32).fill_(1)
    row, array, base = y[5:9], y.numpy()[7:8], y.view(2, -1).detach()
    others = []
    for kept in ("y", "row", "base", "array"):
        others.append(pool.empty((FLOATS,), torch.float32).fill_(2))
        if kept == "y":
            del y
        elif kept == "row":
            assert row.tolist() == [1, 1, 1, 1]
            del row
        elif kept == "base":
            assert (base == 1).all()
            del base
        assert array.tolist() == [1]
    assert len({x.data_ptr() for x in others}) == 4


def test_at_most_one_block_is_kept() -> None:
    pool = Results()
    blocks = [pool.empty((FLOATS,), torch.float32) for _ in range(3)]
    addresses = [x.data_ptr() for x in blocks]
    while blocks:
        del blocks[0]
    again = [pool.empty((FLOATS,), torch.float32) for _ in range(2)]
    assert again[0].data_ptr() == addresses[2]  # the last one freed
    assert again[1].data_ptr() != addresses[2]
    assert len(pool._owners) == 2  # nothing is remembered of results that are gone


@pytest.mark.parametrize("size", [SMALLEST - 4, LARGEST + 4])
def test_small_and_huge_results_are_not_kept(size: int) -> None:
    pool = Results()
    y = pool.empty((size // 4,), torch.float32)
    del y
    assert pool._kept is None


def test_a_result_in_a_cycle_and_in_another_thread() -> None:
    pool = Results()
    cycle: list[object] = [pool.empty((FLOATS,), torch.float32)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert pool._kept is not None
    taken: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: taken.append(pool.empty((FLOATS,), torch.float32)))
    thread.start()
    thread.join()
    assert pool._kept is None
    taken.clear()
    assert pool._kept is not None


def test_a_system_without_the_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.mmap, "MADV_FREE", 9999, raising=False)
    monkeypatch.delattr(memory.mmap, "MADV_HUGEPAGE", raising=False)
    pool = Results()
    y = pool.empty((FLOATS,), torch.float32).fill_(1)
    assert y.sum() == FLOATS
    del y
    assert pool._kept is not None


def test_scans_in_a_row_keep_their_own_results() -> None:
    u = torch.randn(1, SMALLEST // 64, 16, generator=torch.Generator().manual_seed(0))
    steps, b = u.abs() * 0.1, u[..., :4]
    a = -torch.ones(16, 4)
    first = selective_scan(u, steps, a, b, b, impl="cpu")
    copy = first.clone()
    second = selective_scan(2 * u, steps, a, b, b, impl="cpu")
    assert torch.equal(first, copy)
    torch.testing.assert_close(second, 2 * copy)
    address = second.data_ptr()
    del second
    assert selective_scan(u, steps, a, b, b, impl="cpu").data_ptr() == address
