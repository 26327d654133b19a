"""Seeing spikes while a model runs: whoever codes shows its spike trains to an observer, if there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from torch import Tensor, nn

from spikellm.neurons.base import SoftResetNeuron


class SpikeTrain(NamedTuple):
    """Spikes of one population of neurons in one forward pass.

    Attributes:
        source: module that coded: a spiking linear layer, or the spikes of an attention module.
        part: ``input``, ``query``, ``key``, ``value`` or ``probabilities``.
        codes: merged spike counts, int32, ``(tokens, channels)`` of a layer in stored order, ``(batch, heads, tokens, channels)`` of attention; of a cached
            key or value all tokens that take part.
        steps: T of every channel, broadcasts to ``codes``.
        neuron: what fired them.
    """

    source: nn.Module
    part: str
    codes: Tensor
    steps: Tensor
    neuron: SoftResetNeuron


_observer: ContextVar[Callable[[SpikeTrain], None] | None] = ContextVar("spikellm_spike_observer", default=None)


@contextmanager
def watching_spikes(observer: Callable[[SpikeTrain], None]) -> Iterator[None]:
    """While this holds, every spike train is shown to ``observer``."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def spike_observer() -> Callable[[SpikeTrain], None] | None:
    """Who wants to see spikes now."""
    return _observer.get()
