"""Training by committed recipes: classifiers, with ACE or an adversary, and learned defenses."""

from __future__ import annotations

from feint.training.defense import fit_defense
from feint.training.fit import EpochReport, accuracy, fit
from feint.training.recipe import DefenseRecipe, TrainingRecipe, list_recipes, load_recipe
from feint.training.run import train

__all__ = [
    "DefenseRecipe",
    "EpochReport",
    "TrainingRecipe",
    "accuracy",
    "fit",
    "fit_defense",
    "list_recipes",
    "load_recipe",
    "train",
]
