"""Metrics, their summary over a folder of cases, and the report of a run; names are loaded on first use."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "ClassMetrics": "lightm.evaluation.metrics",
    "Evaluation": "lightm.evaluation.evaluation",
    "case_metrics": "lightm.evaluation.metrics",
    "evaluate_folder": "lightm.evaluation.folder",
    "format_table": "lightm.evaluation.evaluation",
    "load_evaluation": "lightm.evaluation.evaluation",
    "write_report": "lightm.evaluation.report",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'lightm.evaluation' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
