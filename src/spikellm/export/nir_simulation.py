"""NIR graphs of layers, read back and run by the equations of NIR: what was written is proved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikellm.core.errors import CheckpointError
from spikellm.export.nir import numpy, require_nir


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
            " spikellm export --format nir"
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
    return torch.from_numpy(numpy().rint(_run(graph, spikes)["sums"])).long()


def run_graph_to_values(graph: Any, spikes: Tensor) -> Tensor:
    """The same, to what the graph puts out at the end, float64 ``(segments · out,)``.

    Raises:
        CheckpointError: the graph has a node that such graphs do not have.
    """
    return torch.from_numpy(_run(graph, spikes)["output"])


def _run(graph: Any, spikes: Tensor) -> dict[str, Any]:
    """What every node passes on at the last moment."""
    np = numpy()
    order, sources = _in_order(graph)
    current = 2 * graph.nodes["neurons"].v_threshold.astype(np.float64)  # of a spike
    state: dict[str, Any] = dict.fromkeys(order, 0.0)
    value: dict[str, Any] = {}
    for moment in spikes.numpy().astype(np.float64) * current:
        for name in order:
            arriving = sum(value[source] for source in sources[name])
            state[name], value[name] = _step(graph.nodes[name], state[name], arriving, moment)
    return value


def _in_order(graph: Any) -> tuple[list[str], dict[str, list[str]]]:
    """Nodes, each behind those that it hears from, and from which that is."""
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
    return order, sources


def _step(node: Any, state: Any, arriving: Any, moment: Any) -> tuple[Any, Any]:
    """State of a node after a moment, and what it passes on."""
    nir, np = require_nir(), numpy()
    if isinstance(node, nir.Input):
        return state, moment
    if isinstance(node, nir.Scale):
        return state, node.scale * arriving
    if isinstance(node, nir.Linear):
        return state, node.weight.astype(np.float64) @ arriving
    if isinstance(node, nir.IF):
        charged = state + node.r * arriving
        fires = charged > node.v_threshold
        return np.where(fires, node.v_reset, charged), fires.astype(np.float64)
    if isinstance(node, nir.I):
        summed = state + node.r * arriving
        return summed, summed
    if isinstance(node, nir.Output):
        return state, arriving
    raise CheckpointError(f"the NIR graph has a node {type(node).__name__}, which no layer has")
