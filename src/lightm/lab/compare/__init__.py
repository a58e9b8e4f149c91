"""Comparison of methods: a grid of trainings on one split, their statistics, tables and one page."""

from lightm.lab.compare.experiment import Experiment, load_experiment
from lightm.lab.compare.results import Comparison, read_comparison
from lightm.lab.compare.run import CompareResult, compare_experiment, write_results

__all__ = [
    "CompareResult",
    "Comparison",
    "Experiment",
    "compare_experiment",
    "load_experiment",
    "read_comparison",
    "write_results",
]
