"""Options of OmniQuant."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from spikellm.recipe.base import AlgorithmOptions, register_options


@register_options
class OmniQuantOptions(AlgorithmOptions):
    """What OmniQuant learns, and how."""

    name: Literal["omniquant"] = "omniquant"
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
    def _learns_something(self) -> OmniQuantOptions:
        if not self.let and not self.lwc:
            raise ValueError(
                "let and lwc are both false, so nothing is left of omniquant; use algorithm rtn"
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

    def check(self, recipe: Any) -> None:
        given = (recipe.activations.token_steps, *_overridden(recipe, "token_steps"))
        if any(given):
            raise ValueError(
                "activations.token_steps cannot be learned around: omniquant goes on scaling the"
                " ranges by which massive tokens are told; use algorithm gptq or rtn"
            )
        sources = recipe.activations.threshold_from, *_overridden(recipe, "threshold_from")
        if self.let and "calibration" in sources:
            raise ValueError(
                "activations.threshold_from: calibration cannot be learned around: omniquant goes"
                " on scaling the inputs that thresholds were fixed for; set algorithm.let to"
                " false, or use algorithm gptq or rtn"
            )
        ranked = (
            recipe.activations.salient_rate > 0
            or recipe.weights.salient_rate > 0
            or bool(recipe.overrides)
        )
        if not self.saliency_after_smoothing and not ranked:
            raise ValueError(
                "algorithm.saliency_after_smoothing would have no effect: no channel is salient;"
                " set activations.salient_rate above 0"
            )


def _overridden(recipe: Any, field: str) -> list[Any]:
    return [one.activations[field] for one in recipe.overrides if field in one.activations]
