"""Training: recipes, splits, the Lightning modules, and `train_model`, which joins them."""

from lightm.datasets.split import Split, load_split, make_split
from lightm.training.config import RECIPES, Recipe, get_recipe
from lightm.training.run import TrainResult, resume_training, train_model

__all__ = [
    "RECIPES",
    "Recipe",
    "Split",
    "TrainResult",
    "get_recipe",
    "load_split",
    "make_split",
    "resume_training",
    "train_model",
]
