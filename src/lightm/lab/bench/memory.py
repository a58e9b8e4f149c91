"""Peak memory of one call, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from lightm.errors import LightMError


class OutOfMemoryError(LightMError):
    """The system ended the process that was to be measured."""


def peak_in_child(request: dict[str, Any], timeout: float = 3600.0) -> int | None:
    """Peak bytes of the case that `request` describes (see `lightm.lab.bench.child`), measured in a fresh process.

    Raises OutOfMemoryError when the system ended the process, LightMError with its last words when it failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "lightm.lab.bench.child"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode < 0 or done.returncode == 137:
        raise OutOfMemoryError(
            f"{request['case']['name']}: the process was ended by the system (exit code {done.returncode}), probably "
            "out of memory"
        )
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise LightMError(f"{request['case']['name']}: {words[-1]}")
    return json.loads(done.stdout.splitlines()[-1])["peak"]
