"""A small pool of threads for kernels that release the interpreter lock.

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
