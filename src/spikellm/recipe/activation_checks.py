"""Checks of an :class:`spikellm.recipe.ActivationRecipe`, as ``settings``."""

from __future__ import annotations

from typing import Any

from spikellm.quantization.thresholds import MEAN_UNIT

_MOST_FACTOR = 255 / MEAN_UNIT  # kept in one byte


def check_thresholds(settings: Any) -> None:
    """Refuse thresholds that would have no effect, or that a range does not bear.

    Raises:
        ValueError: says which.
    """
    factor, default = settings.mean_factor, type(settings).model_fields["mean_factor"].default
    if settings.threshold_from == "range":
        if factor != default:
            raise ValueError(
                "mean_factor would have no effect: thresholds follow the range of a token; set"
                " threshold_from to mean"
            )
        return
    if not settings.symmetric:
        raise ValueError(
            "threshold_from is mean, and a mean magnitude has no sign, so the range is symmetric;"
            " set symmetric to true"
        )
    if settings.search_range:
        if factor != default:
            raise ValueError(
                "mean_factor would have no effect: search_range looks for the factor of every"
                " tensor; give one of them"
            )
    elif not (factor * MEAN_UNIT >= 1 and factor <= _MOST_FACTOR):
        raise ValueError(
            f"mean_factor is {factor:g}; expected {1 / MEAN_UNIT:g} to {_MOST_FACTOR:g}"
        )
    elif factor * MEAN_UNIT != int(factor * MEAN_UNIT):
        raise ValueError(
            f"mean_factor is {factor:g}, which is no whole number of sixteenths; the next is"
            f" {round(factor * MEAN_UNIT) / MEAN_UNIT:g}"
        )


def check_tokens(settings: Any) -> None:
    """Refuse massive tokens that take no more steps than others.

    Raises:
        ValueError: says why.
    """
    if settings.token_steps == 0:
        if idle := settings.changed({"token_factor", "token_rate"}):
            raise ValueError(
                f"{', '.join(idle)} would have no effect while token_steps is 0; set"
                " token_steps to 2 … 16"
            )
    elif settings.token_steps <= (most := max(settings.steps, settings.salient_steps)):
        raise ValueError(
            f"token_steps is {settings.token_steps}, and some channels take {most} in every token;"
            f" massive tokens take more: set token_steps to {most + 1} … 16"
        )
