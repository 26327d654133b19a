"""Counts, energy, sizes and sample spikes of a model on one text, measured for its report."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from spikellm.models.summary import ModelSummary, summarize
from spikellm.nn.execution import spiking_linears
from spikellm.nn.rotation import layer_name
from spikellm.profiling.counts import Counts
from spikellm.profiling.energy import PRODUCTS, energies
from spikellm.profiling.energy_table import EnergyTable
from spikellm.profiling.glimpse import glimpses
from spikellm.profiling.massive import extra_steps
from spikellm.profiling.operations import count_operations
from spikellm.profiling.report import Beside, Origin, Report, Text

_DRAWN = 32  # tokens that are run for a picture of spikes, of which the last one is drawn
_DECODED = 16  # tokens of the first window that are counted one at a time


class Pricing(NamedTuple):
    """How energy is estimated: the table, and rows that are left out."""

    table: EnergyTable
    without: tuple[str, ...] = ()


def make_report(
    model: nn.Module,
    name: str,
    windows: Tensor,
    text: Text,
    pricing: Pricing,
    origin: Origin | None,
) -> Report:
    """Count what a model does on windows of text.

    Args:
        windows: ``(windows, tokens)``; the last tokens of the first window are counted one at a
            time as well.
        text: where the windows come from, and the perplexity on them.
    """
    summary, prefill = summarize(model, density=True), _prefill(model, windows)
    last = min(_DECODED, windows.shape[1] - 1)
    coding = {}
    for full, layer in spiking_linears(model).items():
        if layer.neuron is not None:
            coding[layer_name(full)] = layer
    return Report(
        name=name,
        text=text,
        summary=summary,
        prefill=prefill,
        decode=count_operations(model, [windows[:1]], decode=last)["decode"],
        energy=energies(
            prefill, pricing.table, _bytes(prefill, summary, len(windows)), pricing.without
        ),
        table=pricing.table,
        steps={short: layer.channel_steps.cpu() for short, layer in coding.items()},
        own_range={short: layer.own_range.cpu() for short, layer in coding.items()},
        glimpses=glimpses(model, coding, windows[:1, :_DRAWN]) if coding else {},
        extra=extra_steps(model, windows),
        origin=origin,
        without=pricing.without,
    )


def measure_beside(
    model: nn.Module,
    name: str,
    windows: Tensor,
    perplexity: float,
    table: EnergyTable,
    *,
    converted: bool,
) -> Beside:
    """Figures of another model on the same windows."""
    counts, summary = _prefill(model, windows), summarize(model)
    linear = counts.total("linear")
    energy = energies(counts, table, _bytes(counts, summary, len(windows)))["linear"]
    return Beside(
        name,
        converted,
        perplexity,
        linear.average_steps,
        linear.ace,
        linear.dense_ace,
        energy,
        summary.total_bytes,
        summary.stored,
    )


def _prefill(model: nn.Module, windows: Tensor) -> Counts:
    return count_operations(model, windows.split(max(1, 2048 // windows.shape[1])))["prefill"]


def _bytes(counts: Counts, summary: ModelSummary, passes: int) -> dict[str, int]:
    """Bytes of weights by kind of their layers, read once a pass; embeddings are not counted."""
    found = dict.fromkeys(PRODUCTS, 0)
    for layer in summary.layers:
        if layer.name in counts.kinds:
            found[counts.kinds[layer.name]] += layer.weight_bytes * passes
    return found
