"""Training of classifiers, with ACE in front or against an adversary, by committed recipes."""

from __future__ import annotations

from feint.training.fit import EpochReport, accuracy, fit
from feint.training.recipe import TrainingRecipe, list_recipes, load_recipe
from feint.training.run import train

__all__ = [
    "EpochReport",
    "TrainingRecipe",
    "accuracy",
    "fit",
    "list_recipes",
    "load_recipe",
    "train",
]
