"""Models that are not converted as GGUF files, which llama.cpp reads: to time it beside this
package.

Weights are quantized value by value, without calibration: a file for speed, not for accuracy. It
holds no tokenizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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

_VOCABULARY = ("token_embd.", "output.")
_QUANTIZATION_VERSION = 2


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
    gguf = require_gguf()
    require_types(types)
    family = _family_of(model)
    tensors = dict(_named(model, family))
    kinds = {
        name: fitting_type(_wanted(name, types), value.shape[-1]) if value.dim() > 1 else "f32"
        for name, value in tensors.items()
    }
    writer = gguf.GGUFWriter(None, family.architecture)
    _describe(writer, model, types)
    for name, value in tensors.items():
        writer.add_tensor_info(
            name,
            value.shape,
            None,
            stored_bytes(kinds[name], value.shape),
            gguf.GGMLQuantizationType[kinds[name].upper()],
        )

    def write(temporary: Path) -> None:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, value in tensors.items():  # one at a time, so that one alone is in memory twice
            writer.write_tensor_data(quantized(value, kinds[name]))
        writer.close()

    write_atomically(path, write)
    return dict(Counter(kind for kind in kinds.values() if kind != "f32"))


def _wanted(name: str, types: FileTypes) -> str:
    return types.vocabulary if name.startswith(_VOCABULARY) else types.layers


def _family_of(model: Any) -> GgufFamily:
    """How llama.cpp calls and reads the family of a model."""
    config = model.config
    if spike_config(model) is not None:
        raise RequestError("a converted model has no GGUF file; give the original")
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
    for key, value in model.state_dict().items():
        if key in left_out:
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UnsupportedModelError(
                f"no GGUF file of {type(model).__name__}: its tensor {key} has no name there"
            )
        heads = next((count for part, count in turned.items() if part in name), None)
        yield name, value if heads is None else adjacent_pairs(value, heads)
    factors = _frequency_factors(model)
    if factors is not None:
        if not family.frequency_factors:
            raise UnsupportedModelError(
                f"no GGUF file of {type(model).__name__} with scaled rotary frequencies: llama.cpp"
                " reads none in this family"
            )
        yield "rope_freqs.weight", factors


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


def _describe(writer: Any, model: Any, types: FileTypes) -> None:
    """Metadata of the file. Layers with a window see all tokens in llama.cpp, so the context ends
    with it.
    """
    gguf = require_gguf()
    config = model.config
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
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{types.layers.upper()}"])
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    writer.add_tokenizer_model("no_vocab")
