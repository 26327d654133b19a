"""The sections of a recipe that say how a pipeline fits."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from spikellm.recipe.base import Section


class OmniQuantRecipe(Section):
    """What the ``omniquant`` pipeline learns."""

    epochs: int = Field(
        20,
        ge=0,
        le=100_000,
        description="passes over the calibration text; 0 keeps the SmoothQuant start",
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
    let: bool = Field(True, description="learn equivalent scalings", strict=True)
    lwc: bool = Field(True, description="learn weight clipping", strict=True)
    pairs: tuple[Literal["norm", "value-output", "up-down", "query-key"], ...] = Field(
        ("norm", "value-output", "query-key"), description="which equivalent scalings"
    )
    alpha: float = Field(
        0.75, ge=0.0, le=1.0, description="share of the inputs in the SmoothQuant start"
    )
    let_rate: float = Field(2e-2, gt=0.0, description="learning rate of the logarithm of scales")
    lwc_rate: float = Field(2e-2, gt=0.0, description="learning rate of clipping logits")
    saliency_after_smoothing: bool = Field(
        True,
        description="rank channels after the start's smoothing, as they will be coded",
        strict=True,
    )

    @model_validator(mode="after")
    def _learns_something(self) -> OmniQuantRecipe:
        if not self.let and not self.lwc:
            raise ValueError(
                "let and lwc are both false, so nothing is left of omniquant; use pipeline rtn"
            )
        if self.epochs == 0 and self.lwc:
            raise ValueError(
                "lwc is learned, and epochs is 0; set lwc to false (SmoothQuant) or raise epochs"
            )
        if self.let and not self.pairs:
            raise ValueError("let is true, but pairs names none; name some, or set let to false")
        idle = {
            "epochs is 0": (
                {"batch_size", "accumulate", "precision", "let_rate", "lwc_rate"}
                if self.epochs == 0
                else set()
            ),
            "let is false": (
                set() if self.let else {"alpha", "let_rate", "pairs", "saliency_after_smoothing"}
            ),
            "lwc is false": set() if self.lwc else {"lwc_rate"},
        }
        for reason, names in idle.items():
            if changed := sorted(
                name
                for name in names
                if getattr(self, name) != type(self).model_fields[name].default
            ):
                raise ValueError(f"{', '.join(changed)} would have no effect: {reason}")
        return self


class GptqRecipe(Section):
    """How the ``gptq`` pipeline fits weights."""

    damping: float = Field(
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
    compensation_damping: float = Field(
        0.03,
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

    @model_validator(mode="after")
    def _has_an_effect(self) -> GptqRecipe:
        if (
            not self.compensate
            and self.compensation_damping != type(self).model_fields["compensation_damping"].default
        ):
            raise ValueError(
                "compensation_damping has no effect while compensate is false; set compensate to"
                " true, or leave it out"
            )
        return self
