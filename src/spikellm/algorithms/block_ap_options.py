"""Options of Block-AP."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from spikellm.algorithms.gptq_options import GptqOptions
from spikellm.algorithms.rtn import RoundToNearest
from spikellm.nn.formats import formats
from spikellm.recipe.base import AlgorithmOptions, register_options
from spikellm.recipe.parts import AlgorithmField

_STARTS = ("rtn", "gptq")


@register_options
class BlockApOptions(AlgorithmOptions):
    """Where Block-AP starts, what it learns, and how."""

    name: Literal["block-ap"] = "block-ap"
    start: AlgorithmField = Field(
        default_factory=lambda: GptqOptions(compensate=True),
        description="what fits the block first: rtn or gptq, with its options",
    )
    epochs: int = Field(
        4,
        ge=0,
        le=100_000,
        description="passes over the calibration text; 0 keeps the start",
        strict=True,
    )
    batch_size: int = Field(
        2, ge=1, le=1_000_000, description="windows that are run at a time", strict=True
    )
    accumulate: int = Field(
        1,
        ge=1,
        le=1_000_000,
        description="batches whose gradients are added up before a step",
        strict=True,
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description=(
            "type of matrix products of linear layers while learning; codes, attention, norms and"
            " losses stay in float32"
        ),
    )
    learn: Literal["codes", "values"] = Field(
        "codes",
        description=(
            "what is learned of weights: their places on the grid of codes, apart from scales, or"
            " their values, which scales divide (as published); rates are in steps of codes and"
            " shares of scales, or in what weights are in"
        ),
    )
    weight_rate: float = Field(0.03, ge=0.0, description="learning rate of weights")
    scale_rate: float = Field(
        3e-3, ge=0.0, description="learning rate of scales, zero-points and norms"
    )
    last_rate: float = Field(
        0.05, ge=0.0, le=1.0, description="what the rates fall to, as a share, along a cosine"
    )
    norms: bool = Field(
        False, description="learn the gains and offsets of norms too, which stay dense", strict=True
    )

    @field_validator("start")
    @classmethod
    def _leaves_the_rest_alone(cls, value: AlgorithmOptions) -> AlgorithmOptions:
        if value.name not in _STARTS:
            raise ValueError(
                f"{value.name!r} is no start for block-ap; set start to {' or '.join(_STARTS)}"
            )
        return value

    @model_validator(mode="after")
    def _has_an_effect(self) -> BlockApOptions:
        if self.weight_rate == 0 and self.scale_rate == 0:
            raise ValueError(
                "weight_rate and scale_rate are both 0, so nothing is learned; use algorithm"
                f" {self.start.name}"
            )
        changed = [
            name
            for name, field in type(self).model_fields.items()
            if name not in ("name", "start", "epochs") and getattr(self, name) != field.default
        ]
        if self.epochs == 0 and changed:
            raise ValueError(f"{', '.join(changed)} would have no effect: epochs is 0")
        return self

    def check(self, recipe: Any) -> None:
        self.start.check(recipe)
        if self.epochs and isinstance(self.start, GptqOptions) and self.start.zero_share:
            raise ValueError(
                "algorithm.start: Block-AP learns codes, so that weights would not stay zero; leave"
                " sparsity out, or set algorithm to gptq"
            )
        kinds = {formats[name].coding for name in recipe.formats}
        if self.start.name == "rtn" and (others := kinds - set(RoundToNearest.formats)):
            raise ValueError(
                "algorithm.start 'rtn' fits weight codes of kind"
                f" {' or '.join(RoundToNearest.formats)}, and the recipe has"
                f" {' and '.join(sorted(others))}; set algorithm.start to gptq"
            )
