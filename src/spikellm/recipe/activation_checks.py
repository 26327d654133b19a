"""Checks of an :class:`spikellm.recipe.ActivationRecipe`, as ``settings``."""

from __future__ import annotations

from typing import Any

from spikellm.neurons import price_misfit
from spikellm.quantization.thresholds import MEAN_UNIT
from spikellm.saliency import Ranking, criteria, rankings

MOST_CLUSTERS = 64
_MOST_FACTOR = 255 / MEAN_UNIT  # kept in one byte


def check_thresholds(settings: Any) -> None:
    """Refuse thresholds that would have no effect, or that a range does not bear.

    Raises:
        ValueError: says which.
    """
    factor, default = settings.mean_factor, type(settings).model_fields["mean_factor"].default
    if settings.threshold_from != "mean":
        if factor != default:
            raise ValueError(
                "mean_factor would have no effect: thresholds do not follow the mean of a token;"
                " set threshold_from to mean"
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


def check_salient(settings: Any) -> None:
    """Refuse salient channels that are coded like all others, or cannot be chosen.

    Raises:
        ValueError: says why.
    """
    if settings.salient_rate == 0:
        if idle := settings.changed(
            {"salient_steps", "invert", "saliency", "thresholds", "salient_for", "allocation"}
        ):
            raise ValueError(
                f"{', '.join(idle)} would have no effect while salient_rate is 0; set"
                " salient_rate above 0"
            )
        return
    if settings.salient_steps < settings.steps:
        raise ValueError(
            f"salient_steps ({settings.salient_steps}) is below steps ({settings.steps}); salient"
            " channels get at least as many"
        )
    if settings.allocated_over_model and settings.salient_for == "layer":
        raise ValueError(
            "allocation: model shares steps out to the tensors that layers read; leave"
            " salient_for at input"
        )
    if settings.invert and not isinstance(criteria[settings.saliency], Ranking):
        raise ValueError(
            f"{settings.saliency} ranks nothing, so it cannot be inverted; choose a saliency that"
            f" ranks: {', '.join(rankings())}"
        )
    if settings.thresholds == "shared" and settings.salient_steps == settings.steps:
        raise ValueError(
            "with shared thresholds and equal steps salient channels are coded like all others;"
            " raise salient_steps or use split"
        )


def check_price(settings: Any) -> None:
    """Refuse a price that spikes cannot have, or that is theirs in vain.

    Raises:
        ValueError: says why.
    """
    if settings.spikes == 0:
        if settings.spikes_of != "phase":
            raise ValueError(
                "spikes_of would have no effect while spikes is 0; set spikes to a budget"
            )
    elif reason := price_misfit(settings.make_neuron()):
        raise ValueError(
            f"spikes is {settings.spikes:g}, and a spike cannot have a price: {reason}"
        )


def check_clusters(settings: Any) -> None:
    """Refuse what clusters of channels, or thresholds that are constants, cannot go with.

    Raises:
        ValueError: says why.
    """
    if settings.static and settings.token_steps:
        raise ValueError(
            "token_steps would ask for the range of every token, which threshold_from: calibration"
            " does without; leave token_steps out"
        )
    if settings.power_of_two and not settings.static:
        raise ValueError(
            "power_of_two rounds thresholds that are constants, and a threshold that every token"
            " has anew takes a division; set threshold_from to calibration"
        )
    for reason, is_so in (
        ("threshold_from is calibration", settings.static),
        (f"clusters is {settings.clusters}", settings.clusters > 1),
    ):
        if is_so and settings.spikes:
            raise ValueError(
                f"{reason}, and a budget of spikes is shared out on the one range of a token; leave"
                " spikes out"
            )
    if settings.clusters == 1 or settings.salient_rate == 0:
        return
    if idle := settings.changed({"thresholds", "saliency", "invert", "allocation"}):
        raise ValueError(
            f"{', '.join(idle)} cannot be chosen with clusters: salient channels stay in the range"
            " of their cluster, and are those of every layer whose steps lower its loss most; leave"
            " it out"
        )
    if settings.salient_steps == settings.steps:
        raise ValueError(
            f"salient_steps is {settings.salient_steps}, as steps is, and with clusters salient"
            " channels have nothing else that others lack; raise salient_steps"
        )
