"""The section of a recipe that says where channels are rotated among each other before they are
coded.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from spikellm.recipe.base import Section


class RotationRecipe(Section):
    """Rotations that leave the full-precision model's function as it is (QuaRot, SpinQuant), and
    make what is coded even.
    """

    residual: bool = Field(
        False,
        description=(
            "rotate the residual stream; fused into all weights around it, so it costs nothing"
        ),
        strict=True,
    )
    value_output: bool = Field(
        False,
        description="rotate the channels of each head of V; fused into V and the output layer",
        strict=True,
    )
    online: tuple[Literal["output", "down"], ...] = Field(
        (),
        description=(
            "layers whose inputs are rotated while the model runs: attention's output layer, the"
            " feed-forward part's last layer"
        ),
    )
    equalize: bool = Field(
        False,
        description=(
            "first scale channels between up and down, value and output, query and key so that they"
            " lose least together; fused"
        ),
        strict=True,
    )
    choose: Literal["all", "loss"] = Field(
        "all",
        description=(
            "online: rotate all channels, or whatever loses least on a sample: none, all, or all"
            " but the largest"
        ),
    )

    @property
    def active(self) -> bool:
        """Whether anything is rotated or scaled."""
        return self.residual or self.value_output or self.equalize or bool(self.online)

    @model_validator(mode="after")
    def _has_an_effect(self) -> RotationRecipe:
        if self.choose == "loss" and not self.online:
            raise ValueError(
                "choose has no effect: online names no layer; name some, or leave choose out"
            )
        if len(set(self.online)) != len(self.online):
            raise ValueError(f"online names a layer twice ({', '.join(self.online)})")
        return self
