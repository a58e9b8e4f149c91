"""Training: recipes, the loop, checkpoints, and `train_model`, which joins them."""

from lightm.training.config import RECIPES, Recipe, get_recipe
from lightm.training.run import TrainResult, resume_training, train_model

__all__ = ["RECIPES", "Recipe", "TrainResult", "get_recipe", "resume_training", "train_model"]
