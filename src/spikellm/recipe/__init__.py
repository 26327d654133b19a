"""Recipes: everything that decides the result of a conversion, in one frozen, versioned object that
is saved with the model.

Unknown keys are refused with the valid ones. Recipes are read by :mod:`spikellm.recipe.load`.
"""

from spikellm.recipe.attention import AttentionRecipe
from spikellm.recipe.base import AlgorithmOptions, TransformOptions, WeightOptions, register_options
from spikellm.recipe.linear import LinearRecipe
from spikellm.recipe.overrides import Override
from spikellm.recipe.sections import ActivationRecipe
from spikellm.recipe.values import place_value
from spikellm.recipe.vocabulary import VocabularyRecipe
from spikellm.recipe.whole import RECIPE_VERSION, Recipe, current_data, recipe_from

__all__ = [
    "RECIPE_VERSION",
    "ActivationRecipe",
    "AlgorithmOptions",
    "AttentionRecipe",
    "LinearRecipe",
    "Override",
    "Recipe",
    "TransformOptions",
    "VocabularyRecipe",
    "WeightOptions",
    "current_data",
    "place_value",
    "recipe_from",
    "register_options",
]
