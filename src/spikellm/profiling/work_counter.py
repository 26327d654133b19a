"""Counts work beside products while a model runs: see :mod:`spikellm.profiling.work`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spikellm.models.plain_attention import Operands
from spikellm.nn.attention import SpikingAttention
from spikellm.nn.hooks import SpikeTrain
from spikellm.nn.linear import SpikingLinear
from spikellm.profiling.counted_layer import counted_layer
from spikellm.profiling.counts import DENSE, EXECUTION_MODES, Counts, Firing
from spikellm.profiling.elementary import Work
from spikellm.profiling.work import (
    Coder,
    coder_of,
    many,
    work_of_coding,
    work_of_firing,
    work_of_norm,
    work_of_rotary,
    work_of_scaling,
    work_of_softmax,
)

_EVERY = (DENSE, *EXECUTION_MODES)


class WorkCounter:
    """Adds what runs to counts.

    Args:
        counts: what to add to, asked for each time.
    """

    def __init__(self, counts: Callable[[], Counts]) -> None:
        self._counts = counts
        self._rotary = 0  # channels of a head that are rotated, as the model said last

    def handles(self, model: nn.Module) -> list[RemovableHandle]:
        """Hooks on the norms and rotary embeddings of a model."""
        self._rotary = 0
        found = []
        for module in model.modules():
            kind = type(module).__name__
            if kind.endswith("Norm") and not module._modules:
                found.append(module.register_forward_hook(self._norm))
            elif kind.endswith("RotaryEmbedding"):
                found.append(module.register_forward_hook(self._turns))
        return found

    def _norm(self, module: nn.Module, arguments: object, output: object) -> None:
        if not isinstance(output, Tensor):
            return
        channels, own = output.shape[-1], module._parameters
        work = work_of_norm(
            output.numel() // channels,
            channels,
            centered=isinstance(module, nn.LayerNorm),
            gain=own.get("weight") is not None,
            bias=own.get("bias") is not None,
        )
        self._counts().add_work("norms", work, *_EVERY)

    def _turns(self, module: nn.Module, arguments: object, output: object) -> None:
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            self._rotary = output[0].shape[-1]

    def linear(self, layer: SpikingLinear, tokens: int) -> None:
        """Coding and scaling of a converted layer."""
        counts, facts = self._counts(), counted_layer(layer)
        coder, layout = facts.coder, facts.layout
        outputs = tokens * layer.out_features
        if coder is None:
            groups = len(layout.weight_groups)
            scaled = work_of_scaling(outputs, groups, baseline=False, coded=False)
            counts.add_work("scaling", scaled)
        else:
            coded = work_of_coding(tokens * layer.in_features, tokens * coder.ranges, coder)
            counts.add_work("coding", coded)
            segments = len(layout.segments)
            scaled_as = {
                charged: work_of_scaling(outputs, segments, baseline=charged)
                for charged in {coder.charges(mode) for mode in EXECUTION_MODES}
            }
            for mode in EXECUTION_MODES:
                counts.add_work("scaling", scaled_as[coder.charges(mode)], mode)

    def fired(self, train: SpikeTrain, firing: Firing) -> None:
        """Neurons that fire a train, and its spikes on their way to their receivers."""
        for mode in EXECUTION_MODES:
            work = work_of_firing(mode, firing, train.neuron.levels)
            if work:
                self._counts().add_work("firing", work, mode)
                self._counts().add_work("routing", Work(spike=work["update"]), mode)

    def attention(self, seen: Operands, spikes: SpikingAttention | None) -> None:
        """Softmax and rotary embedding of one call, and where attention spikes, coding of what is
        new and scaling of both products.
        """
        counts = self._counts()
        batch, heads, queries, channels = seen.query.shape
        shared, keys, outputs = seen.key.shape[1], seen.key.shape[2], seen.value.shape[-1]
        rows = batch * heads * queries
        counts.add_work("softmax", work_of_softmax(rows, keys), *_EVERY)
        if self._rotary:
            vectors = batch * queries * (heads + shared)
            work = work_of_rotary(vectors, min(self._rotary, channels))
            counts.add_work("rotary", work, *_EVERY)
        if spikes is None:
            return
        new = batch * queries * shared
        sizes = {
            "query": (rows, channels, rows * keys),
            "key": (new, channels, rows * keys),
            "value": (new, outputs, rows * keys),
            "probabilities": (rows, keys, rows * outputs),
        }
        for part, coder in _coders_of(spikes).items():
            vectors, length, results = sizes[part]
            work = work_of_coding(vectors * length, vectors * coder.ranges, coder)
            counts.add_work("coding", work)
            for mode in EXECUTION_MODES:
                charged = coder.charges(mode)
                scaled = work_of_scaling(coder.ranges, 1, baseline=charged, coded=False)
                counts.add_work("scaling", many(scaled, results), mode)


def _coders_of(spikes: SpikingAttention) -> Mapping[str, Coder]:
    """How the parts that are coded are coded."""
    found = {}
    for part in ("query", "key", "value", "probabilities"):
        settings = getattr(spikes.settings, part)
        if settings.spiking:
            found[part] = coder_of(
                settings.make_neuron(),
                len(set(settings.group_ranges)),
                symmetric=settings.symmetric,
                source=settings.threshold_from,
            )
    return found
