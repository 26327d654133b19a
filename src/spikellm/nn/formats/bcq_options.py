"""Options of binary-coded weights: planes of −1 and +1, each with a scale."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from spikellm.nn.formats.plane_options import PlaneOptions
from spikellm.quantization.bcq import MOST_PLANES
from spikellm.recipe.base import register_options


@register_options
class BcqOptions(PlaneOptions):
    """Planes of −1 and 1 (ShiftAddLLM): as many for all columns, or a budget of them that is spent
    by what they cost the loss.
    """

    format: Literal["bcq"] = "bcq"
    planes: int | None = Field(
        None,
        ge=1,
        le=MOST_PLANES,
        description="planes of every column, 2 if budget is left out too",
        strict=True,
    )
    budget: float | None = Field(
        None,
        gt=1.0,
        le=MOST_PLANES,
        description="average planes of a column, spent where a plane gains most",
    )
    allocation: Literal["layer", "model"] = Field(
        "layer",
        description=(
            "each layer spends its own budget, or all spend one by what they cost the loss (takes a"
            " backward pass)"
        ),
    )

    @property
    def most_planes(self) -> int:
        """Planes that a column can have."""
        return MOST_PLANES if self.budget is not None else self.planes or 2

    @model_validator(mode="after")
    def _has_an_effect(self) -> BcqOptions:
        if self.budget is not None and self.planes is not None:
            raise ValueError(
                "budget and planes both say how many planes columns take; leave one of them out"
            )
        if self.allocation == "model" and self.budget is None:
            raise ValueError(
                "allocation has no effect without a budget; set budget, or leave allocation out"
            )
        return self
