"""Options of the transforms, as a recipe names them."""

from __future__ import annotations

from typing import Literal

from spikellm.recipe.base import TransformOptions


class ResidualRotationOptions(TransformOptions):
    """Options of :mod:`spikellm.transforms.residual_rotation`."""

    name: Literal["residual-rotation"] = "residual-rotation"


class EqualizationOptions(TransformOptions):
    """Options of :mod:`spikellm.transforms.equalization`."""

    name: Literal["equalization"] = "equalization"
    sites: tuple[Literal["query-key", "value-output", "up-down"], ...] = (
        "query-key",
        "value-output",
        "up-down",
    )


class ValueOutputRotationOptions(TransformOptions):
    """Options of :mod:`spikellm.transforms.value_output_rotation`."""

    name: Literal["value-output-rotation"] = "value-output-rotation"


class OnlineRotationOptions(TransformOptions):
    """Options of :mod:`spikellm.transforms.online_rotation`."""

    name: Literal["online-rotation"] = "online-rotation"
    layers: tuple[Literal["output", "down"], ...] = ("output", "down")
    choose: Literal["all", "loss"] = "all"
