"""Memory of the machine and of this process: what there is, what it holds now, the most it held, the peak of one call.

The peak of a call is the resident set's high-water mark during it, less the resident set just before. Linux resets the
mark before the call (/proc/self/clear_refs). Elsewhere, or where that is forbidden, the growth of the process's
all-time peak and samples every millisecond serve: Windows through GetProcessMemoryInfo, other systems through getrusage
alone, which can only tell a growth beyond the earlier peak. Where nothing can be read the answer is None.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


def available_bytes() -> int | None:
    """Memory that can be had now (Linux), all of the machine's (other POSIX), or None (Windows)."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return _proc_bytes("/proc/meminfo", "MemAvailable:")
    return total_bytes()


def total_bytes() -> int | None:
    """Memory of the machine, or None where the system does not say (Windows)."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _proc_bytes(file: str, key: str) -> int:
    """A line such as `VmHWM:   1234 kB` of a file of Linux's /proc, in bytes; raises OSError or ValueError."""
    for line in Path(file).read_text(encoding="ascii").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{file} has no {key}")


def resident() -> int | None:
    """Bytes of this process in memory now, or None where the system does not say."""
    try:
        if sys.platform == "win32":
            return _windows_counters()[1]
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def high_water() -> int | None:
    """The most bytes that this process had in memory, since its start or the last `reset_high_water`."""
    try:
        if sys.platform == "win32":
            return _windows_counters()[0]
        if sys.platform == "linux":
            with contextlib.suppress(OSError, ValueError, IndexError):
                return _proc_bytes("/proc/self/status", "VmHWM:")
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024  # bytes on macOS, kilobytes elsewhere
    except (OSError, ValueError, ImportError, AttributeError):
        return None


def reset_high_water() -> bool:
    """Let the high-water mark start again at the present level (Linux); whether that worked."""
    if sys.platform != "linux":
        return False
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _windows_counters() -> tuple[int, int]:
    """(peak, current) working set in bytes."""
    from ctypes import wintypes

    class Counters(
        ctypes.Structure
    ):  # PROCESS_MEMORY_COUNTERS; the first two sizes are PeakWorkingSetSize and WorkingSetSize
        _fields_ = (("cb", wintypes.DWORD), ("PageFaultCount", wintypes.DWORD), ("sizes", ctypes.c_size_t * 8))

    counters = Counters()
    counters.cb = ctypes.sizeof(counters)
    kernel32: Any = getattr(ctypes, "windll").kernel32  # noqa: B009  (absent on other systems)
    kernel32.GetCurrentProcess.restype = wintypes.HANDLE
    ask = kernel32.K32GetProcessMemoryInfo
    ask.argtypes = [wintypes.HANDLE, ctypes.c_void_p, wintypes.DWORD]
    if not ask(kernel32.GetCurrentProcess(), ctypes.byref(counters), counters.cb):
        raise OSError("GetProcessMemoryInfo failed")
    return counters.sizes[0], counters.sizes[1]


def give_back() -> None:
    """Return freed memory to the system, so that a measured call cannot use what is left over (GNU C library)."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def peak_of(call: Callable[[], object]) -> int | None:
    """Bytes by which the process grows at most while `call` runs, its result included; None if not measurable."""
    give_back()
    fresh = reset_high_water()
    before, mark = resident(), high_water()
    start = before if before is not None else mark
    if start is None:
        return None
    most = [start]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.001):
            most.append(max(most.pop(), resident() or 0))

    watcher = threading.Thread(target=watch, name="lightm-peak", daemon=True)
    if before is not None and not fresh:
        watcher.start()
    try:
        result = call()
    finally:
        stop.set()
        if watcher.ident is not None:
            watcher.join()
    after = high_water()
    peak = max(most[0], resident() or 0)
    if after is not None and mark is not None and (fresh or after > mark):
        peak = max(peak, after)
    del result
    return peak - start
