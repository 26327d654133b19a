"""Options of BiLLM's weights: signs, and two groups of magnitudes or a second plane."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from spikellm.nn.formats.plane_options import PlaneOptions
from spikellm.recipe.base import register_options


@register_options
class BillmOptions(PlaneOptions):
    """BiLLM without means: two planes in salient columns, else two groups of magnitudes."""

    format: Literal["billm"] = "billm"
    most_salient: float = Field(
        0.1,
        ge=0.0,
        le=1.0,
        description="share of the columns of a group that may be salient; the search says how many",
    )
    search: Literal["weights", "scores"] = Field(
        "weights",
        description=(
            "what the search for salient columns and groups of magnitudes binarizes; the published"
            " code takes the scores that rank columns in their place"
        ),
    )
