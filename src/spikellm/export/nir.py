"""Layers as NIR graphs (Neuromorphic Intermediate Representation, Pedersen et al. 2024): neurons
that pass binary spikes on, integer weights, integrators.

    input ─▶ IF ─▶ Linear ─▶ I (integrator) ─▶ output         and, where spikes are negative too,
    input ─▶ Scale(−1) ─▶ IF ─▶ Linear(−W) ─▶ I

A moment of binary execution is one time step. Fed with the spikes of a token, which come in both
signs where they are about the baseline, the integrators end in the layer's integer sums, one for
each output and segment (columns that share a threshold and a weight scale), and for each plane
where weights are planes of ±1. Thresholds that are constants are those of the graph's neurons: each
fires where a spike's current θ comes, from half of it on, and behind the integrators constants
scale sums to values,

    input ─▶ IF(θ) ─▶ Linear ─▶ I ─▶ Scale(θ·s) ─▶ output

What NIR has no words for, :func:`not_expressed` lists. As a format, ``nir`` is a folder with one
graph a layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikellm.core.errors import RequestError
from spikellm.core.extras import require
from spikellm.core.files import write_atomically
from spikellm.core.registry import unknown_name
from spikellm.export.base import Source, exporters
from spikellm.nn.execution import spiking_linears
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.rotation import layer_name
from spikellm.profiling.population import channel_order

NO_PHASE = (
    "NIR has no words for spikes worth powers of two, since its synapses are the same at every"
    " moment"
)
_ANEW = (
    "thresholds and baselines found anew for every token, and with them the scaling of sums to"
    " values"
)
_CHARGE = "the charge of baselines, constants that sums of trains as published hold"
_ALWAYS = (
    "spikes of several levels (GIF): unrolled to binary ones",
    (
        "the soft reset and the start at half a threshold with which a current becomes spikes:"
        " NIR's IF resets to a constant, so the graph begins with spikes, not with currents"
    ),
    "phase spikes: NIR's synapses are the same at every moment, so trains are binary",
    "steps that differ by channel or token: with fewer steps spikes end earlier",
    "ranges, rotations, centers, softmax, norms, residual sums: the graph is one layer",
)


@exporters.register("nir")
class NirExporter:
    """Every layer whose inputs are spikes as a graph in a file of its own, ``LAYER.nir``."""

    not_expressed: tuple[str, ...] = ()  # once it is known what was exported

    def __init__(self) -> None:
        require_nir()

    def refuses(self, model: Any) -> str | None:
        """A model without spiking inputs has no spikes that a graph could begin with."""
        if _layers(model):
            return None
        return (
            "no layer codes its inputs as spikes, and a graph begins with spikes; convert it with a"
            " recipe that has activations below 16 bits"
        )

    def export(self, source: Source, folder: Path) -> list[dict[str, Any]]:
        """Write the graphs.

        Raises:
            RequestError: a layer that is named is not there, or its inputs are not spikes.
            SpikeLLMError: the file system refused.
        """
        layers, files = _layers(source.model), []
        for name in source.layers:
            if name not in layers:
                raise RequestError(unknown_name("layer", name, layers))
        names = source.layers or tuple(layers)
        self.not_expressed = not_expressed(layers[name] for name in names)
        for name in names:
            graph = layer_graph(layers[name])
            write_graph(graph, folder / f"{name}.nir")
            outputs, inputs = graph.nodes["synapses"].weight.shape
            files.append(
                {
                    "file": f"{name}.nir",
                    "layer": name,
                    "inputs": int(inputs),
                    "sums": int(outputs),
                }
            )
        return files


def not_expressed(layers: Iterable[SpikingLinear]) -> tuple[str, ...]:
    """What these layers have and their graphs have no words for."""
    layers = list(layers)
    found = list(_ALWAYS)
    if any(layer.fixed is None for layer in layers):
        found.append(_ANEW)
    if any(layer.fixed is not None and _charges(layer) for layer in layers):
        found.append(_CHARGE)
    return tuple(found)


def _charges(layer: SpikingLinear) -> bool:
    return layer.neuron is not None and not layer.neuron.both_signs


def _layers(model: Any) -> dict[str, SpikingLinear]:
    """Layers whose inputs are spikes, by the full names that they have in their family."""
    return {
        layer_name(name): layer
        for name, layer in spiking_linears(model).items()
        if layer.neuron is not None
    }


def layer_graph(layer: SpikingLinear) -> Any:
    """NIR graph of one layer.

    Channels in their own order, outputs ``planes · segments · out``, one after the other: sums, or
    where thresholds are constants, values.

    Raises:
        DependencyError: the package ``nir`` is not installed.
    """
    nir, np = require_nir(), numpy()
    weights = segment_weights(layer).numpy().astype(np.int32)
    inputs, outputs = weights.shape[1], weights.shape[0]
    ones = np.ones(inputs, np.float32)
    current = ones if layer.fixed is None else channel_thresholds(layer).numpy()

    def relay() -> Any:
        return nir.IF(r=ones, v_threshold=0.5 * current, v_reset=0 * ones)

    neuron = layer.neuron
    signed = neuron is not None and neuron.both_signs
    nodes = {
        "input": nir.Input({"input": np.array([inputs])}),
        "neurons": relay(),
        "synapses": nir.Linear(weights),
    }
    edges = [("input", "neurons"), ("neurons", "synapses"), ("synapses", "sums")]
    if signed:
        nodes |= {
            "negate": nir.Scale(-ones),
            "negative_neurons": relay(),
            "negative_synapses": nir.Linear(-weights),
        }
        edges += [
            ("input", "negate"),
            ("negate", "negative_neurons"),
            ("negative_neurons", "negative_synapses"),
            ("negative_synapses", "sums"),
        ]
    nodes |= {
        "sums": nir.I(np.ones(outputs, np.float32)),
        "output": nir.Output({"output": np.array([outputs])}),
    }
    if layer.fixed is None:
        return nir.NIRGraph(nodes, [*edges, ("sums", "output")])
    nodes["values"] = nir.Scale(_scales(layer).numpy())
    return nir.NIRGraph(nodes, [*edges, ("sums", "values"), ("values", "output")])


def channel_thresholds(layer: SpikingLinear) -> Tensor:
    """θ of every channel of a layer whose thresholds are constants, float32 ``(in,)``."""
    assert layer.fixed is not None
    return layer.fixed.theta[layer.channel_group.long()].float().cpu()


def _scales(layer: SpikingLinear) -> Tensor:
    """What turns the sums of every plane and segment into values, float32 ``(planes · segments ·
    out,)``.
    """
    assert layer.fixed is not None
    theta = layer.fixed.theta.float().cpu()
    return torch.cat(
        [
            theta[segment.activation_group]
            * plane.weight_scale.float().cpu()[:, segment.weight_group]
            for number, plane in enumerate(layer.planes())
            for segment in layer.layout().segments
            if layer.format.has_plane(layer, number, segment.weight_group)
        ]
    )


def segment_weights(layer: SpikingLinear) -> Tensor:
    """Integer weights ``(planes · segments · out, in)``, int64: the rows of a segment are zero
    outside its columns.
    """
    layout, order, parts = layer.layout(), channel_order(layer), []
    for number, plane in enumerate(layer.planes()):
        stored = plane.integer_weights().long().cpu()
        for segment in layout.segments:
            if not layer.format.has_plane(layer, number, segment.weight_group):
                continue
            part = torch.zeros(layer.out_features, layer.in_features, dtype=torch.int64)
            part[:, order[segment.start : segment.stop]] = stored[:, segment.start : segment.stop]
            parts.append(part)
    return torch.cat(parts)


def write_graph(graph: Any, path: Path) -> None:
    """Write a graph as HDF5.

    Raises:
        SpikeLLMError: the file system refused.
    """
    nir = require_nir()
    write_atomically(path, lambda temporary: nir.write(str(temporary), graph))


def require_nir() -> Any:
    """The package ``nir``.

    Raises:
        DependencyError: it is not installed.
    """
    return require("graphs of NIR", "nir", "nir")


def numpy() -> Any:
    """NumPy, which ``nir`` brings."""
    import numpy as np

    return np
