"""Recipes: everything that decides the result of a conversion, in one frozen, versioned object that
is saved with the model.

Unknown keys are refused with the valid ones. Recipes are read by :mod:`spikellm.recipe.load`.
"""

from spikellm.recipe.algorithms import GptqRecipe, OmniQuantRecipe
from spikellm.recipe.rotation import RotationRecipe
from spikellm.recipe.sections import (
    ActivationRecipe,
    AttentionRecipe,
    LinearRecipe,
    Override,
    WeightRecipe,
)
from spikellm.recipe.whole import RECIPE_VERSION, Recipe, place_value, recipe_from

__all__ = [
    "RECIPE_VERSION",
    "ActivationRecipe",
    "AttentionRecipe",
    "GptqRecipe",
    "LinearRecipe",
    "OmniQuantRecipe",
    "Override",
    "Recipe",
    "RotationRecipe",
    "WeightRecipe",
    "place_value",
    "recipe_from",
]
