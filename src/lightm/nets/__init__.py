"""Networks: blocks, presets by name, and the folder that a trained model is kept in."""

from lightm.nets.folder import load_model, pack_model, save_model
from lightm.nets.presets import DEFAULT, PRESETS, count_parameters, create, names
from lightm.nets.recompute import set_recompute

create_network = create

__all__ = [
    "DEFAULT",
    "PRESETS",
    "count_parameters",
    "create",
    "create_network",
    "load_model",
    "names",
    "pack_model",
    "save_model",
    "set_recompute",
]
