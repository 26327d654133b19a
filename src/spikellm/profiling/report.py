"""Everything that a model costs on one text, as plain data: what ``spikellm report`` shows and
writes as JSON.

The figures at the top (average steps, ACE, spikes, energy) are of the linear layers inside the
decoder blocks, which is what a recipe decides; ``parts`` has the same for attention, for the output
projection and for the whole model, ``rows`` what is no product of matrices.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import Tensor

from spikellm.models.stored_bits import StoredBits
from spikellm.models.summary import ModelSummary
from spikellm.profiling.counts import EXECUTION_MODES, Counts, Operations
from spikellm.profiling.energy import OMITTED, Energy
from spikellm.profiling.energy_table import EnergyTable
from spikellm.profiling.glimpse import Glimpse
from spikellm.profiling.massive import ExtraSteps, MassiveToken
from spikellm.profiling.report_data import firing_data, layer_data, operations_data, work_data
from spikellm.profiling.work import ROWS
from spikellm.recipe import Recipe

PART_NAMES = {
    "linear": "linear layers of blocks",
    "attention": "attention",
    "head": "output projection",
    "rotation": "rotations",
    "whole": "whole model",
}
PARTS = tuple(PART_NAMES)


class Text(NamedTuple):
    """What a model was measured on, and its perplexity there.

    Attributes:
        bos: whether every window starts with the BOS token.
    """

    name: str
    windows: int
    seqlen: int
    perplexity: float
    bos: bool = False


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
    stored: StoredBits

    def to_data(self) -> dict[str, Any]:
        """As JSON holds it."""
        apart = {"energy": self.energy.to_data(), "stored": self.stored.to_data()}
        return {**self._asdict(), **apart}


@dataclass(frozen=True)
class Report:
    """What one model costs on one text.

    Attributes:
        name: of the model, as the user gave it.
        summary: its layers, bits, steps and sizes.
        prefill: operations of whole windows; ``decode`` those of tokens that come one at a time,
            from a cache.
        energy: estimated for ``prefill``, by part (see :data:`PARTS`) and by row (see
            :data:`spikellm.profiling.work.ROWS`); the whole is the sum of both.
        without: rows that were left out.
        steps: T of every input channel of converted layers that code their inputs, uint8 ``(in,)``
            each, channels in their own order.
        own_range: the channels that have a range of their own, bool ``(in,)``.
        glimpses: spikes on a few tokens, to be drawn, of everything that is coded, see
            :func:`spikellm.profiling.glimpse.glimpses`.
        extra: tokens that take more steps, by input, where a model tells such apart.
        massive: those of them that do in most inputs.
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
    glimpses: dict[str, Glimpse]
    extra: dict[str, ExtraSteps]
    origin: Origin | None
    massive: tuple[MassiveToken, ...] = ()
    beside: tuple[Beside, ...] = ()
    without: tuple[str, ...] = ()

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
        """Synaptic operations of the linear layers by execution mode."""
        found = self.part("linear").sops
        return {mode: found[mode] for mode in EXECUTION_MODES}

    @property
    def additive_share(self) -> float:
        """Share of the linear layers' executed multiply-accumulates that are additions or
        subtractions.
        """
        return self.part("linear").additive_share

    @property
    def energy_pj(self) -> dict[str, Any]:
        """Energy of the linear layers' products, pJ, **estimated from operation counts**: ``dense``
        of the original, each execution mode, ``weight_traffic``; None where the table does not know
        an operation.
        """
        return self.energy["linear"].to_data()

    def rows(self) -> dict[str, str]:
        """Names of parts and rows of the estimate, in words, in order."""
        names = {**PART_NAMES, **ROWS}
        return {name: names[name] for name in self.energy}

    def to_data(self) -> dict[str, Any]:
        """The report as JSON holds it; keys are stable."""
        parts = {
            name: {**operations_data(self.part(name)), "energy_pj": self.energy[name].to_data()}
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
            "stored": self.summary.stored.to_data(),
            "parts": parts,
            "rows": {
                name: {
                    "operations": work_data(self.prefill.work.get(name, {})),
                    "energy_pj": energy.to_data(),
                }
                for name, energy in self.energy.items()
                if name in ROWS
            },
            "decode": {"tokens": self.decode.tokens, **operations_data(self.decode.total())},
            "layers": [
                layer_data(name, entry, self.prefill.kinds[name], layers.get(name))
                for name, entry in self.prefill.layers.items()
            ],
            "firing": {name: firing_data(firing) for name, firing in self.prefill.firing.items()},
            "extra_steps": {name: extra.to_data() for name, extra in self.extra.items()},
            "energy_table": {
                "name": self.table.name,
                "source": self.table.source,
                "estimated_from": "operation counts",
                "omits": OMITTED,
                "without": list(self.without),
            },
            "beside": [row.to_data() for row in self.beside],
            "blocks": self.origin.record["blocks"] if self.origin else [],
            "training": self.origin.record.get("training") if self.origin else None,
            "recipe": self.origin.recipe.model_dump(mode="json") if self.origin else None,
            "versions": self.origin.record["versions"] if self.origin else None,
            "attention": [asdict(attention) for attention in self.summary.attentions],
        }
