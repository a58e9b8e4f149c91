"""The record of a run: run.json."""

from __future__ import annotations

import json
import platform
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning_fabric
import torch
from torch import nn

from lightm import __version__
from lightm.files import write_text
from lightm.nets import count_parameters
from lightm.preparation.plan import Plan
from lightm.training.config import TrainConfig


def run_record(
    config: TrainConfig, plan: Plan, net: nn.Module, started: datetime, resumed: Path | None
) -> dict[str, Any]:
    """What a reader needs to repeat the run: command, versions, machine, seed, data hash."""
    first = started.isoformat(timespec="seconds")
    if resumed is not None and (resumed / "run.json").is_file():
        first = json.loads((resumed / "run.json").read_text(encoding="utf-8")).get("started", first)
    called = Path(sys.argv[0]).stem
    packages = ("torch", "monai", "numba", "numpy", "nibabel")
    return {
        "command": " ".join(["lightm", *sys.argv[1:]]) if called == "lightm" else "lightm.train()",
        "versions": {
            "lightm-unet": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
            "lightning-fabric": lightning_fabric.__version__,
        },
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "seed": config.seed,
        "data_hash": plan.fingerprint.data_hash,
        "backend": f"selective scan: {'numba' if config.device == 'cpu' else 'reference'} on {config.device}",
        "started": first,
        "finished": None,
        "train_seconds": None,
        "parameters": count_parameters(net),
        "network": config.network,
        "status": "running",
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON in one step."""
    write_text(path, json.dumps(content, indent=1) + "\n")
