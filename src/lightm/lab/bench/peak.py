"""Peak memory of one call, in a process of its own: a request as JSON in, {"peak": bytes} out."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from lightm.errors import LightMError


class OutOfMemoryError(LightMError):
    """The system ended the process that was to be measured."""


def peak_in_child(request: dict[str, Any], timeout: float = 3600.0) -> int | None:
    """Peak bytes of the case that `request` describes, measured in a fresh process.

    Raises OutOfMemoryError when the system ended the process, LightMError with its last words when it failed.
    """
    done = subprocess.run(
        [sys.executable, "-c", "from lightm.lab.bench.peak import main; main()"],
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


# The process itself ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Build the case, warm its kernels up on a small one, and measure one call."""
    request = json.load(sys.stdin)
    import torch

    from lightm.lab.bench.cases import Case, prepare, warm_up
    from lightm.memory import peak_of

    torch.set_num_threads(int(request["threads"]))
    case = Case(**request["case"])
    warm_up(case)
    prepared = prepare(case)
    print(json.dumps({"peak": peak_of(prepared.call)}))
