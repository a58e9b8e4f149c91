"""How kernels are compiled: Numba without the interpreter lock, kept on disk under names that determine their code.

Compiled kernels lie where Numba keeps them: in NUMBA_CACHE_DIR, beside this package, or in the user's cache folder when
the package cannot be written to. Import this module only from kernel modules: it loads Numba.

Names matter because the linker takes functions of one name for one function, and Numba's own names stand for one code
within a process only: see docs/decisions/0009.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import sys
import uuid
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any, TypeVar

import llvmlite.binding
import numba
import numpy as np
from numba.core import config, event, types
from numba.core.caching import FunctionCache
from numba.core.dispatcher import Dispatcher
from numba.core.extending import _Intrinsic
from numba.core.serialize import dumps

from lightm.ops import bounds

_log = logging.getLogger("lightm.ops")
_Function = TypeVar("_Function", bound=Callable[..., Any])
_kernels: set[Any] = set()


def _features() -> set[str]:
    """What the processor that Numba compiles for can do, e.g. {"avx2", "avx512f"}."""
    text = config.CPU_FEATURES
    if text is None:  # with NUMBA_CPU_NAME the user names another processor
        text = "" if config.CPU_NAME is not None else llvmlite.binding.get_host_cpu_features().flatten()
    return {name[1:] for name in text.split(",") if name.startswith("+")}


FEATURES = _features()
AVX512 = "avx512f" in FEATURES
LANES = 16 if AVX512 else 8
"""float32 numbers in one vector of the kernels; LLVM splits a vector that the processor does not have."""


# Names --------------------------------------------------------------------------------------------------------------


@cache
def _common() -> str:
    """What every kernel's code follows from: this package's sources, the compiler and the processor."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    compiler = (numba.__version__, llvmlite.__version__, sys.version_info[:2])
    options = (config.OPT, config.LOOP_VECTORIZE, config.SLP_VECTORIZE, config.DEBUGINFO_DEFAULT, config.BOUNDSCHECK)
    digest.update(repr((compiler, options, config.CPU_NAME, sorted(FEATURES))).encode())
    return digest.hexdigest()


_names: set[str] = set()


