"""What a network costs: parameters by source beside closed forms, operations with the scan, memory; comparisons."""

from lightm.lab.complexity.account import Account, Latency, ParameterTable, account, count_parts, measure_latency
from lightm.lab.complexity.operations import activation_memory, build_network, count_operations, known_names
from lightm.lab.complexity.report import Dice, Row, compare, describe

__all__ = [
    "Account",
    "Dice",
    "Latency",
    "ParameterTable",
    "Row",
    "account",
    "activation_memory",
    "build_network",
    "compare",
    "count_operations",
    "count_parts",
    "describe",
    "known_names",
    "measure_latency",
]
