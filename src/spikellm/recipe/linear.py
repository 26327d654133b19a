"""The settings of one linear layer."""

from __future__ import annotations

from functools import partial

from pydantic import Field, model_validator

from spikellm.recipe.base import Section
from spikellm.recipe.parts import WeightField, default_part
from spikellm.recipe.sections import ActivationRecipe


class LinearRecipe(Section):
    """What one linear layer becomes."""

    weights: WeightField = Field(default_factory=partial(default_part, "weights"))
    activations: ActivationRecipe = ActivationRecipe()

    @model_validator(mode="after")
    def _weights_can_meet_spikes(self) -> LinearRecipe:
        if self.activations.spiking and not self.weights.meets_spikes:
            raise ValueError(
                f"weights of format {self.weights.format} take inputs as they are (they are no"
                " integers of one scale that spikes could add up); set activations.bits to"
                f" 16, not {self.activations.bits}"
            )
        return self
