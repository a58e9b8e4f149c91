"""LightM: medical image segmentation with Mamba U-Nets of about a million parameters.

Public names are loaded on first use, so that `import lightm` stays light; it changes nothing in its process.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {  # name: module
    # verbs; each is a command too
    "bench": "lightm.api",
    "check": "lightm.api",
    "compare": "lightm.api",
    "convert": "lightm.api",
    "evaluate": "lightm.api",
    "export": "lightm.api",
    "import_released": "lightm.api",
    "info": "lightm.api",
    "load": "lightm.api",
    "phantoms": "lightm.api",
    "plan": "lightm.api",
    "predict": "lightm.api",
    "report": "lightm.api",
    "resume": "lightm.pipeline",
    "train": "lightm.pipeline",
    # what they take and give
    "EvaluateOptions": "lightm.evaluation.folder",
    "InputError": "lightm.errors",
    "LightMError": "lightm.errors",
    "Plan": "lightm.preparation.plan",
    "PredictOptions": "lightm.inference.record",
    "Predictor": "lightm.inference.predictor",
    "Split": "lightm.datasets.split",
    "TrainConfig": "lightm.training.config",
    "Volume": "lightm.images.volume",
    # parts for a program of one's own
    "loss": "lightm.losses",
    "network": "lightm.nets",
    "parameter_groups": "lightm.nets",
    "register_format": "lightm.images.io",
    "register_loss": "lightm.losses",
    "register_network": "lightm.nets",
    "open_dataset": "lightm.datasets.discovery",
    "read_volume": "lightm.images.io",
    "selective_scan": "lightm.ops",
    "write_volume": "lightm.images.io",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'lightm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
