"""Counts as the JSON of a report holds them; keys are stable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from spikellm.models.summary import LayerSummary
from spikellm.profiling.counts import EXECUTION_MODES, Firing, Operations
from spikellm.profiling.elementary import Work

_PERCENTILES = (0, 10, 25, 50, 75, 90, 100)


def operations_data(entry: Operations) -> dict[str, Any]:
    """Operations of a layer or a part."""
    return {
        "macs": entry.macs,
        "average_steps": entry.average_steps,
        "ace": entry.ace,
        "dense_ace": entry.dense_ace,
        "spike_rate": entry.spike_rate,
        "sparse_rate": entry.sparse_rate,
        "codes": entry.codes,
        "spikes": {mode: entry.spikes[mode] for mode in EXECUTION_MODES},
        "spikes_from_zero": {mode: entry.spikes_from_zero[mode] for mode in EXECUTION_MODES},
        "sops": {mode: entry.sops[mode] for mode in EXECUTION_MODES},
        "sops_from_zero": {mode: entry.sops_from_zero[mode] for mode in EXECUTION_MODES},
        "shifts": entry.shifts,
        "density": density_data(entry),
        "additive_share": entry.additive_share,
    }


def density_data(entry: Operations) -> dict[str, Any]:
    """How much of a product is done: weights that are not zero, spikes a value, and synaptic
    operations for each multiply-accumulate of the original, which is their product.

    Values and weights count as often as they meet.
    """
    macs = max(entry.macs, 1)
    return {
        "weights": entry.weight_density,
        "spikes": {mode: entry.reached[mode] / macs for mode in EXECUTION_MODES},
        "product": {mode: entry.sops[mode] / macs for mode in EXECUTION_MODES},
    }


def work_data(work: Mapping[str, Work]) -> dict[str, dict[str, int]]:
    """Elementary operations of a row by execution mode, or ``dense``."""
    return {mode: dict(sorted(own.items())) for mode, own in work.items()}


def layer_data(
    name: str, entry: Operations, kind: str, layer: LayerSummary | None
) -> dict[str, Any]:
    """One layer; ``layer`` is None for what is no linear layer."""
    products = [
        {"bits": list(bits), "count": count} for bits, count in sorted(entry.by_bits.items())
    ]
    return {
        "name": name,
        "kind": kind,
        **operations_data(entry),
        "products": products,
        "layer": asdict(layer) if layer else None,
    }


def firing_data(firing: Firing) -> dict[str, Any]:
    """Firing rates of one population: mean and percentiles over channels."""
    rates = firing.rates.double().cpu()
    shares = torch.tensor(_PERCENTILES, dtype=torch.float64) / 100
    marks = torch.quantile(rates, shares).tolist()
    return {
        "mean": float(rates.mean()),
        "quantiles": dict(zip(map(str, _PERCENTILES), marks, strict=True)),
        "spikes": firing.spikes,
        "from_zero": firing.from_zero,
    }
