"""What a model consists of: its linear layers, their bits, steps and sizes.

Read off the modules, not off the recipe.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from spikellm.models.attention_interface import spiking_attentions
from spikellm.models.families import is_linear, weight_and_bias
from spikellm.models.stored_bits import StoredBits, layer_bits, stored_bits
from spikellm.nn.attention import SpikingAttention
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.rotation import layer_name, rotations
from spikellm.nn.vocabulary import CodedHead

_DENSE_BYTES = 2  # a weight of the 16-bit original
_ROWS = 4096  # of a layer, unpacked at a time


@dataclass(frozen=True)
class LayerSummary:
    """One linear layer.

    ``weight_bytes`` counts codes with scales and all that replaces the weight; ``dense_bytes`` 16
    bits a weight; ``stored`` the bits by kind, see :mod:`spikellm.models.stored_bits`.
    """

    name: str
    spiking: bool
    in_features: int
    out_features: int
    weight_bits: int
    spike_bits: int
    neuron: str | None
    thresholds: str | None
    salient_channels: int
    own_range_channels: int
    average_steps: float
    weight_bytes: int
    dense_bytes: int
    salient_columns: int = 0  # whose weights take several steps
    weight_code: str | None = None
    additive_share: float = 0.0  # share of products that are additions
    rotated_channels: int = 0  # of the inputs, while the model runs
    token_steps: int = 0  # steps of massive tokens; 0 where there are none
    massive_share: float = 0.0  # share of massive tokens in the calibration text
    clusters: int = 1  # of input channels, each with a range
    static: bool = False  # whether thresholds are constants
    weight_density: float | None = None  # share of the integer weights that are not 0, if counted
    stored: dict[str, int] = field(default_factory=dict)

    @property
    def stored_bits(self) -> float:
        """Bits a weight that are stored because of the weights."""
        bits = sum(bits for kind, bits in self.stored.items() if kind != "inputs")
        return bits / (self.in_features * self.out_features)


@dataclass(frozen=True)
class AttentionSummary:
    """One spiking attention module; bits are 16 where a part is not coded.

    ``cache_bytes`` of K and V of one token and key-value head, 0 if not cached as spikes.
    """

    name: str
    query_bits: int
    key_bits: int
    value_bits: int
    salient_key_channels: int
    salient_value_channels: int
    cache_bytes: int
    dense_cache_bytes: int


@dataclass(frozen=True)
class ModelSummary:
    """A whole model; sums are over its spiking layers unless said otherwise."""

    kind: str
    layers: list[LayerSummary]
    attentions: list[AttentionSummary]
    total_bytes: int  # all parameters and buffers of the model
    stored: StoredBits  # the same bits by kind

    @property
    def spiking_layers(self) -> int:
        return sum(layer.spiking for layer in self.layers)

    @property
    def average_steps(self) -> float:
        """Mean steps over the multiply-accumulates of converted layers.

        1 where none is converted.
        """
        spiking = [layer for layer in self.layers if layer.spiking]
        products = sum(layer.in_features * layer.out_features for layer in spiking)
        return (
            sum(layer.average_steps * layer.in_features * layer.out_features for layer in spiking)
            / products
            if products
            else 1.0
        )

    @property
    def additive_share(self) -> float:
        """Share of the multiply-accumulates of converted layers that are additions or subtractions.

        0 where none is converted.
        """
        spiking = [layer for layer in self.layers if layer.spiking]
        products = sum(layer.in_features * layer.out_features for layer in spiking)
        return (
            sum(layer.additive_share * layer.in_features * layer.out_features for layer in spiking)
            / products
            if products
            else 0.0
        )

    @property
    def weight_density(self) -> float | None:
        """Share of the weights of converted layers that are not zero, where that was counted.

        None where no layer has integer weights.
        """
        counted = [
            (layer.weight_density, layer.in_features * layer.out_features)
            for layer in self.layers
            if layer.weight_density is not None
        ]
        total = sum(weights for _, weights in counted)
        return sum(share * weights for share, weights in counted) / total if total else None

    @property
    def weight_bytes(self) -> int:
        return sum(layer.weight_bytes for layer in self.layers if layer.spiking)

    @property
    def dense_bytes(self) -> int:
        return sum(layer.dense_bytes for layer in self.layers if layer.spiking)


def summarize(model: nn.Module, *, density: bool = False) -> ModelSummary:
    """Summary of a model, converted or not.

    Args:
        density: whether weights that are not zero are counted, which unpacks all of them.
    """
    turned = {
        name.rpartition(".")[0]: rotation.rotated for name, rotation in rotations(model).items()
    }
    layers = [
        replace(
            _summarize(layer_name(name), module),
            rotated_channels=turned.get(layer_name(name), 0),
            stored=layer_bits(module),
            weight_density=_density(module) if density else None,
        )
        for name, module in model.named_modules()
        if isinstance(module, (SpikingLinear, CodedHead)) or is_linear(module)
    ]
    attentions = [
        _summarize_attention(name, spikes) for name, spikes in spiking_attentions(model).items()
    ]
    stored = stored_bits(model)
    return ModelSummary(type(model).__name__, layers, attentions, stored.total // 8, stored)


def _density(module: nn.Module) -> float | None:
    """Share of a layer's integer weights that are not zero; None where it has none."""
    if not isinstance(module, SpikingLinear) or not module.format.has_integers:
        return None
    rows = range(0, module.out_features, _ROWS)
    found = sum(
        int(torch.count_nonzero(module.integer_weights(slice(row, row + _ROWS)))) for row in rows
    )
    module.format.release(module)
    return found / (module.in_features * module.out_features)


