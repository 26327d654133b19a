"""Converted models whose inputs are not coded as GGUF files, which llama.cpp reads: the same
weights in float32, or none.

Every layer gets the smallest type that holds its integers and scales exactly
(:mod:`spikellm.export.gguf_blocks`), and is read back before it is written; what is not converted
stays in its own type, vectors in float32.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikellm.checkpoint.outline import outline_of
from spikellm.checkpoint.save import spike_config
from spikellm.core.errors import RequestError, UnsupportedModelError
from spikellm.export.base import Source, exporters
from spikellm.export.gguf_blocks import blocks_of, type_of
from spikellm.export.gguf_model import (
    Entry,
    Place,
    described,
    entry_of,
    factors_of,
    family_of,
    places,
    write_entries,
)
from spikellm.export.gguf_tokenizer import add_tokenizer
from spikellm.export.gguf_types import require_gguf
from spikellm.nn.execution import spiking_linears
from spikellm.nn.linear import SpikingLinear

NOT_EXPRESSED = ("the recipe and the record of the conversion: the file holds weights alone",)
_FILE = "model.gguf"
_FLOATS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@exporters.register("gguf")
class GgufExporter:
    """A whole model as ``model.gguf``, with its tokenizer where llama.cpp has it too."""

    not_expressed: tuple[str, ...] = NOT_EXPRESSED

    def __init__(self) -> None:
        require_gguf()

    def refuses(self, model: Any) -> str | None:
        """See :class:`spikellm.export.base.Exporter`."""
        try:
            _types_of(model)
        except (RequestError, UnsupportedModelError) as error:
            return str(error)
        return None

    def export(self, source: Source, folder: Path) -> list[dict[str, Any]]:
        """See :class:`spikellm.export.base.Exporter`."""
        model, family = source.model, family_of(source.model)
        if source.layers:
            raise RequestError("a GGUF file holds a whole model; leave --layer out")
        types, layers, state = _types_of(model), spiking_linears(model), model.state_dict()
        entries = {}
        for key, place in places(model, family, _keys(state, layers)).items():
            owner, _, part = key.rpartition(".")
            if owner in types and part == "weight":
                entries[place.name] = _blocks(layers[owner], types[owner], place)
            else:
                entries[place.name] = _floats(place.ordered(state[key]))
        entries |= {key: entry_of(one, "f32") for key, one in factors_of(model, family).items()}
        counts = Counter(types.values())
        writer = described(model, family, counts.most_common(1)[0][0])
        reason = add_tokenizer(writer, source.tokenizer, model.config.vocab_size)
        if reason is not None:
            self.not_expressed = (*NOT_EXPRESSED, f"the tokenizer, for {reason}")
        write_entries(writer, entries, folder / _FILE)
        return [
            {
                "file": _FILE,
                "layers": len(layers),
                "types": dict(counts),
                "bytes": (folder / _FILE).stat().st_size,
                "tokenizer": reason is None,
            }
        ]


def _types_of(model: Any) -> dict[str, str]:
    """The type of every converted layer.

    Raises:
        RequestError, UnsupportedModelError: the model cannot be written exactly.
    """
    config, layers = spike_config(model), spiking_linears(model)
    if config is None or not layers:
        raise RequestError("is not converted; the exported GGUF file holds integer weights")
    if config.attention:
        raise RequestError("codes Q, K and V as spikes, which GGUF has no words for")
    for name, module in model.named_modules():
        own = type(module).__module__.startswith("spikellm.")
        if own and not isinstance(module, SpikingLinear):
            raise RequestError(
                f"has a {type(module).__name__} ({name}), which GGUF has no words for; export a"
                " model without online rotations and with its vocabulary at 16 bits"
            )
    family = family_of(model)
    _require_known_biases(model, layers)
    places(model, family, _keys(model.state_dict(), layers))
    factors_of(model, family)
    types = {}
    for name, layer in layers.items():
        try:
            types[name] = type_of(layer)
        except RequestError as error:
            raise RequestError(f"{error} ({name})") from None
    return types


def _require_known_biases(model: Any, layers: dict[str, SpikingLinear]) -> None:
    """Raise where a layer has a bias that readers do not look for."""
    if any(getattr(model.config, name, False) for name in ("attention_bias", "mlp_bias")):
        raise RequestError("asks for biases in its configuration, which GGUF has no words for")
    outline = outline_of(type(model.config).from_dict(_plain(model.config)))
    for name, layer in layers.items():
        if layer.bias is not None and outline.get_submodule(name).bias is None:
            raise RequestError(
                f"has a bias that its family lacks ({name}), so readers of GGUF would leave it out;"
                " export a model without value-centering and trained biases"
            )


def _plain(config: Any) -> dict[str, Any]:
    """A configuration without what says that its model is converted."""
    data: dict[str, Any] = config.to_dict()
    return {key: value for key, value in data.items() if key != "quantization_config"}


def _keys(state: dict[str, Tensor], layers: dict[str, SpikingLinear]) -> list[str]:
    """Names of tensors, those of converted layers as if they were not."""
    found = []
    for key in state:
        owner, _, part = key.rpartition(".")
        found.append(f"{owner}.weight" if owner in layers and part != "bias" else key)
    return list(dict.fromkeys(found))


def _blocks(layer: SpikingLinear, kind: str, place: Place) -> Entry:
    """A converted layer."""
    shape = torch.Size((layer.out_features, layer.in_features))
    return Entry(shape, kind, lambda: place.ordered(blocks_of(layer, kind)).contiguous().numpy())


def _floats(value: Tensor) -> Entry:
    """A tensor of a model as it is; vectors in float32."""
    return entry_of(value, "f32" if value.dim() < 2 else _FLOATS[value.dtype])
