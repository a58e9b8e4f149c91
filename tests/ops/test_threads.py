"""The pool: every item once, errors raised, nested and forked use, lazy imports."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading

import pytest
import torch

from lightm.ops.threads import parallel_for, worker_count


@pytest.fixture
def four_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("four_threads")
def test_every_item_once() -> None:
    for items in (0, 1, 3, 1000):
        seen: list[int] = []
        workers: set[int] = set()

        def work(item: int, worker: int, seen: list[int] = seen, workers: set[int] = workers) -> None:
            seen.append(item)
            workers.add(worker)

        parallel_for(work, items)
        assert sorted(seen) == list(range(items))
        assert workers <= set(range(worker_count(items)))


@pytest.mark.usefixtures("four_threads")
def test_error_of_an_item_is_raised() -> None:
    def work(item: int, worker: int) -> None:
        if item == 5:
            raise ValueError("item 5")

    with pytest.raises(ValueError, match="item 5"):
        parallel_for(work, 50)


@pytest.mark.usefixtures("four_threads")
def test_calls_from_several_threads_and_inside_items() -> None:
    total = []

    def inner(item: int, worker: int) -> None:
        total.append(item)

    threads = [threading.Thread(target=parallel_for, args=(lambda i, w: parallel_for(inner, 10), 10)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    assert len(total) == 400


def _child(queue: multiprocessing.Queue[int]) -> None:
    torch.set_num_threads(2)
    seen: list[int] = []
    parallel_for(lambda item, worker: seen.append(item), 20)
    queue.put(len(seen))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.usefixtures("four_threads")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_has_its_own_pool() -> None:
    parallel_for(lambda item, worker: None, 20)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == 20
    child.join(timeout=60)
    assert child.exitcode == 0


@pytest.mark.slow
def test_importing_operators_loads_no_compiler() -> None:
    script = "import sys, lightm.ops; print(any(m in sys.modules for m in ('numba', 'llvmlite')))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False"
