"""Compiling: a note the first time, names that determine the code, files that survive damage and each other."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from numba import types

from lightm.ops import jit

SCRIPT = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
from lightm.ops import max_pool2
print(max_pool2(torch.ones(1, 2, 2, 1)).item())
"""
NOTE = "compiling CPU kernels; they are kept on disk, so this happens once for a machine"
CHOSEN = "max_pool2: using the cpu implementation"


def pool_once(cache: Path, **environment: str) -> list[str]:
    """What a new process says that pools one image with this cache folder."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache), **environment},
        capture_output=True, text=True, check=True, timeout=240,
    )  # fmt: skip
    return done.stdout.splitlines()


@pytest.mark.slow
def test_note_once_and_kept_on_disk(tmp_path: Path) -> None:
    assert pool_once(tmp_path) == [CHOSEN, NOTE, "1.0"]
    assert len(list(tmp_path.rglob("*.kernel"))) == 1
    assert pool_once(tmp_path) == [CHOSEN, "1.0"]
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "of another version", "of Numba"])
def test_a_damaged_file_is_said_and_compiled_again(tmp_path: Path, damage: str) -> None:
    pool_once(tmp_path)
    (path,) = tmp_path.rglob("*.kernel")
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes({
        "cut": whole[:middle],
        "empty": b"",
        "bit": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "of another version": whole.replace(b"kernel 1", b"kernel 0", 1),
        "of Numba": whole[48:],
    }[damage])  # fmt: skip
    said = pool_once(tmp_path)
    assert said == [CHOSEN, f"a compiled kernel is damaged and is compiled again: {path}", NOTE, "1.0"]
    assert pool_once(tmp_path) == [CHOSEN, "1.0"]  # mended


@pytest.mark.slow
def test_files_of_other_processors_are_left_alone(tmp_path: Path) -> None:
    pool_once(tmp_path, NUMBA_CPU_NAME="x86-64-v3", NUMBA_CPU_FEATURES="+avx2,+fma")
    first = set(tmp_path.rglob("*.kernel"))
    assert pool_once(tmp_path) == [CHOSEN, NOTE, "1.0"]
    assert set(tmp_path.rglob("*.kernel")) > first


@pytest.mark.slow
def test_files_of_numbas_own_cache_are_not_read(tmp_path: Path) -> None:
    pool_once(tmp_path)
    (path,) = tmp_path.rglob("*.kernel")
    path.with_name("resample_cpu.pool-4-000000000000-1.py311.nbi").write_bytes(b"an index of an earlier version")
    path.unlink()
    assert pool_once(tmp_path) == [CHOSEN, NOTE, "1.0"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the rights of folders do not stop this user")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert pool_once(tmp_path)[-1] == "1.0"


def test_a_full_disk_costs_compiling_again_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = jit._Files(str(tmp_path / "missing"), "name")
    with caplog.at_level(logging.WARNING, "lightm.ops"):
        files.save("key", 1)
    assert "compiled kernels cannot be kept on disk" in caplog.text
    assert files.load("key") is None


def _made(value: Any) -> Callable[[int], Any]:
    def function(x: int) -> Any:
        return x if value is None else value

    return function


def test_names_tell_every_kind_of_closure_apart() -> None:
    values = [1, 2, True, 1.0, "1", b"1", None, (1, 2), (1, (2,)), types.int64, types.float32]
    values += [jit.device_function(_made(1)), jit.device_function(_made(2)), abs, max]
    names = [jit._own_name(_made(value)) for value in values]
    assert len(set(names)) == len(names)
    assert [jit._own_name(_made(value)) for value in values] == names


def test_names_tell_code_defaults_and_globals_apart() -> None:
    def named(source: str, **outside: Any) -> str:
        space: dict[str, Any] = {"__name__": "made", **outside}
        exec(source, space)
        return jit._own_name(space["f"])

    names = [
        named("def f(x): return x + 1"),
        named("def f(x): return x + 2"),
        named("def f(x): return x - 1"),
        named("def f(x, y=1): return x + 1"),
        named("def f(x, y=2): return x + 1"),
        named("def f(x, *, y=2): return x + 1"),
        named("def f(x): return x + N", N=1),
        named("def f(x): return x + N", N=2),
        named("def f(x): return (lambda y: y + N)(x)", N=1),
        named("def f(x): return (lambda y: y + N)(x)", N=2),
    ]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("value", [[1], {"a": 1}, object(), lambda x: x, _made(1), {1: 2}.keys()])
def test_what_a_name_cannot_tell_apart_is_refused_at_import(value: Any) -> None:
    for compile_it in (jit.device_function, jit.kernel(lambda x: {})):
        with pytest.raises(TypeError, match="its name could not tell this value from others"):
            compile_it(_made(value))


def test_every_kernel_has_a_name_of_its_own() -> None:
    from lightm.ops import conv1d_cpu, resample_cpu
    from lightm.ops.scan import kernels

    made = [factory(4) for factory in (kernels.forward_kernel, kernels.backward_kernel, kernels.sum_kernel)]
    made += [resample_cpu.pool_kernel(kind, 2) for kind in ("max", "avg", "max back", "avg back")]
    names = [kernel.py_func.__qualname__ for kernel in jit._kernels]
    assert len(made) == 7
    assert conv1d_cpu.conv1d_forward is not None
    assert len(set(names)) == len(names) >= 9
    assert set(names) <= jit._names
