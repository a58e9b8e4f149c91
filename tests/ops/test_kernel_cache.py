"""Compiled kernels that several processes put on disk: one name, one code; right numbers in every order of first uses.

The long form, random orders over all uses: `python tests/ops/kernel_cache.py orders --count 200` (docs/reliability.md).
"""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kernel_cache
import pytest

pytestmark = pytest.mark.slow

LINEAR, NETWORK = "linear", "lightm-small 3D, inference"
USES = [LINEAR, "linear, odd", "layer rvm, bidirectional, inference", "layer spm, axes, inference", NETWORK]


@pytest.fixture(scope="module")
def two_orders(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Path]]:
    """Caches and records of two processes that compiled the same kernels in opposite orders."""
    folder = tmp_path_factory.mktemp("orders")
    caches = [folder / name for name in ("forwards", "backwards")]
    records = [folder / f"{cache.name}.json" for cache in caches]

    def run(index: int) -> None:
        names = USES[:: (1, -1)[index]]
        # Numba orders some stack slots as Python orders sets of names: the same code in another order for another seed.
        seed = {"PYTHONHASHSEED": "0"}
        found = kernel_cache.run_process(["--record", str(records[index]), *names], caches[index], seed)
        assert kernel_cache.bad(found, names) == []

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    return caches, records


def test_no_name_stands_for_two_codes(two_orders: tuple[list[Path], list[Path]]) -> None:
    caches, records = two_orders
    count, wrong = kernel_cache.conflicts(records, caches)
    assert wrong == []
    assert count > 80


def test_the_same_kernels_have_the_same_files(two_orders: tuple[list[Path], list[Path]]) -> None:
    caches, _ = two_orders
    first, second = ({path.name for path in cache.rglob("*.kernel")} for cache in caches)
    assert first == second
    assert len(first) > 12


@pytest.mark.parametrize("turn", [0, 1])
def test_kernels_of_two_processes_work_together(
    two_orders: tuple[list[Path], list[Path]], tmp_path: Path, turn: int
) -> None:
    caches, _ = two_orders
    files = sorted(path.relative_to(caches[0]) for path in caches[0].rglob("*.kernel"))
    for index, file in enumerate(files):
        target = tmp_path / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(caches[(index + turn) % 2] / file, target)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.kernel")}
    found = kernel_cache.run_process(USES, tmp_path)
    assert kernel_cache.bad(found, USES) == []
    # all were loaded: nothing was compiled again
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.kernel")} == before


def test_two_processes_one_after_the_other(tmp_path: Path) -> None:
    for name in (LINEAR, NETWORK, LINEAR):
        assert kernel_cache.bad(kernel_cache.run_process([name], tmp_path), [name]) == []


def test_two_processes_that_compile_at_once(tmp_path: Path) -> None:
    names = ["conv1d", "group norm", "scan, 8 states, 4 groups", "max_pool2 3D"]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda turn: kernel_cache.run_process(names[::turn], tmp_path), (1, -1)))
    assert [kernel_cache.bad(one, names) for one in found] == [[], []]
    assert kernel_cache.bad(kernel_cache.run_process(names, tmp_path, {"OMP_NUM_THREADS": "4"}), names) == []
    assert not list(tmp_path.rglob("*.tmp"))
