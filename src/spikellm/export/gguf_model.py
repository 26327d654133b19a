"""Models as GGUF files, which llama.cpp reads; and those that are not converted, to time it beside
this package.

Weights of these are quantized value by value, without calibration: a file for speed, not for
accuracy. It holds no tokenizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from spikellm.checkpoint.save import spike_config
from spikellm.core.errors import RequestError, UnsupportedModelError
from spikellm.core.files import write_atomically
from spikellm.core.version import __version__
from spikellm.export.gguf_types import (
    FileTypes,
    fitting_type,
    quantized,
    require_gguf,
    require_types,
    stored_bytes,
)
from spikellm.models.families import (
    GGUF_FAMILIES,
    GgufFamily,
    decoder_of,
    has_tied_head,
    longest_window,
)

if TYPE_CHECKING:
    import numpy as np

_VOCABULARY = ("token_embd.", "output.")
_FACTORS = "rope_freqs.weight"
_QUANTIZATION_VERSION = 2


class Entry(NamedTuple):
    """A tensor of a file: its shape, its type there, and what makes its blocks."""

    shape: torch.Size
    kind: str
    blocks: Callable[[], np.ndarray[Any, Any]]


class Place(NamedTuple):
    """Where a tensor of a model goes in a file.

    Attributes:
        heads: heads of which llama.cpp has the rows in another order (:func:`adjacent_pairs`); None
            where it has the same.
    """

    name: str
    heads: int | None

    def ordered(self, rows: Tensor) -> Tensor:
        """Rows in llama.cpp's order."""
        return rows if self.heads is None else adjacent_pairs(rows, self.heads)


def write_gguf(model: Any, path: Path, types: FileTypes) -> dict[str, int]:
    """Write a model that is not converted.

    Matrices get the type that is asked for, or what takes its place (see
    :func:`spikellm.export.gguf_types.fitting_type`); vectors stay in float32. Tied embedding and
    output projection are one tensor.

    Returns:
        How many matrices have which type.

    Raises:
        DependencyError: the ``gguf`` package is not installed.
        RequestError: a converted model, or an unknown type.
        UnsupportedModelError: llama.cpp would not run the model as it is; says what differs.
        SpikeLLMError: the file system refused.
    """
    require_types(types)
    if spike_config(model) is not None:
        raise RequestError("a converted model has no GGUF file; give the original")
    family = family_of(model)
    kinds, entries = Counter[str](), {}
    for name, value in _named(model, family):
        kind = "f32"
        if value.dim() > 1:
            kind = fitting_type(_wanted(name, types), value.shape[-1])
            kinds[kind] += 1
        entries[name] = entry_of(value, kind)
    writer = described(model, family, types.layers)
    writer.add_tokenizer_model("no_vocab")
    write_entries(writer, entries, path)
    return dict(kinds)


def entry_of(value: Tensor, kind: str) -> Entry:
    """A tensor that the package quantizes to a type that fits it."""
    return Entry(value.shape, kind, lambda: quantized(value, kind))


def write_entries(writer: Any, entries: dict[str, Entry], path: Path) -> None:
    """Write a file that has its metadata, one tensor in memory at a time.

    Raises:
        SpikeLLMError: the file system refused.
    """
    gguf = require_gguf()
    for name, (shape, kind, _) in entries.items():
        own = gguf.GGMLQuantizationType[kind.upper()]
        writer.add_tensor_info(name, shape, None, stored_bytes(kind, shape), own)

    def write(temporary: Path) -> None:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries.values():
            writer.write_tensor_data(entry.blocks())
        writer.close()

    write_atomically(path, write)


def _wanted(name: str, types: FileTypes) -> str:
    return types.vocabulary if name.startswith(_VOCABULARY) else types.layers


