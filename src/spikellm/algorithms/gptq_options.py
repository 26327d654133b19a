"""Options of GPTQ."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from spikellm.nn.formats import formats
from spikellm.quantization.column_update import BLOCK
from spikellm.recipe.base import AlgorithmOptions, GrownSection, register_options

_limited: dict[str, list[str]] = {}  # kinds of codes on which an option has an effect, if not all
_without_zero: set[str] = set()  # kinds of codes that cannot hold a weight of zero

_FORMER_DAMPING = 0.03  # the default when older models were saved, which name every field


def limit_option(option: str, coding: str) -> None:
    """Let an option have an effect on one kind of codes, and on others that say so too."""
    _limited.setdefault(option, []).append(coding)


def refuse_zeros(coding: str) -> None:
    """Let recipes refuse sparsity of weights of this kind of codes."""
    _without_zero.add(coding)


@register_options
class GptqOptions(AlgorithmOptions, GrownSection):
    """How GPTQ fits weights."""

    added: ClassVar[tuple[str, ...]] = (
        "descents",
        "sparsity",
        "pattern",
        "prune_by",
        "sparsity_over",
    )
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

    sparsity: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="share of the weights that are zero, whatever they are coded in",
    )
    pattern: str = Field(
        "unstructured",
        pattern=r"^(unstructured|[1-9][0-9]{0,2}:[1-9][0-9]{0,2})$",
        description=(
            "where zeros lie: anywhere, or n:m for n zeros in every m stored columns of each row,"
            " which says the sparsity too"
        ),
    )
    prune_by: Literal["second-order", "wanda", "magnitude"] = Field(
        "second-order",
        description=(
            "which weights become zero: those that cost least with error feedback, block by block"
            " with the codes (SparseGPT); or beforehand and without feedback, the least |w|·‖x‖ of"
            " each row (Wanda), or the least |w| of the layer"
        ),
    )
    sparsity_over: Literal["layer", "model"] = Field(
        "layer",
        description=(
            "each layer has that share of zeros, or all layers together, by what zeros cost the"
            " loss (takes a backward pass)"
        ),
    )

    @property
    def zeros_of(self) -> tuple[int, int] | None:
        """``(n, m)`` of the pattern; None where zeros lie anywhere."""
        if self.pattern == "unstructured":
            return None
        n, m = self.pattern.split(":")
        return int(n), int(m)

    @property
    def zero_share(self) -> float:
        """Share of the weights that are zero."""
        return self.sparsity if self.zeros_of is None else self.zeros_of[0] / self.zeros_of[1]

    @model_validator(mode="after")
    def _zeros_are_possible(self) -> GptqOptions:
        if self.zeros_of is not None:
            n, m = self.zeros_of
            if not n < m <= BLOCK:
                raise ValueError(
                    f"pattern {self.pattern} is not possible: n zeros in m columns takes n < m and"
                    f" m of at most {BLOCK}"
                )
            if self.sparsity not in (0.0, n / m):
                raise ValueError(
                    f"pattern {self.pattern} has a sparsity of {n / m:g}, not {self.sparsity:g};"
                    " leave sparsity out"
                )
            if self.sparsity_over == "model":
                raise ValueError(
                    f"sparsity_over: model cannot be with pattern {self.pattern}, which has as many"
                    " zeros everywhere; leave one of them out"
                )
        for name in ("prune_by", "sparsity_over"):
            default = type(self).model_fields[name].default
            if self.zero_share == 0 and getattr(self, name) != default:
                raise ValueError(
                    f"{name} has no effect without zeros; set sparsity, or leave it out"
                )
        if self.sparsity_over == "model" and self.prune_by != "second-order":
            raise ValueError(
                f"sparsity_over: model spends by second-order, not by {self.prune_by}; leave"
                " prune_by out"
            )
        return self

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
        if self.zero_share and (without := sorted(_without_zero & found)):
            raise ValueError(
                f"algorithm.sparsity takes codes that hold zero, which codes of kind"
                f" {' and '.join(map(repr, without))} do not; leave it out, or choose another"
                " weights.format"
            )
        for option, codings in _limited.items():
            is_set = getattr(self, option) != type(self).model_fields[option].default
            if is_set and not found.intersection(codings):
                raise ValueError(
                    f"algorithm.{option} would have no effect on weights of format"
                    f" {' and '.join(map(repr, sorted(recipe.formats)))}, only on"
                    f" {' or '.join(map(repr, codings))}; leave it out"
                )
