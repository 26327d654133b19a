"""A decoder block run by events alone: every spike adds or subtracts the weights of its column when
it arrives, and the sums are compared with the merged integers.

Nothing here uses the layers' own products: spikes come out of a queue
(:mod:`spikellm.profiling.event_run`), and what the accumulators hold in the end is compared,
integer for integer, with the product of merged codes, and then, scaled, bit for bit with what the
layer gave.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from spikellm.core.errors import NumericalError, RequestError
from spikellm.core.registry import unknown_name
from spikellm.kernels.prepared import LinearWeights
from spikellm.kernels.torch.product import integer_product
from spikellm.models.families import find_blocks
from spikellm.models.prepare import evaluating
from spikellm.neurons.phase import places
from spikellm.nn import rotation
from spikellm.nn.attention import SpikingAttention
from spikellm.nn.execution import spiking_linears
from spikellm.nn.linear import SpikingLinear
from spikellm.profiling.block_recorder import BlockRecorder, hidden_states, in_execution_mode
from spikellm.profiling.event_run import (
    EventRun,
    events_of,
    moments_by_segment,
    run_events,
    synapses_of,
)
from spikellm.profiling.population import (
    EventForm,
    Population,
    attention_populations,
    channel_order,
    layer_population,
)


@dataclass(frozen=True)
class PopulationTrace:
    """Comparison of one population's events with merged mode.

    Attributes:
        moments: time steps of the train: the largest T·L in binary form, its bits in phase form.
        spikes: how many were fired.
        additions: weights that they added or subtracted; 0 for attention, which has no weights.
        shifts: how often an accumulator was doubled between two moments.
        integers: how many sums were compared with the merged ones.
        mismatches: how many of them differ.
        output_equal: whether the layer's output, computed from the binary sums, has the same bits;
            None for attention.
        constant_thresholds: whether its thresholds are the same whatever a token holds.
    """

    name: str
    tokens: int
    channels: int
    steps: int
    moments: int
    spikes: int
    additions: int
    shifts: int
    integers: int
    mismatches: int
    output_equal: bool | None
    constant_thresholds: bool

    @property
    def equal(self) -> bool:
        """No sum and no output differs."""
        return self.mismatches == 0 and self.output_equal is not False


@dataclass(frozen=True)
class BlockTrace:
    """A block in merged mode and by events.

    Attributes:
        block: its full name.
        populations: what the neurons fired.
        traces: one for each population, in the same order.
        output_difference: largest absolute difference of the block's output between the modes.
        output_values: how many values that output has.
        exact: whether the modes have to agree bit for bit; they need not where a layer sums 16-bit
            inputs, since such sums are rounded.
        layers: the spiking layers of the block by name within it.
        form: of the trains.
    """

    block: str
    populations: list[Population]
    traces: list[PopulationTrace]
    output_difference: float
    output_values: int
    exact: bool
    layers: dict[str, SpikingLinear]
    form: EventForm

    @property
    def equal(self) -> bool:
        """Whether everything that has to agree does."""
        return all(trace.equal for trace in self.traces) and (
            self.output_difference == 0 or not self.exact
        )


def trace_block(model: Any, tokens: Tensor, index: int, form: EventForm = "binary") -> BlockTrace:
    """Run a window through a model, and its block ``index`` a second time by spikes.

    Args:
        tokens: ``(1, tokens)``.
        form: of the trains.

    Raises:
        RequestError: there is no such block or form, or nothing in it spikes.
        NumericalError: the block gives NaN or infinity.
    """
    if form not in get_args(EventForm):
        raise RequestError(unknown_name("form", str(form), get_args(EventForm)))
    blocks = find_blocks(model)
    if not 0 <= index < len(blocks.modules):
        raise RequestError(
            f"layer is {index}; the model has decoder blocks 0 to {len(blocks.modules) - 1}"
        )
    block, name = blocks.modules[index], f"{blocks.name}.{index}"
    layers = {rotation.layer_name(own): layer for own, layer in spiking_linears(block).items()}
    if not any(layer.neuron is not None for layer in layers.values()) and not any(
        isinstance(part, SpikingAttention) for part in block.modules()
    ):
        raise RequestError(
            f"nothing in {name} codes its inputs as spikes, so there is no train to unroll; convert"
            " the model with a recipe that has activations below 16 bits (weights that are spikes"
            " add up without products in stepped execution: spikellm eval --execution stepped)"
        )
    seen = BlockRecorder(block, layers)
    with torch.no_grad(), evaluating(model):
        with seen, in_execution_mode(block, layers, "merged"):
            model(tokens, use_cache=False)
        merged = hidden_states(seen.output)
        if not bool(torch.isfinite(merged).all()):
            raise NumericalError(
                f"{name} gives NaN or infinity on this text; the model's weights are damaged or its"
                " number type overflows"
            )
        with in_execution_mode(block, layers, form):
            unrolled = hidden_states(block(*seen.arguments, **seen.keywords))
        populations, traces = [], []
        for layer_name, layer in layers.items():
            # An expert that no token was routed to has no input.
            if layer.neuron is not None and layer_name in seen.inputs:
                population = layer_population(layer_name, layer, seen.inputs[layer_name])
                populations.append(population)
                traces.append(_check_layer(population, layer, seen.outputs[layer_name], form))
        for population in attention_populations(seen.trains, block):
            populations.append(population)
            traces.append(_check_sums(population, form))
    exact = all(layer.neuron is not None for layer in layers.values())
    difference = float((merged.double() - unrolled.double()).abs().max())
    return BlockTrace(name, populations, traces, difference, merged.numel(), exact, layers, form)


def _check_layer(
    population: Population, layer: SpikingLinear, output: Tensor, form: EventForm = "binary"
) -> PopulationTrace:
    """Compare what the accumulators of every segment hold with the product of merged codes, and
    the output that follows from them with the layer's.
    """
    y, integers, mismatches = torch.zeros(()), 0, 0
    runs: list[EventRun] = []
    segments = layer.layout().segments
    for number, plane in enumerate(layer.planes()):
        there = [layer.format.has_plane(layer, number, part.weight_group) for part in segments]
        synapses = synapses_of(layer, plane)
        moments = moments_by_segment(population, synapses, form) * torch.tensor(there)
        run = run_events(events_of(population, form), synapses, moments)
        of_plane, differ = _outputs(population, layer, plane, run)
        y, mismatches = y + of_plane, mismatches + differ
        runs, integers = [*runs, run], integers + run.sums[:, torch.tensor(there)].numel()
    if layer.bias is not None:
        y = y + layer.bias.float().cpu()
    equal = torch.equal(y.to(output.dtype), output.reshape(-1, layer.out_features).cpu())
    # Every spike arrives once, whatever planes it reaches.
    total = runs[0]._replace(
        additions=sum(run.additions for run in runs), shifts=sum(run.shifts for run in runs)
    )
    return _found(population, form, total, (integers, mismatches), equal)


def _outputs(
    population: Population, layer: SpikingLinear, plane: LinearWeights, run: EventRun
) -> tuple[Tensor, int]:
    """What the accumulators stand for, float32 ``(tokens, out)``, without the bias, and how many
    of them do not hold the product of merged codes.
    """
    assert population.thresholds is not None
    theta, baseline = population.thresholds
    centered, channels, mismatches = population.neuron.centered, channel_order(layer), 0
    y = torch.zeros(len(population.codes), layer.out_features)
    whole, scale = plane.integer_weights().cpu(), plane.weight_scale.cpu()
    for segment, found in zip(layer.layout().segments, run.sums.unbind(1), strict=True):
        k, group = whole[:, segment.start : segment.stop], segment.activation_group
        codes = population.codes[:, channels[segment.start : segment.stop]]
        merged = integer_product(codes, k, 2**53).long()
        of_baseline = baseline[:, group : group + 1].long() * k.long().sum(1)
        if centered:
            merged -= of_baseline
        mismatches += int((merged != found).sum())
        charge = found if centered else found - of_baseline
        y += charge.float() * theta[:, group : group + 1] * scale[:, segment.weight_group]
    return y, mismatches


def _check_sums(population: Population, form: EventForm) -> PopulationTrace:
    events = events_of(population, form)
    total = torch.zeros_like(population.fired)
    worth = events.sign.int() << events.place.int()
    total.index_put_((events.token, events.channel), worth, accumulate=True)
    run = EventRun(total, len(events.time), 0, 0)
    differ = int((total != population.fired).sum())
    return _found(population, form, run, (total.numel(), differ), None)


def _found(
    population: Population,
    form: EventForm,
    run: EventRun,
    compared: tuple[int, int],
    equal: bool | None,
) -> PopulationTrace:
    tokens, channels = population.codes.shape
    steps = int(population.code_steps.max())
    top = steps * population.neuron.levels
    return PopulationTrace(
        population.name,
        tokens,
        channels,
        steps,
        top if form == "binary" else places(top, population.neuron.recoding),
        run.spikes,
        run.additions,
        run.shifts,
        *compared,
        equal,
        population.constant,
    )
