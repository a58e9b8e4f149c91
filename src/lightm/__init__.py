"""LightM: medical image segmentation with Mamba U-Nets of about a million parameters.

Public names are loaded on first use, so that `import lightm` stays light.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

# Read once, when torch is loaded, and only if not set already. PyTorch's OpenMP threads otherwise spin while they
# wait, in the way of the kernels' own threads and of autograd's; and large tensors are otherwise made of small pages,
# each of which costs a fault when it is first written. Both are explained in src/lightm/ops/README.md.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"

_PUBLIC = {
    "InputError": "lightm.errors",
    "LightMError": "lightm.errors",
    "Volume": "lightm.images.volume",
    "check_dataset": "lightm.datasets.dataset",
    "compare_experiment": "lightm.lab.compare",
    "convert_dataset": "lightm.datasets.convert",
    "create_loss": "lightm.losses",
    "network": "lightm.nets",
    "parameter_groups": "lightm.nets",
    "register_network": "lightm.nets",
    "evaluate_folder": "lightm.evaluation",
    "import_released": "lightm.export.released",
    "make_phantoms": "lightm.datasets.phantoms",
    "make_plan": "lightm.preparation.plan",
    "open_dataset": "lightm.datasets.dataset",
    "predict_folder": "lightm.inference",
    "read_volume": "lightm.images.io",
    "selective_scan": "lightm.ops",
    "train_model": "lightm.training",
    "write_report": "lightm.evaluation",
    "write_volume": "lightm.images.io",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'lightm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
