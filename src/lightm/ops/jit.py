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


def _stamp(compiled: Any) -> None:
    """Let the cache on disk forget a kernel when any file of this package changes.

    Numba looks at the kernel's own file alone, and at its time and size only: a kernel whose pieces come from other
    files would go on with old ones after an update. Without these inner names of Numba's its own rule stays.
    """
    index = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
    stamp = getattr(index, "_source_stamp", None)
    if index is not None and stamp is not None:
        index._source_stamp = (stamp, _sources())


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
    compiled = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})(function)
    _stamp(compiled)
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
