"""Files of a traced population: a raster of one token, membrane potentials of a few neurons, its
layer as a NIR graph.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from spikellm.core.errors import RequestError
from spikellm.export.nir import layer_graph, not_expressed, segment_weights, write_graph
from spikellm.export.nir_simulation import read_graph, run_graph
from spikellm.profiling.plots.canvas import axes, write_svg
from spikellm.profiling.plots.membrane import (
    Course,
    draw_membrane,
    membrane_by_phase,
    membrane_in_moments,
)
from spikellm.profiling.plots.spikes import draw_raster
from spikellm.profiling.population import EventForm, Population
from spikellm.profiling.trace import BlockTrace

_NEURONS = 2  # of each kind whose membrane is drawn


class Drawn(NamedTuple):
    """What of a trace is drawn: spikes of one population and token, in one form."""

    population: Population
    token: int
    form: EventForm


def write_raster(found: Drawn, word: str, path: Path) -> None:
    """Spikes of one token, channels against moments."""
    population, token = found.population, found.token
    planes = population.of_token(token, found.form)
    places = range(len(planes))[::-1] if found.form == "phase" else ()
    title = f"Spikes of {population.name}, token {token} ({word.strip() or 'blank'})"
    words = (
        f"{int((planes != 0).sum())} {found.form} spikes of {planes.shape[1]} channels over"
        f" {planes.shape[0]} moments, {int(population.salient.sum())} channels salient"
    )
    with axes(width=7.0, height=3.2) as (figure, axis):
        draw_raster(axis, planes, population.salient, places)
        axis.set_title(title, fontsize=9, loc="left")
        figure.legend(loc="outside lower left", ncols=4, fontsize=8)
        write_svg(figure, path, title, words)


def write_membrane(found: Drawn, path: Path) -> None:
    """Membrane potentials of a few neurons of one token."""
    population, token = found.population, found.token
    channels = _chosen(population, token)
    size = {"width": 7.0, "height": 1.3 * len(channels) + 0.6}
    with axes(**size, nrows=len(channels), sharex=True, squeeze=False) as (figure, grid):
        told = [
            _draw_neuron(axis, found, channel)
            for axis, channel in zip(grid[:, 0], channels, strict=True)
        ]
        grid[-1, 0].set_xlabel("moment")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=3, fontsize=8)
        title = f"Membrane potentials of {population.name}, token {token}"
        write_svg(figure, path, title, "; ".join(told))


def _chosen(population: Population, token: int) -> list[int]:
    """Channels: an ordinary one of about the median, the loudest one, the loudest salient ones."""
    codes, salient = population.fired[token].abs(), population.salient
    ordinary = (~salient).nonzero().flatten()
    ranked = ordinary[codes[ordinary].argsort(stable=True)]
    median = len(ranked) // 2
    loud = salient.nonzero().flatten()
    loudest = loud[codes[loud].argsort(descending=True, stable=True)][:_NEURONS]
    return [*ranked[median : median + 1].tolist(), *ranked[-1:].tolist(), *loudest.tolist()]


def _draw_neuron(axis: Any, found: Drawn, channel: int) -> str:
    """Draw one neuron; gives what is seen, in words."""
    population, token = found.population, found.token
    assert population.thresholds is not None
    group = population.group[channel]
    theta, baseline = (pair[token, group] for pair in population.thresholds)
    steps, code = int(population.code_steps[token, channel]), int(population.codes[token, channel])
    # what the code stands for; the input itself lies within half a threshold of it
    current = theta * (code - baseline)
    course = _course(found, (current, theta, baseline), steps)
    kind = "salient channel" if bool(population.salient[channel]) else "channel"
    title = f"{kind} {channel}, T = {steps}: code {code}"
    if population.neuron.centered:
        fired = int(population.fired[token, channel])
        title += f" − baseline {int(baseline)} = {fired}".replace("-", "−")
    levels = population.neuron.levels if found.form == "binary" else 0
    draw_membrane(axis, course, title, levels)
    axis.set_ylabel("potential / θ")
    return f"{title}: {int(course.spikes.abs().sum())} spikes in {len(course.spikes)} moments"


def _course(found: Drawn, value: tuple[Tensor, Tensor, Tensor], steps: int) -> Course:
    """Moments of one neuron; ``value``: its current, θ and z."""
    neuron = found.population.neuron
    if found.form == "binary":
        return membrane_in_moments(neuron, *value, steps)
    longest = int(found.population.code_steps[found.token].max())
    return membrane_by_phase(neuron, *value, steps, longest)


def write_nir(found: BlockTrace, population: Population, token: int, path: Path) -> dict[str, Any]:
    """Write a population's layer, read it back, run it, and compare its sums with an integer
    product.

    Raises:
        RequestError: the population is a part of attention.
    """
    if population.name not in found.layers:
        raise RequestError(
            f"{population.name} is a part of attention, not a layer with weights; name a layer with"
            " --part to write it as NIR"
        )
    layer = found.layers[population.name]
    write_graph(layer_graph(layer), path)
    sums = run_graph(read_graph(path), population.of_token(token))
    expected = segment_weights(layer) @ population.fired[token].long()
    return {
        "layer": population.name,
        "sums": sums.numel(),
        "mismatches": int((sums != expected).sum()),
        "not_expressed": list(not_expressed([layer])),
    }
