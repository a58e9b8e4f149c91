"""How kernels are compiled: Numba without the interpreter lock, cached on disk, with a note in the log.

Numba keeps compiled kernels beside this package, or in NUMBA_CACHE_DIR, or in the user's cache folder when the
package cannot be written to. Import this module only from kernel modules: it loads Numba.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core import config, event

_log = logging.getLogger("lightm.ops")
_Function = TypeVar("_Function", bound=Callable[..., Any])
_kernels: set[Any] = set()


@cache
def _sources() -> str:
    """A checksum of all of this package's code."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _file_name(function: Callable[..., Any]) -> str:
    """A name of the kernel's own for its files in the cache: its variables from outside and all code are in it.

    Numba keeps the variants of a kernel in one set of files, which two processes that compile at the same time can mix
    up, and looks for changes in the kernel's own file only, which misses those of the pieces it is made of.
    """
    outside = [cell.cell_contents for cell in function.__closure__ or ()]
    numbers = [str(value) for value in outside if isinstance(value, int)]
    return "-".join([function.__qualname__.replace(".<locals>", ""), *numbers, _sources()[:12]])


class _Note(event.Listener):
    """Says once that kernels are being compiled; loading them from the cache is silent."""

    said = False

    def on_start(self, event: Any) -> None:
        if not self.said and event.data.get("dispatcher") in _kernels:
            _Note.said = True
            _log.info("compiling CPU kernels; they are kept on disk, so this happens once for a machine")

    def on_end(self, event: Any) -> None:
        return None


def kernel(function: _Function) -> _Function:
    """Compile an entry point called from Python: takes and gives integers, floats and addresses only."""
    if not _kernels:
        event.register("numba:compile", _Note())
    function.__qualname__ = _file_name(function)
    compiled = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})(function)
    _kernels.add(compiled)
    return compiled


def device_function(function: _Function) -> _Function:
    """Compile a piece used inside kernels; it is inlined by LLVM and cached with its callers."""
    return numba.njit(error_model="numpy", fastmath={"contract"})(function)


def _features() -> set[str]:
    """What the processor that Numba compiles for can do, e.g. {"avx2", "avx512f"}."""
    if config.CPU_NAME is not None:  # the user names another processor (NUMBA_CPU_NAME)
        text = config.CPU_FEATURES or ""
        return {name[1:] for name in text.split(",") if name.startswith("+")}
    if config.CPU_FEATURES is not None:
        text = config.CPU_FEATURES
    else:
        import llvmlite.binding

        text = llvmlite.binding.get_host_cpu_features().flatten()
    return {name[1:] for name in text.split(",") if name.startswith("+")}


FEATURES = _features()
AVX512 = "avx512f" in FEATURES
LANES = 16 if AVX512 else 8
"""float32 numbers in one vector of the kernels; LLVM splits a vector that the processor does not have."""
