"""Runs uses of kernels on memory between pages without access: a touch of anything undeclared ends the process.

    LIGHTM_CHECK_KERNELS=1 python tests/ops/guard_pages.py end NAME ...      buffers end at a guard page
    LIGHTM_CHECK_KERNELS=1 python tests/ops/guard_pages.py start NAME ...    buffers begin after one

Prints errors against float64 as JSON, then {"kernels run": [...], "kernels": [...]}. Systems with mprotect only.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import sys
import threading
from collections.abc import Callable
from typing import Any

import kernel_cache

from lightm.ops import bounds, jit

_PAGE = mmap.PAGESIZE
_LIBC = ctypes.CDLL(None, use_errno=True)
_CANARY = 0xA5


class _Region:
    """Whole pages with a page before and after them that cannot be accessed."""

    def __init__(self, pages: int) -> None:
        self.memory = mmap.mmap(-1, (pages + 2) * _PAGE)
        self.first = ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) + _PAGE
        self.last = self.first + pages * _PAGE
        for guard in (self.first - _PAGE, self.last):
            if _LIBC.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(_PAGE), 0):
                raise OSError(ctypes.get_errno(), "mprotect")


class Guarded:
    """Replaces `bounds.execute`; one call at a time, since neighbours in a buffer are moved and copied back with it."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self.lock = threading.Lock()
        self.free: dict[int, list[_Region]] = {}
        self.ran: set[str] = set()
        self.nowhere = _Region(1)  # what is declared as not touched points to its guard page

    def __call__(self, kernel: Callable[..., Any], given: dict[str, Any], extents: dict[str, bounds.Extent]) -> None:
        with self.lock:
            self._run(kernel, given, extents)

    def _run(self, kernel: Callable[..., Any], given: dict[str, Any], extents: dict[str, bounds.Extent]) -> None:
        spans = {name: (int(given[name]) + low, int(given[name]) + high) for name, (low, high) in extents.items()}
        whole: list[list[int]] = []  # what overlaps is moved together
        for low, high in sorted(span for span in spans.values() if span[0] < span[1]):
            if whole and low < whole[-1][1]:
                whole[-1][1] = max(whole[-1][1], high)
            else:
                whole.append([low, high])
        moved = [(low, high, *self._take(low, high)) for low, high in whole]
        arguments = []
        for name, value in given.items():
            low, high = spans.get(name, (0, 0))
            if name not in spans:
                arguments.append(value)
            elif low >= high:
                arguments.append(0 if value == 0 else self.nowhere.last)
            else:
                start, to = next((of, at) for of, end, _, at in moved if of <= low < end)
                arguments.append(int(value) - start + to)
        kernel(*arguments)
        for low, high, region, at in moved:
            ctypes.memmove(low, at, high - low)
            for slack, size in ((region.first, at - region.first), (at + high - low, region.last - at - high + low)):
                if size and set(ctypes.string_at(slack, size)) != {_CANARY}:
                    raise AssertionError(f"{kernel.__name__} wrote beside a buffer")
            self.free.setdefault((region.last - region.first) // _PAGE, []).append(region)
        self.ran.add(kernel.py_func.__qualname__)

    def _take(self, low: int, high: int) -> tuple[_Region, int]:
        size = high - low
        pages = -(-size // _PAGE)
        waiting = self.free.get(pages)
        region = waiting.pop() if waiting else _Region(pages)
        ctypes.memset(region.first, _CANARY, region.last - region.first)
        at = region.last - size if self.at_end else region.first
        ctypes.memmove(at, low, size)
        return region, at


def main() -> int:
    """The command line."""
    where, *names = sys.argv[1:]
    if not bounds.CHECKS:
        raise SystemExit("set LIGHTM_CHECK_KERNELS=1")
    guarded = Guarded(where == "end")
    bounds.execute = guarded
    kernel_cache._register()
    for name in names or list(kernel_cache.USES):
        print(json.dumps({name: kernel_cache.USES[name]()}), flush=True)
    kernels = sorted(kernel.py_func.__qualname__ for kernel in jit._kernels)
    print(json.dumps({"kernels run": sorted(guarded.ran), "kernels": kernels}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
