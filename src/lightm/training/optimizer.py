"""The optimizer of a recipe and the learning rate of its next step."""

from __future__ import annotations

import math

import torch
from torch import nn

from lightm.nets import parameter_groups
from lightm.training.recipes import Recipe


def create_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimizer; weight decay acts on matrices alone, see `lightm.nets.parameter_groups`."""
    groups = parameter_groups(network, recipe.weight_decay)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=recipe.lr, eps=recipe.eps)


def learning_rate(recipe: Recipe, step: int, progress: float) -> float:
    """The rate of optimizer step `step`, counted from 0: warm-up, then the schedule's fall to 0 at progress 1."""
    left = 1.0 - progress
    factor = {
        "poly": left**0.9,
        "cosine": 0.5 * (1 + math.cos(math.pi * (1 - left))),
        "constant": 1.0,
    }[recipe.schedule]
    warm = min(1.0, (step + 1) / recipe.warmup_steps) if recipe.warmup_steps else 1.0
    return recipe.lr * factor * warm
