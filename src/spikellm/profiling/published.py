"""Figures that others published, to stand beside those of a report; none was measured here.

Sources stand with each; docs/report.md has the same table.
"""

from __future__ import annotations

from typing import NamedTuple

from spikellm.profiling.counts import DENSE_BITS


class Published(NamedTuple):
    """One published figure.

    Attributes:
        system: whose.
        setting: bits of weights and inputs.
        bits: of weights and inputs, whose product is the effort of one multiply-accumulate.
        steps: average steps, least and most that the source may mean.
        perplexity, original: on WikiText-2, of the system and of what it was made from.
        source: where it is reported.
        exact: whether to all digits; else it is about as much.
        spikes: whether it spikes.
    """

    system: str
    setting: str
    bits: tuple[int, int]
    steps: tuple[float, float]
    perplexity: float
    original: float
    source: str
    spikes: bool = False
    exact: bool = True

    @property
    def ratio(self) -> float:
        """Perplexity over that of the original."""
        return self.perplexity / self.original

    @property
    def effort(self) -> tuple[float, float]:
        """ACE of the linear layers over that of the original at 16 bits, by its definition."""
        weights, inputs = self.bits
        least, most = (weights * inputs * steps / DENSE_BITS**2 for steps in self.steps)
        return least, most


_ORIGINAL = 5.47  # perplexity of LLaMA2-7B
_PAPER = "arXiv 2407.04752"
MODEL = "LLaMA2-7B, WikiText-2"
PUBLISHED = (
    Published("OmniQuant", "W4A4", (4, 4), (1.0, 1.0), 15.25, _ORIGINAL, _PAPER),
    Published("SpikeLLM", "W4A4", (4, 4), (1.1, 1.15), 11.36, _ORIGINAL, _PAPER, spikes=True),
    Published("SpikeLLM", "W2A8", (2, 8), (1.05, 1.15), 22.13, _ORIGINAL, _PAPER, spikes=True),
    Published(
        "QuaRot", "W4A4", (4, 4), (1.0, 1.0), 6.1, _ORIGINAL, "arXiv 2404.00456", exact=False
    ),
    Published(
        "SpinQuant",
        "W4A4",
        (4, 4),
        (1.0, 1.0),
        5.9,
        _ORIGINAL,
        "arXiv 2405.16406",
        exact=False,
    ),
    Published(
        "EfficientQAT", "W2A16", (2, 16), (1.0, 1.0), 6.86, _ORIGINAL, "README of EfficientQAT"
    ),
)
CAUTION = (
    "Published figures are as reported, not measured here, of another model, in other windows of"
    " text: they show orders of magnitude and rank nothing. Their ACE follows from bits and"
    " average steps."
)
UNPLACED = (
    "What is on record here of SDLLM (arXiv 2604.16475) and SpikingBrain (arXiv 2509.05276) are"
    " accuracy on tasks and sparsity, no perplexity beside that of an original, so they have no"
    " place here. None of these systems is known to count additions, spikes a value or energy as"
    " this page does, so there is no such comparison."
)
