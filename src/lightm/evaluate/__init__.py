"""Metrics, their summary over a folder of cases, and the report of a run; names are loaded on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightm.evaluate.evaluation import Evaluation as Evaluation
    from lightm.evaluate.evaluation import format_table as format_table
    from lightm.evaluate.evaluation import load_evaluation as load_evaluation
    from lightm.evaluate.folder import evaluate_folder as evaluate_folder
    from lightm.evaluate.metrics import ClassMetrics as ClassMetrics
    from lightm.evaluate.metrics import case_metrics as case_metrics
    from lightm.evaluate.report import write_report as write_report

_PUBLIC = {
    "ClassMetrics": "lightm.evaluate.metrics",
    "Evaluation": "lightm.evaluate.evaluation",
    "case_metrics": "lightm.evaluate.metrics",
    "evaluate_folder": "lightm.evaluate.folder",
    "format_table": "lightm.evaluate.evaluation",
    "load_evaluation": "lightm.evaluate.evaluation",
    "write_report": "lightm.evaluate.report",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'lightm.evaluate' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
