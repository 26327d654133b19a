"""End to end: everything continuous in a spiking model is trained together, with the spikes in the
loop, while its integers stay as they are.

EfficientQAT (Chen et al., 2024) trains the scales of integer weights on the loss of the whole model
(E2E-QP). Here the shares of ranges that set the thresholds of spikes are trained with them, through
the coding of every input and of Q, K and V, and towards what the original says instead of the text.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from spikellm.core.errors import RequestError
from spikellm.nn.formats import formats
from spikellm.recipe.base import register_options
from spikellm.recipe.training import StageOptions
from spikellm.training.base import Stage, Trainable, stages
from spikellm.training.loss import distillation_loss
from spikellm.training.parameters import (
    biases_of,
    forget_added,
    gains_of,
    scales_of,
    shares_of,
)


@register_options
class EndToEndOptions(StageOptions):
    """Scales and thresholds of all layers together; integers stay as they are."""

    name: Literal["end-to-end"] = "end-to-end"
    shares: bool = Field(
        True, description="train the part of each range that is coded, so θ", strict=True
    )
    gains: bool = Field(True, description="train gains (and biases) of norms", strict=True)
    biases: bool = Field(
        False, description="train biases of linear layers, and add those they lack", strict=True
    )
    own_loss: float = Field(
        0.0,
        ge=0,
        le=1,
        description=(
            "share of the loss of the text itself; the rest is the divergence from the original"
        ),
    )

    def check(self, recipe: Any) -> None:
        own = [one.activations.get("threshold_from") for one in recipe.overrides]
        if self.shares and "calibration" in (recipe.activations.threshold_from, *own):
            raise ValueError(
                "training.shares trains parts of the ranges of tokens, and threshold_from:"
                " calibration does without such ranges; set training.shares to false"
            )
        scaled = any(formats[name].has_integers for name in recipe.formats)
        coded = self.shares and (recipe.activations.spiking or recipe.attention.spiking)
        if not (scaled or coded or self.biases):
            raise ValueError(
                f"training has nothing to train: weights of format"
                f" {' and '.join(map(repr, sorted(recipe.formats)))} keep their scales, and inputs"
                " are not coded; set training.biases to true"
            )


@stages.register("end-to-end")
class EndToEnd(Stage):
    """AdamW on scales, shares of ranges, and, where asked for, gains and biases."""

    def parameters(self, model: Any, options: EndToEndOptions) -> list[Trainable]:
        found = scales_of(model)
        if options.shares:
            found += shares_of(model)
        if options.biases:
            found += biases_of(model)
        if not found:
            raise RequestError(
                "the model has no scale, threshold or bias that could be trained: none of its"
                " layers is spiking, or their weights keep their scales; set biases to true"
            )
        return found + (gains_of(model) if options.gains else [])

    def loss(
        self, logits: Tensor, wanted: Tensor | None, targets: Tensor, options: EndToEndOptions
    ) -> Tensor:
        return distillation_loss(logits, wanted, targets, options.own_loss)

    def undo(self, model: Any) -> None:
        forget_added(model)
