"""What a network costs: parameters by source beside closed forms, operations with the scan, memory; comparisons."""

from lightm.nets.accounting.account import Account, Latency, account, measure_latency
from lightm.nets.accounting.memory import activation_memory
from lightm.nets.accounting.operations import count_operations
from lightm.nets.accounting.parameters import ParameterTable, count_parts
from lightm.nets.accounting.shapes import build_network, known_names
from lightm.nets.accounting.table import Dice, Row, compare
from lightm.nets.accounting.text import describe

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
