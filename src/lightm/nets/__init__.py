"""Networks: blocks, networks by name, and the folder that a trained model is kept in."""

from lightm.nets.execution import set_activation_checkpointing
from lightm.nets.folder import load_model, pack_model, save_model
from lightm.nets.presets import (
    DEFAULT,
    NETWORKS,
    PRESETS,
    count_parameters,
    create,
    fitting_size,
    names,
    network,
    parameter_groups,
    register_network,
)

__all__ = [
    "DEFAULT",
    "NETWORKS",
    "PRESETS",
    "count_parameters",
    "create",
    "fitting_size",
    "load_model",
    "names",
    "network",
    "pack_model",
    "parameter_groups",
    "register_network",
    "save_model",
    "set_activation_checkpointing",
]
