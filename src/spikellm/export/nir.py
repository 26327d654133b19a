"""Layers as NIR graphs (Neuromorphic Intermediate Representation, Pedersen et al. 2024): neurons
that pass binary spikes on, integer weights, integrators.

    input ─▶ IF ─▶ Linear ─▶ I (integrator) ─▶ output         and, where spikes are negative too,
    input ─▶ Scale(−1) ─▶ IF ─▶ Linear(−W) ─▶ I

A moment of the binary form is one time step. Fed with the spikes of a token the integrators end in
the layer's integer sums, one for each output and segment (columns that share a threshold and a
weight scale). What NIR has no words for is listed in :data:`NOT_EXPRESSED`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikellm.core.errors import CheckpointError
from spikellm.core.extras import require
from spikellm.core.files import write_atomically
from spikellm.nn.linear import SpikingLinear
from spikellm.profiling.population import channel_order

NOT_EXPRESSED = (
    "spikes of several levels (GIF): unrolled to binary ones",
    (
        "the soft reset and the start at half a threshold with which a current becomes spikes:"
        " NIR's IF resets to a constant, so the graph begins with spikes, not with currents"
    ),
    (
        "thresholds and baselines found anew for every token, and with them the scaling of sums to"
        " values"
    ),
    "steps that differ by channel: the spikes of a channel with fewer steps end earlier",
    "ranges, softmax, norms, residual sums: the graph is one layer",
)


def layer_graph(layer: SpikingLinear) -> Any:
    """NIR graph of one layer.

    Channels in their own order, outputs ``segments · out``, one segment after the other.

    Raises:
        DependencyError: the package ``nir`` is not installed.
    """
    nir, np = require_nir(), _numpy()
    weights = segment_weights(layer).numpy().astype(np.int32)
    inputs, outputs = weights.shape[1], weights.shape[0]
    ones = np.ones(inputs, np.float32)

    def relay() -> Any:
        return nir.IF(r=ones, v_threshold=0.5 * ones, v_reset=0 * ones)

    neuron = layer.neuron
    signed = neuron is not None and neuron.signed
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
    return nir.NIRGraph(nodes, [*edges, ("sums", "output")])


def segment_weights(layer: SpikingLinear) -> Tensor:
    """Integer weights ``(segments · out, in)``, int64: the rows of a segment are zero outside its
    columns.
    """
    stored, layout = layer.integer_weights().long().cpu(), layer.layout()
    order = channel_order(layer)
    parts = []
    for segment in layout.segments:
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


def read_graph(path: Path) -> Any:
    """Read a graph.

    Raises:
        CheckpointError: not a file of NIR.
        DependencyError: the package ``nir`` is not installed.
    """
    nir = require_nir()
    try:
        return nir.read(str(path))
    except Exception as error:  # whatever HDF5 or the package says of a damaged file
        raise CheckpointError(
            f"{path} is not a NIR graph ({' '.join(str(error).split())[:120]}); write one with"
            " spikellm trace --nir"
        ) from None


def run_graph(graph: Any, spikes: Tensor) -> Tensor:
    """Run a graph of :func:`layer_graph` by the equations of NIR, with a time step of 1.

    Args:
        spikes: {−1, 0, 1}, ``(moments, in)``.

    Returns:
        What the integrators hold at the end, int64 ``(segments · out,)``.

    Raises:
        CheckpointError: the graph has a node that such graphs do not have.
    """
    nir, np = require_nir(), _numpy()
    sources: dict[str, list[str]] = {name: [] for name in graph.nodes}
    for source, target in graph.edges:
        sources[target].append(source)
    order: list[str] = []
    while len(order) < len(graph.nodes):
        ready = [
            name
            for name in graph.nodes
            if name not in order and all(source in order for source in sources[name])
        ]
        if not ready:
            raise CheckpointError("the NIR graph has a loop, which no layer has")
        order += ready
    state: dict[str, Any] = dict.fromkeys(order, 0.0)
    value: dict[str, Any] = {}
    for moment in spikes.numpy().astype(np.float64):
        for name in order:
            node, arriving = graph.nodes[name], sum(value[source] for source in sources[name])
            if isinstance(node, nir.Input):
                value[name] = moment
            elif isinstance(node, nir.Scale):
                value[name] = node.scale * arriving
            elif isinstance(node, nir.Linear):
                value[name] = node.weight.astype(np.float64) @ arriving
            elif isinstance(node, nir.IF):
                charged = state[name] + node.r * arriving
                fires = charged > node.v_threshold
                state[name], value[name] = (
                    np.where(fires, node.v_reset, charged),
                    fires.astype(np.float64),
                )
            elif isinstance(node, nir.I):
                state[name] = value[name] = state[name] + node.r * arriving
            elif isinstance(node, nir.Output):
                value[name] = arriving
            else:
                raise CheckpointError(
                    f"the NIR graph has a node {type(node).__name__}, which no layer has"
                )
    return torch.from_numpy(np.rint(value["output"]).astype(np.int64))


def require_nir() -> Any:
    """The package ``nir``.

    Raises:
        DependencyError: it is not installed.
    """
    return require("graphs of NIR", "nir", "nir")


def _numpy() -> Any:
    import numpy as np

    return np
