"""Options of GPTQ."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from spikellm.nn.formats import formats
from spikellm.recipe.base import AlgorithmOptions, GrownSection, register_options

_limited: dict[str, list[str]] = {}  # kinds of codes on which an option has an effect, if not all

_FORMER_DAMPING = 0.03  # the default when older models were saved, which name every field


def limit_option(option: str, coding: str) -> None:
    """Let an option have an effect on one kind of codes, and on others that say so too."""
    _limited.setdefault(option, []).append(coding)


@register_options
class GptqOptions(AlgorithmOptions, GrownSection):
    """How GPTQ fits weights."""

    added: ClassVar[tuple[str, ...]] = ("descents",)
    name: Literal["gptq"] = "gptq"
    percdamp: float = Field(
        0.01,
        gt=0.0,
        le=10.0,
        description=(
            "added to the Hessian's diagonal, as a share of its mean; raised where that is not"
            " enough"
        ),
    )
    activation_order: bool = Field(
        True, description="code the columns of the largest inputs first", strict=True
    )
    search_range: bool = Field(
        False,
        description=(
            "affine codes: take the range of each row and group that loses least, instead of all of"
            " it (plain GPTQ)"
        ),
        strict=True,
    )
    compensate: bool = Field(
        False,
        description=(
            "fit the layers of a block in turn, on inputs as they will be coded, towards what the"
            " full-precision stream gives"
        ),
        strict=True,
    )
    compensation_percdamp: float = Field(
        0.3,
        gt=0.0,
        le=10.0,
        description=(
            "compensate: how little is made of what the calibration text shows, as a share of the"
            " Hessian's mean diagonal"
        ),
    )
    rounds: int = Field(
        6,
        ge=1,
        le=1_000_000,
        description=(
            "fits of ternary codes and scales in turn, at most; stops when they do not improve"
        ),
        strict=True,
    )
    descents: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description=(
            "sweeps of coordinate descent over affine and ternary codes after error feedback, at"
            " most, with scales fitted in between; stops when no code changes"
        ),
        strict=True,
    )

    @model_validator(mode="after")
    def _has_an_effect(self) -> GptqOptions:
        idle = (type(self).model_fields["compensation_percdamp"].default, _FORMER_DAMPING)
        if not self.compensate and self.compensation_percdamp not in idle:
            raise ValueError(
                "compensation_percdamp has no effect while compensate is false; set compensate to"
                " true, or leave it out"
            )
        return self

    def check(self, recipe: Any) -> None:
        found = {formats[name].coding for name in recipe.formats}
        for option, codings in _limited.items():
            is_set = getattr(self, option) != type(self).model_fields[option].default
            if is_set and not found.intersection(codings):
                raise ValueError(
                    f"algorithm.{option} would have no effect on weights of format"
                    f" {' and '.join(map(repr, sorted(recipe.formats)))}, only on"
                    f" {' or '.join(map(repr, codings))}; leave it out"
                )
