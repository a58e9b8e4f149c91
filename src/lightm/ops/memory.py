"""Memory of the process: large results that reuse it when the caller has let one go, and giving it back to the system.

A result owns its memory as any tensor does, through its storage: only when the last tensor on that storage is gone is
the memory free, so two living results never share any. Why it is used again: README.md, "Memory".
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import threading
import weakref
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

SMALLEST = 1 << 20
"""Bytes; a smaller result comes from PyTorch's allocator, which does not hand such memory back to the system."""
LARGEST = 1 << 28
"""Bytes; the memory of a larger result goes back to the system at once."""


def _map(size: int) -> mmap.mmap:
    """Fresh memory of the process's own, in large pages where the system has them."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):  # Windows
        return mmap.mmap(-1, size)
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _advise(block, "MADV_HUGEPAGE")
    return block


def _advise(block: mmap.mmap, name: str) -> None:
    if hasattr(mmap, name):
        with suppress(OSError):  # a system without this advice: nothing is lost but time
            block.madvise(getattr(mmap, name))


class Results:
    """Gives out tensors; keeps at most one freed block, of at most LARGEST bytes.

    One is enough: a loop that holds its last result while it computes the next one swaps two blocks. The kept block
    is marked as free for the system to take when memory is short (MADV_FREE on Linux and macOS).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: mmap.mmap | None = None
        self._owners: dict[int, weakref.ref[Any]] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous CPU tensor."""
        size = math.prod(shape) * dtype.itemsize
        if not SMALLEST <= size <= LARGEST:
            return torch.empty(shape, dtype=dtype)
        block = self._take(size) or _map(size)
        owner = np.frombuffer(block, np.uint8, size)
        # the tensor's storage holds `owner`; this reference calls back when the storage is gone
        key = id(owner)
        self._owners[key] = weakref.ref(owner, lambda _: self._put(key, block))
        return torch.frombuffer(owner, dtype=dtype).view(shape)

    def _take(self, size: int) -> mmap.mmap | None:
        with self._lock:
            block = self._kept
            if block is None or not size <= len(block) <= 2 * size:
                return None
            self._kept = None
            return block

    def _put(self, key: int, block: mmap.mmap) -> None:
        """Called wherever the last tensor dies: perhaps in a garbage collection inside `_take`, so never waits."""
        del self._owners[key]
        _advise(block, "MADV_FREE")
        if self._lock.acquire(blocking=False):
            self._kept = block  # the block kept so far, if any, goes back to the system
            self._lock.release()


RESULTS = Results()


@cache
def _trim() -> Any:
    """glibc's malloc_trim, or None where the C library has none."""
    try:
        return ctypes.CDLL(None).malloc_trim if sys.platform.startswith("linux") else None
    except (AttributeError, OSError):  # another C library
        return None


def release_unused() -> None:
    """Let the C library return its free pages, which it keeps after many tensors of a few MB came and went.

    Without this a backward pass with activation checkpointing, which computes large layers again in segments, holds
    hundreds of MB that nothing uses. Takes a few milliseconds at most; nothing where the C library has no such call.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
