"""Options of ternary weights: spikes of −1, 0 and 1, whose products are additions."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from spikellm.nn.formats.salient_columns import SalientColumnOptions
from spikellm.recipe.base import GrownSection, register_options


@register_options
class TernaryOptions(SalientColumnOptions, GrownSection):
    """No zero-point; columns take several steps by saliency or from a budget."""

    added: ClassVar[tuple[str, ...]] = ("scale_bits", "packing")
    format: Literal["ternary"] = "ternary"
    group_size: int | None = Field(
        None,
        ge=1,
        le=1 << 24,
        description="columns that share a scale; null for the whole row",
        strict=True,
    )
    scale_bits: Literal[32, 16] = Field(32, description="bits of a scale; bfloat16 at 16")
    packing: Literal["planes", "digits"] = Field(
        "planes",
        description=(
            "how codes are stored: planes of spikes, 2 bits a weight and step, or digits, 1.6 bits"
            " for one step, 2.33 for two, 2.82 for three; the layer is the same"
        ),
    )
    budget: float | None = Field(
        None,
        ge=1.0,
        le=8.0,
        description="average steps of a column, spent where a step gains most",
    )
    allocation: Literal["layer", "model"] = Field(
        "layer",
        description=(
            "each layer spends its own budget, or all spend one by what they cost the loss (takes a"
            " backward pass)"
        ),
    )

    @property
    def bits(self) -> int:
        """Bits of one step, as a plane of +1 and one of −1."""
        return 2

    @property
    def symmetric(self) -> bool:
        """There is no zero-point."""
        return True

    def top(self, steps: int) -> int:
        """Largest code of a weight of T steps: T."""
        return steps

    @model_validator(mode="after")
    def _budget_has_an_effect(self) -> TernaryOptions:
        if self.budget is not None and self.salient_rate > 0:
            raise ValueError(
                "budget and salient_rate both say which columns take more steps; leave one of them"
                " out"
            )
        if self.allocation == "model" and self.budget in (None, 1):
            raise ValueError(
                "allocation has no effect without a budget above 1; set budget, or leave"
                " allocation out"
            )
        return self