def family_of(model: Any) -> GgufFamily:
    """How llama.cpp calls and reads the family of a model.

    Raises:
        UnsupportedModelError: its tensors are not known to have one counterpart each, or it
            computes something else there.
    """
    config = model.config
    if config.model_type not in GGUF_FAMILIES:
        raise UnsupportedModelError(
            f"no GGUF file of {type(model).__name__}: its tensors are not mapped one to one"
            f" (known are {', '.join(GGUF_FAMILIES)}); make one with llama.cpp's own converter"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise UnsupportedModelError(
            f"no GGUF file of {type(model).__name__} with {config.hidden_act}: llama.cpp computes"
            " silu in this family"
        )
    return GGUF_FAMILIES[config.model_type]


def _named(model: Any, family: GgufFamily) -> Iterator[tuple[str, Tensor]]:
    """Tensors under the names of GGUF, rows of queries and keys in llama.cpp's order."""
    state = model.state_dict()
    for key, place in places(model, family, state).items():
        yield place.name, place.ordered(state[key])
    yield from factors_of(model, family).items()


def places(model: Any, family: GgufFamily, keys: Iterable[str]) -> dict[str, Place]:
    """Where tensors of a model go, by their names in it; a tied output projection goes nowhere.

    Raises:
        UnsupportedModelError: one of them has no name in such files.
    """
    gguf = require_gguf()
    config = model.config
    architecture = gguf.MODEL_ARCH[family.architecture.upper()]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    head = model.get_output_embeddings()
    tied = [f"{name}.weight" for name, module in model.named_modules() if module is head]
    left_out = tied if has_tied_head(model) else []
    turned = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
    if not family.pairs_adjacent:
        turned = {}
    found = {}
    for key in keys:
        if key in left_out:
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UnsupportedModelError(
                f"no GGUF file of {type(model).__name__}: its tensor {key} has no name there"
            )
        heads = next((count for part, count in turned.items() if part in name), None)
        found[key] = Place(name, heads)
    return found


def factors_of(model: Any, family: GgufFamily) -> dict[str, Tensor]:
    """The tensor of factors of rotary frequencies; none where they are plain.

    Raises:
        UnsupportedModelError: llama.cpp would rotate by other frequencies.
    """
    factors = _frequency_factors(model)
    if factors is None:
        return {}
    if not family.frequency_factors:
        raise UnsupportedModelError(
            f"no GGUF file of {type(model).__name__} with scaled rotary frequencies: llama.cpp"
            " reads none in this family"
        )
    return {_FACTORS: factors}


def adjacent_pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys in the order in which channels that are rotated together are
    neighbours; the model library has them half a head apart.
    """
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _frequency_factors(model: Any) -> Tensor | None:
    """What rotary frequencies are divided by, one a pair of channels; None where by nothing."""
    config, rotary = model.config, decoder_of(model).rotary_emb
    kind = config.rope_parameters.get("rope_type", "default")
    pairs = head_channels(config) // 2
    if (
        kind in ("dynamic", "longrope")
        or getattr(rotary, "attention_scaling", 1.0) != 1
        or rotary.inv_freq.numel() != pairs
    ):
        raise UnsupportedModelError(
            f"no GGUF file of {type(model).__name__} with rotary embedding of type {kind} over"
            f" {2 * rotary.inv_freq.numel()} of {2 * pairs} channels: expected fixed frequencies"
            " over all"
        )
    theta = float(config.rope_parameters["rope_theta"])
    plain = theta ** -(torch.arange(pairs, dtype=torch.float32) / pairs)
    factors: Tensor = plain / rotary.inv_freq.float()
    return None if torch.allclose(factors, torch.ones(pairs), rtol=1e-5) else factors


def head_channels(config: Any) -> int:
    """Channels of an attention head."""
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def described(model: Any, family: GgufFamily, kind: str) -> Any:
    """A writer with the metadata of the file but for its tokenizer. Layers with a window see all
    tokens in llama.cpp, so the context ends with it.

    Args:
        kind: type of most layers.
    """
    gguf = require_gguf()
    writer, config = gguf.GGUFWriter(None, family.architecture), model.config
    channels = head_channels(config)
    longest = longest_window(config)
    window = getattr(config, "sliding_window", None)
    ends = [length for length in (longest, window) if length]
    writer.add_name(Path(str(getattr(config, "_name_or_path", ""))).name or type(model).__name__)
    writer.add_quantized_by(f"spikellm {__version__}")
    writer.add_vocab_size(config.vocab_size)
    if ends:
        writer.add_context_length(min(ends))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(channels)
    writer.add_value_length(channels)
    writer.add_rope_dimension_count(channels)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    return writer
