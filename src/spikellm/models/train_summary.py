"""Which trains a model's neurons fire, where, and at which price of a spike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from spikellm.kernels.spec import HeadSpec
from spikellm.models.attention_interface import spiking_attentions
from spikellm.neurons import Recoding, SoftResetNeuron
from spikellm.neurons.trains import TrainForm
from spikellm.nn.attention import SpikingAttention
from spikellm.nn.execution import spiking_linears
from spikellm.nn.linear import SpikingLinear

_INPUTS = "inputs of linear layers"


@dataclass(frozen=True)
class TrainSummary:
    """Populations whose trains have one form.

    Attributes:
        train: of ``q − z``, or of the code.
        recoding: digits of phase spikes.
        populations: how many.
        parts: which they are: inputs of linear layers, ``query``, ``key``, ``value``,
            ``probabilities``.
    """

    train: TrainForm
    recoding: Recoding
    populations: int
    parts: tuple[str, ...]


def summarize_trains(model: nn.Module) -> list[TrainSummary]:
    """One entry for each form of trains, in the order of the model; nothing where nothing spikes or
    codes stay merged.
    """
    found: dict[tuple[TrainForm, Recoding], list[str]] = {}
    for part, neuron in _neurons(model):
        if neuron.unrolls:
            form: TrainForm = "centered" if neuron.centered else "published"
            found.setdefault((form, neuron.recoding), []).append(part)
    return [
        TrainSummary(*form, len(parts), tuple(dict.fromkeys(parts)))
        for form, parts in found.items()
    ]


def _neurons(model: nn.Module) -> Iterator[tuple[str, SoftResetNeuron]]:
    for layer in spiking_linears(model).values():
        if layer.neuron is not None:
            yield _INPUTS, layer.neuron
    for spikes in spiking_attentions(model).values():
        for part, spec in spikes.specs().items():
            if isinstance(spec, HeadSpec):
                yield part, spec.neuron


def spike_prices(model: nn.Module) -> dict[str, float]:
    """Prices of a spike (:mod:`spikellm.neurons.price`) by full name of layers, and of attention
    modules and their part; of what can have one.
    """
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, SpikingLinear) and module.settings.activations.spikes:
            found[name] = module.price
        elif isinstance(module, SpikingAttention):
            for part in module.settings.priced_parts:
                found[f"{name}.{part}"] = module.price(part)
    return found
