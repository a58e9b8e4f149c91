"""Gives memory that is free inside of the process back to the system."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any


@cache
def _trim() -> Any:
    """glibc's malloc_trim, or None where the C library has none."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # another C library
        return None


def release_unused() -> None:
    """Let the C library return its free pages, which it keeps after many tensors of a few MB came and went.

    Without this a backward pass with activation checkpointing, which computes large layers again in segments, holds
    hundreds of MB that nothing uses. Takes a few milliseconds at most; a no-op where the C library has no
    such call.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
