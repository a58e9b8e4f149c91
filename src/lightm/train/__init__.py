"""Training: recipes, splits, the Lightning modules, and `train_model`, which joins them."""

from lightm.train.recipes import RECIPES, Recipe, get_recipe
from lightm.train.run import TrainResult, resume_training, train_model
from lightm.train.split import Split, load_split, make_split

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
