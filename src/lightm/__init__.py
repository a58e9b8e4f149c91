"""LightM: medical image segmentation with Mamba U-Nets of about a million parameters.

Public names are loaded on first use, so that `import lightm` stays light.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "InputError": "lightm.errors",
    "LightMError": "lightm.errors",
    "Volume": "lightm.data.volume",
    "check_dataset": "lightm.data.dataset",
    "create_loss": "lightm.losses",
    "create_network": "lightm.nets",
    "evaluate_folder": "lightm.evaluate",
    "make_phantoms": "lightm.data.phantoms",
    "make_plan": "lightm.data.plan",
    "open_dataset": "lightm.data.dataset",
    "predict_folder": "lightm.infer",
    "read_volume": "lightm.data.io",
    "selective_scan": "lightm.ops",
    "train": "lightm.train",
    "write_report": "lightm.evaluate",
    "write_volume": "lightm.data.io",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'lightm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
