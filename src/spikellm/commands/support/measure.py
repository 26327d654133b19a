"""Figures of one converted model that tables are made of: perplexity, steps, arithmetic effort,
estimated energy, size, time.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from spikellm import api
from spikellm.core import console
from spikellm.evaluation.perplexity import perplexity_of_windows
from spikellm.models.stored_bits import KINDS, StoredBits
from spikellm.models.summary import ModelSummary
from spikellm.profiling.counts import EXECUTION_MODES
from spikellm.profiling.energy import Energy, estimate
from spikellm.profiling.energy_table import EnergyTable
from spikellm.profiling.operations import count_operations

_COUNTED_TOKENS = 2048


class Measured(NamedTuple):
    """One model, converted with one seed.

    Attributes:
        perplexity: by text.
        seconds: that the conversion took.
        ace: of the whole model over that of the original at 16 bits, on the first 2,048 tokens of
            the first text; energy estimated from the same counts.
        spikes, sops: of the linear layers by execution mode: spikes a value, and synaptic
            operations over multiply-accumulates of the original; nothing where no input is coded.
    """

    perplexity: dict[str, float]
    seconds: float
    summary: ModelSummary
    ace: float
    energy: Energy
    spikes: dict[str, float]
    sops: dict[str, float]


def measure(
    model: Any, windows: Mapping[str, Tensor], table: EnergyTable, seconds: float, label: str
) -> Measured:
    """Measure a model on windows ``(windows, seqlen)`` of each text.

    ``label`` names it in the progress bar.
    """
    values = {}
    for text, own in windows.items():
        with console.bar(f"{label}: perplexity on {text}") as update:
            values[text] = perplexity_of_windows(model, own, update).value
    sample = next(iter(windows.values()))
    counts = count_operations(model, [sample[: max(1, _COUNTED_TOKENS // sample.shape[1])]])[
        "prefill"
    ]
    whole, linear = counts.total(), counts.total("linear")
    spikes, sops = (
        {mode: found[mode] / max(over, 1) for mode in EXECUTION_MODES} if linear.codes else {}
        for found, over in ((linear.spikes, linear.codes), (linear.sops, linear.macs))
    )
    summary = api.summarize(model, density=True)
    ace, energy = whole.ace / whole.dense_ace, estimate(counts, table)
    return Measured(values, seconds, summary, ace, energy, spikes, sops)


def row_of(
    recipe: str, runs: Sequence[Measured], base: Mapping[str, float] | None
) -> dict[str, Any]:
    """A row of a table from the runs of one recipe, one a seed: means, deviations, ratios to
    ``base``, the original's perplexity by text (None for the original).
    """
    summary, spiking = runs[0].summary, bool(runs[0].summary.spiking_layers)
    unknown = runs[0].energy.unknown
    perplexity = {}
    for text in runs[0].perplexity:
        values = [run.perplexity[text] for run in runs]
        value = statistics.fmean(values)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        perplexity[text] = {
            "value": value,
            "deviation": spread,
            "ratio": value / (value if base is None else base[text]),
            "seeds": len(values),
        }
    return {
        "recipe": recipe,
        "perplexity": perplexity,
        "average_steps": summary.average_steps if spiking else None,
        "additive_share": summary.additive_share if spiking else None,
        "weight_density": mean_if_known([run.summary.weight_density for run in runs]),
        "weight_bytes": summary.weight_bytes if spiking else None,
        "weight_ratio": summary.weight_bytes / summary.dense_bytes if spiking else 1.0,
        "stored": _mean_stored([run.summary.stored for run in runs]),
        "ace_ratio": statistics.fmean(run.ace for run in runs),
        "energy_ratio": {
            mode: mean_if_known([run.energy.ratio(mode) for run in runs])
            for mode in EXECUTION_MODES
        },
        "spikes_a_value": _mean([run.spikes for run in runs]),
        "sops_ratio": _mean([run.sops for run in runs]),
        "energy_unknown": sorted({row for rows in unknown.values() for row in rows}),
        "seconds": None if base is None else statistics.fmean(run.seconds for run in runs),
    }


def _mean(found: Sequence[Mapping[str, float]]) -> dict[str, float] | None:
    """Means of what all runs have by execution mode; None where there is nothing."""
    if not found[0]:
        return None
    return {mode: statistics.fmean(one[mode] for one in found) for mode in EXECUTION_MODES}


def _mean_stored(found: Sequence[StoredBits]) -> dict[str, Any]:
    """Means of stored bits, which may differ with the seed; keys as
    :meth:`spikellm.models.stored_bits.StoredBits.to_data` has them.
    """
    return {
        "bits_a_weight": statistics.fmean(one.bits_a_weight for one in found),
        "bits_a_parameter": statistics.fmean(one.bits_a_parameter for one in found),
        "bytes": statistics.fmean(one.total / 8 for one in found),
        "bits": {kind: statistics.fmean(one.bits[kind] for one in found) for kind in KINDS},
        "weights": found[0].weights,
        "parameters": found[0].parameters,
    }


def stored_in_words(row: dict[str, Any]) -> str:
    """Stored bits of a weight of converted layers, and of a parameter of the whole model."""
    found = row["stored"]
    return f"{found['bits_a_weight']:.2f}/{found['bits_a_parameter']:.2f}"


def mean_if_known(values: Sequence[float | None]) -> float | None:
    """The mean; None where a value is not known."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def energy_in_words(ratio: float | None) -> str:
    """A ratio of energies; a dash where the table does not know it."""
    return "-" if ratio is None else f"{ratio:.2f}"


BOS_IN_WORDS = "every window starts with the BOS token"


def perplexity_in_words(row: dict[str, Any], text: str) -> str:
    """``value ± deviation (ratio×)`` of one text."""
    one = row["perplexity"][text]
    spread = f" ± {one['deviation']:.2f}" if one["seeds"] > 1 else ""
    return f"{one['value']:.2f}{spread} ({one['ratio']:.3f}×)"
