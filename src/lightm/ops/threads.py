"""A small pool of threads for kernels that release the interpreter lock, and how work is cut for it.

Work is cut into numbered items, every item writes its own outputs, and idle threads fetch the next number:
the result depends neither on the number of threads nor on which of them did what. The calling thread works too
and never waits for a thread that has not started, so calls may come from several threads at once (autograd runs
backward in its own), and a forked child simply starts a pool of its own.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

_ROWS = 16  # rows of one work item in 2D; fixed, so that sums do not depend on the number of threads
_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def worker_count(items: int) -> int:
    """Threads used for `items` work items: at most `torch.get_num_threads()`, the calling one included."""
    return max(1, min(items, torch.get_num_threads()))


def parallel_for(work: Callable[[int, int], None], items: int) -> None:
    """Call `work(item, worker)` for every item in 0..items-1, each once, on `worker_count(items)` threads.

    `worker` numbers the threads of this call from 0 (the caller): scratch memory can be kept for each.
    The first exception raised by an item is raised here after all threads have stopped.
    """
    workers = worker_count(items)
    if workers == 1:
        for item in range(items):
            work(item, 0)
        return
    counter = itertools.count()
    take = threading.Lock()

    def share(worker: int) -> None:
        while True:
            with take:
                item = next(counter)
            if item >= items:
                return
            work(item, worker)

    futures = _submit(share, workers - 1)
    try:
        share(0)
    finally:
        started = [future for future in futures if not future.cancel()]
        errors = [future.exception() for future in started]
    for error in errors:
        if error is not None:
            raise error


def for_blocks(entries: int, length: int, block: int, work: Callable[[int, int, int, int], None]) -> None:
    """Call work(entry, first, last + 1, worker) for the `length` tokens of every entry, in blocks of `block`."""
    blocks = -(-length // block)

    def item(index: int, worker: int) -> None:
        entry, part = divmod(index, blocks)
        work(entry, part * block, min((part + 1) * block, length), worker)

    parallel_for(item, entries * blocks)


def plane_sizes(x: Tensor) -> tuple[int, int, int]:
    """(depth, height, width) of x (Bt, *spatial, C); depth is 1 in 2D."""
    sizes = x.shape[1:-1]
    return (sizes[0], sizes[1], sizes[2]) if len(sizes) == 3 else (1, sizes[0], sizes[1])


def halved(x: Tensor) -> tuple[int, ...]:
    """The shape of x (Bt, *spatial, C) pooled by 2."""
    return (x.shape[0], *(size // 2 for size in x.shape[1:-1]), x.shape[-1])


def doubled(x: Tensor) -> tuple[int, ...]:
    """The shape of x (Bt, *spatial, C) with every spatial axis doubled."""
    return (x.shape[0], *(size * 2 for size in x.shape[1:-1]), x.shape[-1])


def row_chunks(x: Tensor) -> int:
    """How many chunks `for_rows` cuts the rows of x into."""
    depth, height, _ = plane_sizes(x)
    return x.shape[0] * depth * (1 if x.dim() == 5 else -(-height // _ROWS))


def for_rows(x: Tensor, work: Callable[[int, int, int, int, int], None]) -> None:
    """Call work(chunk, entry, z, first row, last row + 1) for all rows of x: by planes in 3D, by 16 rows in 2D."""
    depth, height, _ = plane_sizes(x)
    block = height if x.dim() == 5 else _ROWS
    blocks = -(-height // block)

    def item(index: int, worker: int) -> None:
        plane, part = divmod(index, blocks)
        entry, z = divmod(plane, depth)
        work(index, entry, z, part * block, min((part + 1) * block, height))

    parallel_for(item, row_chunks(x))


def _submit(share: Callable[[int], None], helpers: int) -> list[Future[None]]:
    """Hand `share` to the pool `helpers` times; fewer at interpreter shutdown, when the caller does it all."""
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < helpers:
            if _pool is not None:
                _pool.shutdown(wait=False)
            _pool = ThreadPoolExecutor(max_workers=helpers, thread_name_prefix="lightm-ops")
            _pool_size = helpers
        try:
            return [_pool.submit(share, worker) for worker in range(1, helpers + 1)]
        except RuntimeError:  # the interpreter is going down and takes no new work
            return []


def _forget_pool() -> None:
    """A forked child has the pool object but none of its threads."""
    global _pool, _pool_size, _lock
    _pool, _pool_size, _lock = None, 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
