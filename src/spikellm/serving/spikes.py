"""Spikes and estimated energy of what is served: of a sample of the texts, counted when nobody
waits."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from spikellm.profiling.energy import energies
from spikellm.profiling.energy_table import EnergyTable
from spikellm.profiling.operations import count_operations

_TOKENS = 128  # of a text, its last ones
_PICO = 1e-12


@dataclass(frozen=True)
class Sample:
    """What one text took.

    Attributes:
        spikes, synaptic_operations: by execution mode.
        joules: estimated energy by execution mode, and ``dense``, the original at 16 bits; a mode
            is left out where the table does not know an operation.
    """

    tokens: int
    spikes: Mapping[str, int]
    synaptic_operations: Mapping[str, int]
    joules: Mapping[str, float]


class SpikeSampler:
    """Counts a text now and then.

    Args:
        seconds: between two counts; 0 for none at all.
    """

    def __init__(self, table: EnergyTable, seconds: float) -> None:
        self.table, self.seconds = table, seconds
        self._text: list[int] | None = None
        self._counted = -float("inf")

    def offer(self, tokens: list[int]) -> None:
        """A text that went through the model; the last one offered is counted."""
        if self.seconds and len(tokens) > 1:
            self._text = tokens[-_TOKENS:]

    def count(self, model: Any) -> Sample | None:
        """Count the text that was offered, if it is time to."""
        if self._text is None or time.monotonic() - self._counted < self.seconds:
            return None
        tokens, self._text = self._text, None
        found = sample_of(model, tokens, self.table)
        self._counted = time.monotonic()
        return found


def sample_of(model: Any, tokens: list[int], table: EnergyTable) -> Sample:
    """Count one pass over some tokens."""
    counts = count_operations(model, [torch.tensor([tokens])])["prefill"]
    whole, total = energies(counts, table)["whole"], counts.total()
    spiking = any(total.spikes.values()) or any(total.sops.values())
    priced = {"dense": whole.dense, **(whole.modes if spiking else {})}
    return Sample(
        counts.tokens,
        dict(total.spikes),
        dict(total.sops),
        {mode: value * _PICO for mode, value in priced.items() if value is not None},
    )
