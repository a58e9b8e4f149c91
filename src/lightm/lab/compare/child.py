"""The process of one cell, or of one network's measurement: a request as one line of JSON on standard input.

The parent keeps standard input open while it lives. When it closes, by the parent's will or by its death, this
process asks itself to end, and a training then writes its checkpoint first.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import sys
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lightm.errors import LightMError


def main() -> None:
    """Serve the request; exit code 0, that of the LightMError which ended it, or 1."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_watch_parent, daemon=True).start()
    import torch

    torch.set_num_threads(int(request["threads"]))
    try:
        {"train": train_cell, "measure": measure_network}[request["work"]](request)
    except LightMError as error:
        print(f"lightm: error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def _watch_parent() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def train_cell(request: dict[str, Any]) -> None:
    """Train (or go on with) a cell's run, score its test cases, and write its `cell.json`."""
    import torch

    from lightm import __version__
    from lightm.files import write_text
    from lightm.lab.compare.results import CELL, CellRecord
    from lightm.pipeline import choose_postprocess, score_run
    from lightm.training import resume_training, train_model

    started, clock = datetime.now(timezone.utc), time.perf_counter()
    path = Path(request["path"])
    if (path / "config.yaml").is_file():
        trained = resume_training(path)
    else:
        if path.exists():  # of a start that was ended before it could be resumed
            shutil.rmtree(path)
        trained = train_model(request["dataset"], path, **request["options"])
    choose_postprocess(trained)
    score_run(path, nsd_tolerance_mm=request["nsd_tolerance_mm"])
    state = json.loads((path / "model" / "model.json").read_text(encoding="utf-8"))["training"]
    record = CellRecord(
        **request["cell"],
        data_hash=trained.plan.fingerprint.data_hash,
        status="finished",
        started=started.isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - clock, 1),
        threads=torch.get_num_threads(),
        train_seconds=round(trained.train_seconds, 1),
        epochs=trained.epochs,
        steps=state["steps"],
        stopped_because=trained.reason,
        versions={"lightm": __version__, "torch": torch.__version__, "python": platform.python_version()},
    )
    write_text(path / CELL, record.model_dump_json(indent=1) + "\n")


def measure_network(request: dict[str, Any]) -> None:
    """Print what one network costs on one patch as JSON: latency (median of 5 runs) and peak memory of one."""
    import torch

    from lightm.lab.bench.measure import percentile, seconds
    from lightm.memory import peak_of
    from lightm.nets import create

    torch.manual_seed(0)
    network = create(**request["network"], **request["options"]).eval()
    x = torch.randn(1, request["network"]["in_channels"], *request["network"]["image_size"])

    def call() -> object:
        with torch.inference_mode():
            return network(x)

    call()  # compiles kernels
    peak = peak_of(call)
    times = [seconds(call) for _ in range(5)]
    print(json.dumps({"latency_s": percentile(times, 50), "peak_memory_bytes": peak}))


if __name__ == "__main__":
    main()
