"""The section of a recipe that says how the tables of the vocabulary are stored."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from spikellm.recipe.base import Section

VocabularyLayer = Literal["embedding", "head"]


class VocabularyRecipe(Section):
    """How input embedding and output projection are stored: integer codes that are symmetric about
    zero, inputs of the projection as they are.

    A table that both share is stored once, so it is coded for both or for none.
    """

    bits: int = Field(8, ge=4, le=8, description="bits of a code", strict=True)
    group_size: int | None = Field(
        None,
        ge=8,
        le=1 << 24,
        description="channels of a row that share a scale; null for the whole row",
        strict=True,
    )
    layers: tuple[VocabularyLayer, ...] = Field(
        ("embedding", "head"), min_length=1, description="which of embedding and head are coded"
    )

    @field_validator("layers")
    @classmethod
    def _each_once(cls, value: tuple[VocabularyLayer, ...]) -> tuple[VocabularyLayer, ...]:
        if len(set(value)) < len(value):
            raise ValueError("names a layer twice; give each once")
        return value
