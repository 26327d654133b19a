"""Everything that a model costs on one text, as plain data: what ``spikellm report`` shows and
writes as JSON.

The figures at the top (average steps, ACE, spikes, energy) are of the linear layers inside the
decoder blocks, which is what a recipe decides; ``parts`` has the same for attention, for the output
projection and for the whole model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spikellm.models.summary import LayerSummary, ModelSummary, summarize
from spikellm.nn.execution import spiking_linears
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.rotation import layer_name
from spikellm.profiling.counts import FORMS, Counts, Firing, Operations
from spikellm.profiling.energy import OMITTED, Energy, EnergyTable, estimate
from spikellm.profiling.operations import count_operations
from spikellm.profiling.population import Population, layer_population
from spikellm.recipe import Recipe

PARTS = ("linear", "attention", "head", "rotation", "whole")
_DRAWN = 32  # tokens that are run for a picture of spikes, of which the last one is drawn
_DECODED = 16  # tokens of the first window that are counted one at a time


class Text(NamedTuple):
    """What a model was measured on, and its perplexity there."""

    name: str
    windows: int
    seqlen: int
    perplexity: float


class Origin(NamedTuple):
    """How a model was converted: the recipe, and the record of what converting did (see
    ``SpikeConfig``).
    """

    recipe: Recipe
    record: dict[str, Any]


class Beside(NamedTuple):
    """Another model on the same text: the original, or the result of another recipe."""

    name: str
    converted: bool
    perplexity: float
    average_steps: float
    ace: float
    dense_ace: int
    energy: Energy
    total_bytes: int


@dataclass(frozen=True)
class Report:
    """What one model costs on one text.

    Attributes:
        name: of the model, as the user gave it.
        summary: its layers, bits, steps and sizes.
        prefill: operations of whole windows; ``decode`` those of tokens that come one at a time,
            from a cache.
        energy: estimated for ``prefill``, by part (see :data:`PARTS`).
        steps: T of every input channel of converted layers that code their inputs, uint8 ``(in,)``
            each, channels in their own order.
        own_range: the channels that have a range of their own, bool ``(in,)``.
        sample: spikes of one layer in the middle of the model on a few tokens, to be drawn; None
            where nothing is coded.
        origin: how it was converted; None for an original.
        beside: other models on the same text.
    """

    name: str
    text: Text
    summary: ModelSummary
    prefill: Counts
    decode: Counts
    energy: dict[str, Energy]
    table: EnergyTable
    steps: dict[str, Tensor]
    own_range: dict[str, Tensor]
    sample: Population | None
    origin: Origin | None
    beside: tuple[Beside, ...] = ()

    def part(self, name: str) -> Operations:
        """Operations of one of :data:`PARTS`."""
        return self.prefill.total(*(() if name == "whole" else (name,)))

    @property
    def average_steps(self) -> float:
        """Executed over original multiply-accumulates of the linear layers."""
        return self.part("linear").average_steps

    @property
    def ace(self) -> float:
        """Arithmetic effort of the linear layers, bit operations.

        ``dense_ace`` that of the original at 16 bits.
        """
        return self.part("linear").ace

    @property
    def dense_ace(self) -> int:
        return self.part("linear").dense_ace

    @property
    def spike_rate(self) -> float:
        """Non-zero spikes over all steps of the neurons before the linear layers."""
        return self.part("linear").spike_rate

    @property
    def sops(self) -> dict[str, int]:
        """Synaptic operations of the linear layers by form."""
        found = self.part("linear").sops
        return {form: found[form] for form in FORMS}

    @property
    def additive_share(self) -> float:
        """Share of the linear layers' executed multiply-accumulates that are additions or
        subtractions.
        """
        return self.part("linear").additive_share

    @property
    def energy_pj(self) -> dict[str, float]:
        """Energy of the linear layers, pJ, **estimated from operation counts**: ``dense`` of the
        original, ``merged``, ``stepped``, ``binary``; ``weight_traffic``.
        """
        return self.energy["linear"]._asdict()

    def to_data(self) -> dict[str, Any]:
        """The report as JSON holds it; keys are stable."""
        parts = {
            name: {**_operations(self.part(name)), "energy_pj": self.energy[name]._asdict()}
            for name in PARTS
        }
        layers = {layer.name: layer for layer in self.summary.layers}
        return {
            "model": self.name,
            "kind": self.summary.kind,
            "text": {**self.text._asdict(), "tokens": self.prefill.tokens},
            "perplexity": self.text.perplexity,
            **{key: value for key, value in parts["linear"].items() if key != "macs"},
            "bytes": {
                "weights": self.summary.weight_bytes,
                "dense": self.summary.dense_bytes,
                "total": self.summary.total_bytes,
            },
            "parts": parts,
            "decode": {"tokens": self.decode.tokens, **_operations(self.decode.total())},
            "layers": [
                _layer(name, entry, self.prefill.kinds[name], layers.get(name))
                for name, entry in self.prefill.layers.items()
            ],
            "firing": {name: _firing(firing) for name, firing in self.prefill.firing.items()},
            "energy_table": {
                "name": self.table.name,
                "source": self.table.source,
                "estimated_from": "operation counts",
                "omits": OMITTED,
            },
            "beside": [{**row._asdict(), "energy": row.energy._asdict()} for row in self.beside],
            "blocks": self.origin.record["blocks"] if self.origin else [],
            "recipe": self.origin.recipe.model_dump(mode="json") if self.origin else None,
            "versions": self.origin.record["versions"] if self.origin else None,
            "attention": [asdict(attention) for attention in self.summary.attentions],
        }


def make_report(
    model: nn.Module,
    name: str,
    windows: Tensor,
    text: Text,
    table: EnergyTable,
    origin: Origin | None,
    beside: tuple[Beside, ...] = (),
) -> Report:
    """Count what a model does on windows of text.

    Args:
        windows: ``(windows, tokens)``; the last tokens of the first one are counted one at a time
            as well.
        text: where they come from, and the perplexity on them.
    """
    summary, prefill = summarize(model), _prefill(model, windows)
    decode = count_operations(model, [windows[:1]], decode=min(_DECODED, windows.shape[1] - 1))[
        "decode"
    ]
    energy = {part: _energy(prefill, part, summary, table, len(windows)) for part in PARTS}
    coding = {
        layer_name(full): layer
        for full, layer in spiking_linears(model).items()
        if layer.neuron is not None
    }
    steps = {short: layer.channel_steps.cpu() for short, layer in coding.items()}
    own = {short: (layer.channel_group >= 2).cpu() for short, layer in coding.items()}
    return Report(
        name,
        text,
        summary,
        prefill,
        decode,
        energy,
        table,
        steps,
        own,
        _sample(model, coding, windows),
        origin,
        beside,
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
    """The line of another model on the same windows."""
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
    """Of a part; its weights are read once a pass, embeddings are looked up and not counted."""
    names = [name for name, kind in counts.kinds.items() if part in (kind, "whole")]
    read = sum(layer.weight_bytes for layer in summary.layers if layer.name in names)
    chosen = Counts(
        counts.tokens,
        {name: counts.layers[name] for name in names},
        {name: counts.kinds[name] for name in names},
    )
    return estimate(chosen, table, read, passes)


def _operations(entry: Operations) -> dict[str, Any]:
    return {
        "macs": entry.macs,
        "average_steps": entry.average_steps,
        "ace": entry.ace,
        "dense_ace": entry.dense_ace,
        "spike_rate": entry.spike_rate,
        "sops": {form: entry.sops[form] for form in FORMS},
        "additive_share": entry.additive_share,
    }


def _layer(name: str, entry: Operations, kind: str, layer: LayerSummary | None) -> dict[str, Any]:
    products = [
        {"bits": list(bits), "count": count} for bits, count in sorted(entry.by_bits.items())
    ]
    return {
        "name": name,
        "kind": kind,
        **_operations(entry),
        "products": products,
        "layer": asdict(layer) if layer else None,
    }


def _firing(firing: Firing) -> dict[str, Any]:
    rates = firing.rates.double().cpu()
    marks = torch.quantile(
        rates, torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0], dtype=torch.float64)
    ).tolist()
    return {
        "mean": float(rates.mean()),
        "quantiles": dict(zip(("0", "10", "25", "50", "75", "90", "100"), marks, strict=True)),
        "spikes": firing.spikes,
    }
