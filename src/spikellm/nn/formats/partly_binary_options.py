"""Options of partly binary weights (PB-LLM): one bit, and more for salient weights."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from spikellm.recipe.base import WeightOptions, register_options


@register_options
class PartlyBinaryOptions(WeightOptions):
    """Signs with a scale; a share of the weights keeps ``bits`` bits and a scale of its own."""

    meets_spikes: ClassVar[bool] = False
    format: Literal["partly-binary"] = "partly-binary"
    bits: int = Field(4, ge=2, le=8, description="bits of a salient weight", strict=True)
    salient_rate: float = Field(
        gt=0.0, lt=1.0, description="share of the weights that keep `bits` bits"
    )
    group_size: int | None = Field(
        None,
        ge=1,
        le=1 << 24,
        description="columns that share a scale of their signs; null for the whole row",
        strict=True,
    )