@cache
def _file(path: str) -> str:
    """A checksum of a source file; its path where there is none."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return path


def _describe(value: Any) -> str:
    """A text that is equal for two values only if a kernel that uses them compiles to the same code."""
    if isinstance(value, Dispatcher):
        if value.py_func.__qualname__ in _names:
            return f"kernel {value.py_func.__module__}.{value.py_func.__qualname__}"
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes, np.generic)):
        return f"{type(value).__name__} {value!r}"
    elif isinstance(value, (tuple, frozenset)):
        parts = [_describe(part) for part in value]
        return f"{type(value).__name__} ({', '.join(parts if isinstance(value, tuple) else sorted(parts))})"
    elif isinstance(value, CodeType):
        return f"code {value.co_code.hex()} {value.co_names} {_describe(value.co_consts)}"
    elif isinstance(value, types.Type):
        return f"type {value!r}"
    elif isinstance(value, ModuleType):
        return f"module {value.__name__}"
    else:
        of = value._defn if isinstance(value, _Intrinsic) else value
        if isinstance(of, (FunctionType, BuiltinFunctionType, type)) and "<" not in of.__qualname__:
            return f"{of.__module__}.{of.__qualname__}"
    raise TypeError(
        f"a kernel cannot use {value!r} of type {type(value).__name__}: its name could not tell this value from "
        "others. Use numbers, texts, tuples, Numba types, kernels' functions, or what a module defines by name"
    )


def _names_used(code: CodeType) -> set[str]:
    return set(code.co_names).union(*(_names_used(part) for part in code.co_consts if isinstance(part, CodeType)))


def _own_name(function: Callable[..., Any]) -> str:
    """A name that determines the function's code, from its sources, closure, defaults, globals and the processor.

    Raises TypeError, at import, where something that the code depends on cannot be told apart.
    """
    code = function.__code__
    cells = dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True))
    outside = {name: function.__globals__[name] for name in _names_used(code) if name in function.__globals__}
    defaults = (*(function.__defaults__ or ()), *sorted((function.__kwdefaults__ or {}).items()))
    parts = [_common(), _file(code.co_filename), function.__module__, function.__qualname__, _describe(code)]
    for values in (cells, outside):
        parts += [f"{name} = {_describe(value)}" for name, value in sorted(values.items())]
    parts.append(_describe(defaults))
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    numbers = [str(int(value)) for value in cells.values() if isinstance(value, int)]
    name = "-".join([function.__qualname__.split(".")[-1], *numbers, digest[:16]])
    _names.add(name)
    return name


# Files --------------------------------------------------------------------------------------------------------------


class _Files:
    """A compiled kernel's files, one per signature: a checksum, then Numba's form of it.

    There is no index that two processes could mix up. Files are written atomically; a damaged one is reported, and the
    kernel is compiled again.
    """

    _MARK = b"lightm kernel 1\n"

    def __init__(self, folder: str, name: str) -> None:
        self.folder, self.name = Path(folder), name

    def _path(self, key: Any) -> Path:
        return self.folder / f"{self.name}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.kernel"

    def load(self, key: Any) -> Any:
        """What `save` was given, or None."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("a compiled kernel cannot be read and is compiled again: %s: %s", path, error.strerror)
            return None
        start = len(self._MARK) + 32
        if data[:start] != self._MARK + hashlib.sha256(data[start:]).digest():
            _log.warning("a compiled kernel is damaged and is compiled again: %s", path)
            return None
        return pickle.loads(data[start:])

    def save(self, key: Any, data: Any) -> None:
        """Write a compiled kernel; a folder that cannot be written costs compiling it again, not the call."""
        text = dumps(data)
        path = self._path(key)
        spare = path.with_name(f"{path.name[:40]}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            spare.write_bytes(self._MARK + hashlib.sha256(text).digest() + text)
            os.replace(spare, path)
        except OSError as error:
            spare.unlink(missing_ok=True)
            _log.warning("compiled kernels cannot be kept on disk: %s: %s", path.parent, error.strerror)


class _Cache(FunctionCache):
    """Numba's cache of compiled functions, in `_Files`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = _Files(self._cache_path, function.__qualname__)

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return str(sig), codegen.magic_tuple()


# Compiling ----------------------------------------------------------------------------------------------------------


class _Note(event.Listener):
    """Says once that kernels are being compiled; loading them from the cache is silent."""

    said = False

    def on_start(self, event: Any) -> None:
        if not self.said and event.data.get("dispatcher") in _kernels:
            _Note.said = True
            _log.info("compiling CPU kernels; they are kept on disk, so this happens once for a machine")

    def on_end(self, event: Any) -> None:
        return None


def kernel(extents: bounds.Extents) -> Callable[[_Function], Callable[..., Any]]:
    """Compile an entry point called from Python: takes and gives integers, floats and addresses only.

    `extents` says, from some of the kernel's arguments, which bytes it touches behind each address; see `bounds`.
    """

    def compile_with(function: _Function) -> Callable[..., Any]:
        if not _kernels:
            event.register("numba:compile", _Note())
        function.__qualname__ = _own_name(function)
        compiled = numba.njit(nogil=True, error_model="numpy", fastmath={"contract"})(function)
        try:
            compiled._cache = _Cache(compiled.py_func)
        except RuntimeError:  # neither the package's folder nor the user's can be written to
            _log.warning("compiled kernels cannot be kept on disk: set NUMBA_CACHE_DIR to a folder for them")
        _kernels.add(compiled)
        return bounds.checked(compiled, extents) if bounds.CHECKS else compiled

    return compile_with


def device_function(function: _Function) -> _Function:
    """Compile a piece used inside kernels; it is inlined by LLVM and cached with its callers."""
    function.__qualname__ = _own_name(function)
    return numba.njit(error_model="numpy", fastmath={"contract"})(function)
