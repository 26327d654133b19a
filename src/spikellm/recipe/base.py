"""What the sections of a recipe are made of: frozen models of plain data, and options of parts that
are chosen by name."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, field_validator


class Section(BaseModel):
    """Frozen; unknown keys and numbers that are not finite are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _can_be_written(cls, value: Any) -> Any:
        if isinstance(value, str) and any("\ud800" <= one <= "\udfff" for one in value):
            raise ValueError("holds half a character, which no file can hold; take it out")
        return value


class PartOptions(Section):
    """Options of one part that a recipe chooses by name; each part defines its own subclass.

    Attributes:
        tag: the field that holds the name: ``name`` of algorithms and transforms, ``format`` of
            weights. Subclasses declare it as a ``Literal`` with a default.
    """

    tag: ClassVar[str] = "name"


class AlgorithmOptions(PartOptions):
    """Options of an algorithm: ``algorithm: {name: gptq, …}``."""


class TransformOptions(PartOptions):
    """Options of a transform: an entry of ``transforms: [{name: residual-rotation}, …]``."""


class WeightOptions(PartOptions):
    """Options of a weight format: ``weights: {format: ternary, …}``."""

    tag: ClassVar[str] = "format"
