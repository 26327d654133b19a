"""A decoder block run spike by spike: every binary spike adds or subtracts the weights of its
column, and the sums are compared with the merged integers.

Nothing here uses the layers' own products. A plane of binary spikes is turned into sums by picking
weight columns and adding them up in int64, one token and one moment after the other; what comes out
is compared, integer for integer, with the product of merged codes, and then, scaled, bit for bit
with what the layer gave.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spikellm.core.errors import NumericalError, RequestError
from spikellm.kernels.torch.product import integer_product
from spikellm.models.families import find_blocks
from spikellm.models.prepare import evaluating
from spikellm.nn import rotation
from spikellm.nn.attention import SpikingAttention
from spikellm.nn.execution import spiking_linears
from spikellm.nn.linear import SpikingLinear
from spikellm.profiling.block_recorder import BlockRecorder, hidden_states, in_execution_mode
from spikellm.profiling.population import (
    Population,
    attention_populations,
    channel_order,
    layer_population,
)


@dataclass(frozen=True)
class PopulationTrace:
    """Comparison of binary and merged mode for one population.

    Attributes:
        moments: binary time steps, the largest T·L.
        spikes: binary spikes fired.
        additions: weights that they added or subtracted; 0 for attention, which has no weights.
        integers: how many sums were compared with the merged ones.
        mismatches: how many of them differ.
        output_equal: whether the layer's output, computed from the binary sums, has the same bits;
            None for attention.
    """

    name: str
    tokens: int
    channels: int
    steps: int
    moments: int
    spikes: int
    additions: int
    integers: int
    mismatches: int
    output_equal: bool | None

    @property
    def equal(self) -> bool:
        """No sum and no output differs."""
        return self.mismatches == 0 and self.output_equal is not False


@dataclass(frozen=True)
class BlockTrace:
    """A block in merged and in binary mode.

    Attributes:
        block: its full name.
        populations: what the neurons fired.
        traces: one for each population, in the same order.
        output_difference: largest absolute difference of the block's output between the modes.
        output_values: how many values that output has.
        exact: whether the modes have to agree bit for bit; they need not where a layer sums 16-bit
            inputs, since such sums are rounded.
        layers: the spiking layers of the block by name within it.
    """

    block: str
    populations: list[Population]
    traces: list[PopulationTrace]
    output_difference: float
    output_values: int
    exact: bool
    layers: dict[str, SpikingLinear]

    @property
    def equal(self) -> bool:
        """Whether everything that has to agree does."""
        return all(trace.equal for trace in self.traces) and (
            self.output_difference == 0 or not self.exact
        )


def trace_block(model: Any, tokens: Tensor, index: int) -> BlockTrace:
    """Run a window through a model, and its block ``index`` a second time in binary mode.

    Args:
        tokens: ``(1, tokens)``.

    Raises:
        RequestError: there is no such block, or nothing in it spikes.
        NumericalError: the block gives NaN or infinity.
    """
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
        with in_execution_mode(block, layers, "binary"):
            binary = hidden_states(block(*seen.arguments, **seen.keywords))
        populations, traces = [], []
        for layer_name, layer in layers.items():
            # An expert that no token was routed to has no input.
            if layer.neuron is not None and layer_name in seen.inputs:
                population = layer_population(layer_name, layer, seen.inputs[layer_name])
                populations.append(population)
                traces.append(_check_layer(population, layer, seen.outputs[layer_name]))
        for population in attention_populations(seen.trains, block):
            populations.append(population)
            traces.append(_check_sums(population))
    exact = all(layer.neuron is not None for layer in layers.values())
    difference = float((merged.double() - binary.double()).abs().max())
    return BlockTrace(name, populations, traces, difference, merged.numel(), exact, layers)


def weight_planes(layer: SpikingLinear) -> list[Tensor]:
    """Integer weights of a layer, ``(in, out)`` int64, channels in their own order: of ternary
    weights one plane of {−1, 0, 1} a step, whose sum they are.
    """
    stored, order = layer.integer_weights().long().cpu(), channel_order(layer)
    weights = torch.empty_like(stored).index_copy_(1, order, stored).T.contiguous()
    if not layer.format.unrolls:
        return [weights]
    return [
        (weights > t).long() - (-weights > t).long() for t in range(int(weights.abs().max()))
    ] or [weights]


def add_up(plane: Tensor, weights: Tensor) -> tuple[Tensor, int]:
    """Sums that one moment of binary spikes causes, by additions alone.

    Args:
        plane: {−1, 0, 1}, ``(tokens, channels)``.
        weights: integers, ``(channels, out)``.

    Returns:
        int64 ``(tokens, out)``, and how many weights were added or subtracted.
    """
    sums = torch.zeros(plane.shape[0], weights.shape[1], dtype=torch.int64)
    for token, spikes in enumerate(plane):
        sums[token] = weights[spikes > 0].sum(0) - weights[spikes < 0].sum(0)
    return sums, int((plane != 0).sum()) * weights.shape[1]


def _check_layer(population: Population, layer: SpikingLinear, output: Tensor) -> PopulationTrace:
    """Compare the binary sums of every segment with the product of merged codes, and the output
    that follows from them with the layer's.
    """
    channels = channel_order(layer)
    chosen = [channels[part.start : part.stop] for part in layer.layout().segments]
    sums, additions = _binary_sums(population, layer, chosen)
    assert population.thresholds is not None
    theta, baseline = population.thresholds
    integers = mismatches = 0
    y = torch.zeros(len(population.codes), layer.out_features)
    whole, scale = layer.integer_weights().cpu(), layer.weight_scale.cpu()
    for segment, own, binary in zip(layer.layout().segments, chosen, sums, strict=True):
        k = whole[:, segment.start : segment.stop]
        merged = integer_product(population.codes[:, own], k, 2**53).long()
        integers += merged.numel()
        mismatches += int((merged != binary).sum())
        group = segment.activation_group
        charge = binary - baseline[:, group : group + 1].long() * k.long().sum(1)
        y += charge.float() * theta[:, group : group + 1] * scale[:, segment.weight_group]
    if layer.bias is not None:
        y = y + layer.bias.float().cpu()
    equal = torch.equal(y.to(output.dtype), output.reshape(-1, layer.out_features).cpu())
    return _found(population, additions, integers, mismatches, equal)


def _binary_sums(
    population: Population, layer: SpikingLinear, chosen: list[Tensor]
) -> tuple[list[Tensor], int]:
    """Sums over the chosen channels of each segment, int64 ``(tokens, out)``, and how many weights
    were added or subtracted.
    """
    planes, sums, additions = weight_planes(layer), [], 0
    for own in chosen:
        total = torch.zeros(len(population.codes), layer.out_features, dtype=torch.int64)
        columns = [weights[own] for weights in planes]
        for plane in population.planes():
            for weights in columns:
                found, count = add_up(plane[:, own], weights)
                total += found
                additions += count
        sums.append(total)
    return sums, additions


def _check_sums(population: Population) -> PopulationTrace:
    total = torch.zeros_like(population.codes)
    for plane in population.planes():
        total += plane
    return _found(population, 0, total.numel(), int((total != population.codes).sum()), None)


def _found(
    population: Population, additions: int, integers: int, mismatches: int, equal: bool | None
) -> PopulationTrace:
    tokens, channels = population.codes.shape
    steps = int(population.code_steps.max())
    spikes = int(population.codes.abs().sum())
    return PopulationTrace(
        population.name,
        tokens,
        channels,
        steps,
        steps * population.neuron.levels,
        spikes,
        additions,
        integers,
        mismatches,
        equal,
    )
