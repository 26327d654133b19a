"""The bits that a model stores, counted over its tensors: no formula, and every tensor once.

What a recipe calls 2 bits takes more: scales, masks, the group of every channel. Here all of it is
counted that a saved model holds, by what it is for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from spikellm.models.experts import is_fused
from spikellm.models.families import is_linear
from spikellm.nn.buffer_kinds import WEIGHT_KINDS
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.vocabulary import CodedEmbedding, CodedHead, CodedTable

KINDS: dict[str, str] = {
    "codes": "codes of weights",
    "masks": "masks",
    "scales": "scales and zero-points",
    "indices": "groups, steps and order of columns",
    "inputs": "coding of inputs",
    "unconverted": "linear layers left as they were",
    "vocabulary": "tables of the vocabulary",
    "other": "biases, norms and the rest",
}
"""Kinds in words; the first four are there because of the weights of converted layers."""


@dataclass(frozen=True)
class StoredBits:
    """Bits of a whole model.

    Attributes:
        bits: by kind (:data:`KINDS`), all of them.
        weights: of converted layers, or, where none is converted, of all linear layers but the
            output projection.
        parameters: of the original, tied ones once.
    """

    bits: dict[str, int]
    weights: int
    parameters: int

    @property
    def weight_bits(self) -> int:
        """Bits because of these weights: codes, masks, scales, zero-points, indices."""
        coded = sum(self.bits[kind] for kind in WEIGHT_KINDS)
        return coded or self.bits["unconverted"]

    @property
    def bits_a_weight(self) -> float:
        """Bits of converted layers for each of their weights; 0 where there are none."""
        return self.weight_bits / self.weights if self.weights else 0.0

    @property
    def bits_a_parameter(self) -> float:
        """Bits of the whole model for each parameter of the original."""
        return self.total / self.parameters if self.parameters else 0.0

    @property
    def total(self) -> int:
        """Bits of the whole model."""
        return sum(self.bits.values())

    def share(self, kind: str) -> float:
        """Bits of a kind for each weight of converted layers."""
        return self.bits[kind] / self.weights if self.weights else 0.0

    def to_data(self) -> dict[str, Any]:
        """As JSON holds it; keys are stable."""
        return {
            "bits_a_weight": self.bits_a_weight,
            "bits_a_parameter": self.bits_a_parameter,
            "bytes": self.total / 8,
            **asdict(self),
        }


TABLE = ["stored", "bits a weight", "bits a parameter", "MiB", "share"]


def table_rows(stored: StoredBits) -> list[list[str]]:
    """The split in words, columns as :data:`TABLE` names them; kinds of which nothing is stored are
    left out.
    """
    rows = {words: stored.bits[kind] for kind, words in KINDS.items() if stored.bits[kind]}
    of_weights = [KINDS[kind] for kind in WEIGHT_KINDS]
    if not any(words in rows for words in of_weights):
        of_weights = [KINDS["unconverted"]]
    elif len(of_weights := [words for words in of_weights if words in rows]) > 1:
        place, total = len(of_weights), "weights of converted layers"
        entries = [*rows.items()]
        rows = dict([*entries[:place], (total, stored.weight_bits), *entries[place:]])
        of_weights.append(total)
    rows["whole model"] = stored.total
    return [
        [
            words,
            f"{bits / stored.weights:.3f}" if words in of_weights and stored.weights else "-",
            f"{bits / max(stored.parameters, 1):.3f}",
            f"{bits / 8 / 2**20:.2f}",
            f"{bits / max(stored.total, 1):.1%}",
        ]
        for words, bits in rows.items()
    ]


def stored_bits(model: nn.Module) -> StoredBits:
    """Count the bits of a model, converted or not."""
    kinds = {_place(tensor): kind for tensor, kind in _kinds(model)}
    tensors = {_place(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    bits, dense = dict.fromkeys(KINDS, 0), 0
    for place, tensor in tensors.items():
        kind = kinds.get(place, "other")
        bits[kind] += _bits(tensor)
        dense += tensor.numel() if kind == "unconverted" else 0
    layers = [layer for layer in model.modules() if isinstance(layer, SpikingLinear)]
    coded = sum(layer.in_features * layer.out_features for layer in layers)
    parameters = _recorded(model) or coded + _uncoded(model, tensors.values())
    return StoredBits(bits, coded or dense, parameters)


def layer_bits(layer: nn.Module) -> dict[str, int]:
    """Bits of a linear layer by kind, without its bias; what it stores nothing of is left out."""
    found: dict[str, int] = {}
    owner = layer.table if isinstance(layer, CodedHead) else layer
    for tensor, kind in _kinds_within(owner):
        found[kind] = found.get(kind, 0) + _bits(tensor)
    return found


def _bits(tensor: Tensor) -> int:
    return 8 * tensor.numel() * tensor.element_size()


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are one in memory."""
    if tensor.is_meta or not tensor.numel():
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), _bits(tensor)


def _kinds(model: nn.Module) -> Iterator[tuple[Tensor, str]]:
    """Tensors whose kind is another than ``other``; of several entries the last one holds."""
    for module in model.modules():
        yield from _kinds_within(module)
    for name in ("get_input_embeddings", "get_output_embeddings"):
        table = getattr(model, name, lambda: None)()
        if isinstance(table, nn.Embedding) or (isinstance(table, nn.Module) and is_linear(table)):
            yield table.get_parameter("weight"), "vocabulary"


def _kinds_within(module: nn.Module) -> Iterator[tuple[Tensor, str]]:
    if isinstance(module, SpikingLinear):
        for name, kind in module.buffer_kinds().items():
            yield module.get_buffer(name), kind
    elif isinstance(module, CodedTable):
        yield from ((buffer, "vocabulary") for buffer in module.buffers(recurse=False))
    elif is_linear(module):
        yield module.get_parameter("weight"), "unconverted"
    elif is_fused(module):
        own = module.parameters(recurse=False)
        yield from ((one, "unconverted") for one in own if one.dim() == 3)


def _uncoded(model: nn.Module, tensors: Iterable[Tensor]) -> int:
    """Parameters of the original that no spiking layer stands for."""
    found = sum(one.numel() for one in tensors if isinstance(one, nn.Parameter))
    for module in model.modules():
        if isinstance(module, CodedTable):
            found += module.rows * module.columns
        elif isinstance(module, CodedEmbedding):
            found -= module.multiplier.numel()
    return found


def _recorded(model: nn.Module) -> int:
    """Parameters of the original as its conversion counted them; 0 where nobody did: a conversion
    may add biases, and part a table that two layers had.
    """
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return int((getattr(config, "record", None) or {}).get("parameters", 0))
