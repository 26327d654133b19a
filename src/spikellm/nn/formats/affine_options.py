"""Options of affine weights: integers with a zero-point."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from spikellm.nn.formats.salient_columns import SalientColumnOptions
from spikellm.recipe.base import GrownSection, register_options


@register_options
class AffineOptions(SalientColumnOptions, GrownSection):
    """Integers with a zero-point; salient columns take several steps (SpikeLLM)."""

    added: ClassVar[tuple[str, ...]] = ("scale_bits",)
    format: Literal["affine"] = "affine"
    bits: int = Field(4, ge=2, le=8, description="bits of a weight code", strict=True)
    symmetric: bool = Field(
        False,
        description="zero-point fixed in the middle instead of placed by the range",
        strict=True,
    )
    group_size: int | None = Field(
        None,
        ge=1,
        le=1 << 24,
        description="columns that share a scale; null for the whole row",
        strict=True,
    )
    scale_bits: Literal[32, 16] = Field(
        32,
        description="bits of a scale; at 16 (bfloat16) zero-points are packed as well",
    )
