"""What a network costs: parameters by source beside closed forms, operations with the scan, memory; comparisons."""

from lightm.lab.complexity.account import Account, Latency, account, measure_latency
from lightm.lab.complexity.meta import activation_memory, build_network, known_names
from lightm.lab.complexity.operations import count_operations
from lightm.lab.complexity.parameters import ParameterTable, count_parts
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
