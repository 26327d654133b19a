"""Options of the transforms."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from spikellm.recipe.base import GrownSection, TransformOptions, register_options

Site = Literal["query-key", "value-output", "up-down"]
OnlineLayer = Literal["attention-input", "feedforward-input", "output", "down"]


@register_options
class ResidualRotationOptions(TransformOptions, GrownSection):
    """Rotate the residual stream (QuaRot); fused into the weights around it, at no cost."""

    added: ClassVar[tuple[str, ...]] = ("basis",)

    name: Literal["residual-rotation"] = "residual-rotation"
    basis: Literal["random", "learned"] = Field(
        "random",
        description=(
            "a random rotation; or one that is learned, so that scales behind the norms"
            " (norm-equalization) make what layers read as even as can be"
        ),
    )

    def check(self, recipe: Any) -> None:
        if self.basis == "learned" and not any(
            options.name == "norm-equalization" for options in recipe.transforms
        ):
            raise ValueError(
                "residual-rotation with basis: learned has no effect without norm-equalization"
                " behind it; add that to transforms"
            )


@register_options
class NormEqualizationOptions(TransformOptions):
    """Scale channels between a norm's gain and the layers that read it, so that rotated behind the
    norm they lose least; fused into the gain.
    """

    name: Literal["norm-equalization"] = "norm-equalization"


@register_options
class EqualizationOptions(TransformOptions):
    """Scale channels between two layers so that both lose least together; fused."""

    name: Literal["equalization"] = "equalization"
    sites: tuple[Site, ...] = Field(
        ("query-key", "value-output", "up-down"), description="between which layers"
    )

    @field_validator("sites")
    @classmethod
    def _names_each_once(cls, value: tuple[Site, ...]) -> tuple[Site, ...]:
        _require_names("sites", value, "site")
        return value

    def check(self, recipe: Any) -> None:
        if "query-key" in self.sites and not recipe.attention.key.spiking:
            raise ValueError(
                "equalization of query-key has no effect: keys are not coded; set"
                " attention.key.bits, or leave query-key out of sites"
            )


@register_options
class ValueOutputRotationOptions(TransformOptions, GrownSection):
    """Rotate the channels of each head of V; fused into V and the output layer."""

    added: ClassVar[tuple[str, ...]] = ("basis",)

    name: Literal["value-output-rotation"] = "value-output-rotation"
    basis: Literal["random", "balanced"] = Field(
        "random",
        description=(
            "a random rotation for all heads; or a map of its own for each, behind which V and what"
            " attention gives lose least"
        ),
    )


@register_options
class ValueCenteringOptions(TransformOptions):
    """Take each channel's mean away from V; fused into the biases of V and the output layer."""

    name: Literal["value-centering"] = "value-centering"


@register_options
class OnlineRotationOptions(TransformOptions, GrownSection):
    """Rotate inputs of layers while the model runs."""

    added: ClassVar[tuple[str, ...]] = ("center",)

    name: Literal["online-rotation"] = "online-rotation"
    layers: tuple[OnlineLayer, ...] = Field(
        ("output", "down"),
        description=(
            "what is rotated: what attention's layers read, or the feed-forward part's first"
            " layers; attention's output layer, the feed-forward part's last layer"
        ),
    )
    choose: Literal["all", "loss"] = Field(
        "all",
        description=(
            "rotate all channels, or whatever loses least on a sample: none, all, or all but the"
            " largest"
        ),
    )
    center: bool = Field(
        False,
        description=(
            "take each channel's mean away too, and add what the layers make of it to their biases"
        ),
    )

    @property
    def centers(self) -> tuple[str, ...]:
        return self.layers if self.center else ()

    @field_validator("layers")
    @classmethod
    def _names_each_once(cls, value: tuple[OnlineLayer, ...]) -> tuple[OnlineLayer, ...]:
        _require_names("layers", value, "layer")
        return value


def _require_names(field: str, value: tuple[str, ...], what: str) -> None:
    if not value:
        raise ValueError(f"{field} names no {what}, so the transform has no effect; leave it out")
    if len(set(value)) != len(value):
        raise ValueError(f"{field} names a {what} twice ({', '.join(value)})")
