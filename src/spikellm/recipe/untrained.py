"""Neurons that need training, and recipes that have none."""

from __future__ import annotations

from collections.abc import Mapping

from spikellm.neurons import make_neuron
from spikellm.recipe.sections import ActivationRecipe


def check_untrained(
    parts: Mapping[str, ActivationRecipe], *, trains: bool, untrained: bool
) -> None:
    """Refuse neurons that need training where nothing is trained, unless the recipe says so.

    Args:
        parts: what is coded, by the key under which it stands.
        trains: whether the recipe trains.
        untrained: whether it says so.

    Raises:
        ValueError: names such a neuron; or ``untrained`` has no effect.
    """
    if trains and untrained:
        raise ValueError("untrained would have no effect beside training; leave one of them out")
    for where, part in parts.items():
        reason = make_neuron(part.neuron, part.bits).needs_training if part.spiking else None
        if reason is not None:
            if trains or untrained:
                return
            raise ValueError(
                f"{where}.neuron {part.neuron!r} needs training, and the recipe has none: {reason};"
                " set untrained to true to convert nevertheless"
            )
    if untrained:
        raise ValueError("untrained would have no effect: no neuron needs training; leave it out")
