"""Counts, energy, sizes and sample spikes of a model on one text, measured for its report."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spikellm.models.summary import ModelSummary, summarize
from spikellm.nn.execution import spiking_linears
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.rotation import layer_name
from spikellm.profiling.counts import Counts
from spikellm.profiling.energy import Energy, EnergyTable, estimate
from spikellm.profiling.operations import count_operations
from spikellm.profiling.population import Population, layer_population
from spikellm.profiling.report import PARTS, Beside, Origin, Report, Text

_DRAWN = 32  # tokens that are run for a picture of spikes, of which the last one is drawn
_DECODED = 16  # tokens of the first window that are counted one at a time


def make_report(
    model: nn.Module,
    name: str,
    windows: Tensor,
    text: Text,
    table: EnergyTable,
    origin: Origin | None,
) -> Report:
    """Count what a model does on windows of text.

    Args:
        windows: ``(windows, tokens)``; the last tokens of the first window are counted one at a
            time as well.
        text: where the windows come from, and the perplexity on them.
    """
    summary, prefill = summarize(model), _prefill(model, windows)
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
        energy={part: _energy(prefill, part, summary, table, len(windows)) for part in PARTS},
        table=table,
        steps={short: layer.channel_steps.cpu() for short, layer in coding.items()},
        own_range={short: (layer.channel_group >= 2).cpu() for short, layer in coding.items()},
        sample=_sample(model, coding, windows),
        origin=origin,
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
    linear, energy = counts.total("linear"), _energy(counts, "linear", summary, table, len(windows))
    return Beside(
        name,
        converted,
        perplexity,
        linear.average_steps,
        linear.ace,
        linear.dense_ace,
        energy,
        summary.total_bytes,
    )


def _sample(
    model: nn.Module, coding: dict[str, SpikingLinear], windows: Tensor
) -> Population | None:
    if not coding:
        return None
    name = list(coding)[len(coding) // 2]
    seen: list[Tensor] = []
    handle = coding[name].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        with torch.no_grad():
            model(windows[:1, :_DRAWN].to(next(model.parameters()).device), use_cache=False)
    finally:
        handle.remove()
    return layer_population(name, coding[name], seen[0])


def _prefill(model: nn.Module, windows: Tensor) -> Counts:
    return count_operations(model, windows.split(max(1, 2048 // windows.shape[1])))["prefill"]


def _energy(
    counts: Counts, part: str, summary: ModelSummary, table: EnergyTable, passes: int
) -> Energy:
    """Energy of a part, whose weights are read once a pass; embeddings are not counted."""
    names = [name for name, kind in counts.kinds.items() if part in (kind, "whole")]
    read = sum(layer.weight_bytes for layer in summary.layers if layer.name in names)
    chosen = Counts(
        counts.tokens,
        {name: counts.layers[name] for name in names},
        {name: counts.kinds[name] for name in names},
    )
    return estimate(chosen, table, read, passes)