def _summarize_attention(name: str, spikes: SpikingAttention) -> AttentionSummary:
    settings, (heads, key, value) = spikes.settings, spikes.shape
    cached = (
        spikes.key_coder().row_bytes(key) + spikes.value_coder().row_bytes(value)
        if spikes.caches
        else 0
    )
    salient_key, salient_value = (
        int((group > 0).sum()) // heads for group in (spikes.key_group, spikes.value_group)
    )
    return AttentionSummary(
        name,
        settings.query.bits,
        settings.key.bits,
        settings.value.bits,
        salient_key,
        salient_value,
        cached,
        _DENSE_BYTES * (key + value),
    )


def _summarize(name: str, module: nn.Module) -> LayerSummary:
    if isinstance(module, SpikingLinear):
        activations = module.settings.activations
        dense = module.in_features * module.out_features * _DENSE_BYTES
        columns = 0 if module.weight_steps is None else int((module.weight_steps > 1).sum())
        salient, own = int(module.salient.sum()), int(module.own_range.sum())
        split = activations.thresholds if salient and activations.clusters == 1 else None
        neuron, thresholds = (activations.neuron, split) if activations.spiking else (None, None)
        return LayerSummary(
            name,
            True,
            module.in_features,
            module.out_features,
            module.settings.weights.bits,
            activations.bits,
            neuron,
            thresholds,
            salient,
            own,
            module.average_steps,
            module.weight_bytes,
            dense,
            columns,
            module.format.name,
            module.additive_share,
            token_steps=0 if module.massive is None else module.massive.steps,
            massive_share=0.0 if module.massive is None else module.massive.share,
            clusters=activations.clusters,
            static=activations.static,
        )
    if isinstance(module, CodedHead):
        table, products = module.table, module.in_features * module.out_features
        return LayerSummary(
            name,
            False,
            module.in_features,
            module.out_features,
            table.settings.bits,
            8 * _DENSE_BYTES,
            None,
            None,
            0,
            0,
            1.0,
            table.weight_bytes,
            products * _DENSE_BYTES,
            weight_code="affine",
        )
    weight, _ = weight_and_bias(module)
    bits = weight.element_size() * 8
    return LayerSummary(
        name,
        False,
        weight.shape[1],
        weight.shape[0],
        bits,
        bits,
        None,
        None,
        0,
        0,
        1.0,
        weight.numel() * weight.element_size(),
        weight.numel() * _DENSE_BYTES,
    )
