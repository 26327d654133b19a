"""Figures of a running server, as Prometheus reads them."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from spikellm.core.version import __version__
from spikellm.serving.generation import Generation
from spikellm.serving.spikes import Sample, SpikeSampler

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOGETHER = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """What the engine and the server did so far; the engine's watcher.

    Args:
        name: of the model.
        sampler: counts spikes of a text now and then.
    """

    def __init__(self, name: str, sampler: SpikeSampler) -> None:
        self._sampler = sampler
        self.registry = own = CollectorRegistry()
        info = Gauge(
            "spikellm_model_info", "The model, always 1.", ("model", "version"), registry=own
        )
        info.labels(name, __version__).set(1)
        self.requests = Counter(
            "spikellm_requests", "Answers, by status.", ("path", "status"), registry=own
        )
        self.running = Gauge("spikellm_generations_running", "Generations under way.", registry=own)
        self.waiting = Gauge(
            "spikellm_generations_waiting", "Generations in the queue.", registry=own
        )
        self._prompt = Counter(
            "spikellm_prompt_tokens", "Tokens of prompts that were read.", registry=own
        )
        self._new = Counter(
            "spikellm_generated_tokens", "Tokens that were generated.", registry=own
        )
        self._together = Histogram(
            "spikellm_step_generations",
            "Generations that one decoder step gave a token to.",
            registry=own,
            buckets=_TOGETHER,
        )
        self._first = Histogram(
            "spikellm_first_token_seconds",
            "From arrival to the first token.",
            registry=own,
            buckets=_SECONDS,
        )
        self._whole = Histogram(
            "spikellm_generation_seconds",
            "From arrival to the end.",
            registry=own,
            buckets=_SECONDS,
        )
        self._cancelled = Counter(
            "spikellm_generations_cancelled", "Given up by who asked.", registry=own
        )
        self._spikes = _Sampled(own, sampler.table.name)

    def prompt(self, tokens: int) -> None:
        """Tokens of a prompt went through the model."""
        self._prompt.inc(tokens)

    def step(self, generations: int) -> None:
        """So many generations have a token more."""
        self._together.observe(generations)

    def ended(self, generation: Generation) -> None:
        """A generation is over."""
        self._new.inc(len(generation.new))
        if generation.first_token is not None:
            self._first.observe(generation.first_token - generation.arrived)
        if generation.cancelled:
            self._cancelled.inc()
            return
        self._whole.observe(time.monotonic() - generation.arrived)
        if generation.new:
            self._sampler.offer(generation.tokens)

    def idle(self, model: Any) -> None:
        """Nothing is to be done: time to count spikes."""
        if (sample := self._sampler.count(model)) is not None:
            self._spikes.add(sample)

    def text(self) -> bytes:
        """All figures."""
        return generate_latest(self.registry)


class _Sampled:
    """Spikes, synaptic operations and energy of the texts that were counted."""

    def __init__(self, registry: CollectorRegistry, table: str) -> None:
        self._table = table
        self._tokens = Counter(
            "spikellm_sampled_tokens", "Tokens whose spikes were counted.", registry=registry
        )
        self._spikes = Counter(
            "spikellm_sampled_spikes", "Spikes in these tokens.", ("execution",), registry=registry
        )
        self._operations = Counter(
            "spikellm_sampled_synaptic_operations",
            "Synaptic operations in these tokens.",
            ("execution",),
            registry=registry,
        )
        self._a_token = Gauge(
            "spikellm_spikes_per_token",
            "Spikes a token in the last text that was counted.",
            ("execution",),
            registry=registry,
        )
        self._joules = Gauge(
            "spikellm_estimated_joules_per_token",
            "Energy a token in the last text that was counted: an estimate by a table of energies"
            " per operation, no measurement; dense is the original at 16 bits.",
            ("execution", "table"),
            registry=registry,
        )

    def add(self, sample: Sample) -> None:
        """Add a text."""
        self._tokens.inc(sample.tokens)
        for mode, spikes in sample.spikes.items():
            self._spikes.labels(mode).inc(spikes)
            self._a_token.labels(mode).set(spikes / sample.tokens)
        for mode, operations in sample.synaptic_operations.items():
            self._operations.labels(mode).inc(operations)
        for mode, joules in sample.joules.items():
            self._joules.labels(mode, self._table).set(joules / sample.tokens)
