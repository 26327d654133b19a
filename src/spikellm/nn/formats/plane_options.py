"""Options that formats of planes have in common: their scales."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from spikellm.quantization.powers import MOST_TERMS
from spikellm.recipe.base import WeightOptions


class PlaneOptions(WeightOptions):
    """One bit a plane, no zero-point; each plane has scales of its own."""

    group_size: int | None = Field(
        128,
        ge=1,
        le=1 << 24,
        description="columns that share scales; null for the whole row",
        strict=True,
    )
    scale_bits: Literal[32, 16] = Field(16, description="bits of a scale; bfloat16 at 16")
    scale_terms: int | None = Field(
        None,
        ge=1,
        le=MOST_TERMS,
        description=(
            "scales are sums of so many signed powers of two, so that they are shifts and"
            " additions; null for any"
        ),
        strict=True,
    )

    @property
    def bits(self) -> int:
        """Bits of one plane."""
        return 1

    @property
    def symmetric(self) -> bool:
        """There is no zero-point."""
        return True

    @property
    def most_planes(self) -> int:
        """Planes that a column can have."""
        return 2

    def top(self, steps: int) -> int:
        """Largest code of a plane."""
        return 1

    @model_validator(mode="after")
    def _terms_fit_scales(self) -> PlaneOptions:
        if self.scale_terms is not None and self.scale_bits == 32:
            raise ValueError(
                "scales that are sums of powers of two take 16 bits; leave scale_bits out"
            )
        return self
