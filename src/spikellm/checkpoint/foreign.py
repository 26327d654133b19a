"""Models whose weights another program quantized: GGUF files, and checkpoints that the model
library can turn back into floating point.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from spikellm.checkpoint.config import METHOD
from spikellm.core.errors import CheckpointError, UnsupportedModelError
from spikellm.core.extras import require
from spikellm.core.files import exists
from spikellm.core.warn import say_once

_MAGIC = b"GGUF"
_FREQUENCIES = "rope_freqs.weight"
_TOKENIZER = "tokenizer.ggml.model"
_AS_SAVED = {0: torch.float32, 1: torch.float16}  # by the file's type; others are quantized
_DEQUANTIZED = {
    "fp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
    "compressed-tensors": "CompressedTensorsConfig",
}
"""Methods whose weights the model library gives back as floating point, and its configurations."""


def is_gguf(path: Path) -> bool:
    """Whether this is a file that calls itself GGUF, or begins as one."""
    if not exists(path) or not path.is_file():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def check_gguf(path: Path) -> torch.dtype:
    """Check that a GGUF file can be read; its tensors are all within it.

    Returns:
        The type that weights get when they are to stay as saved: float32 or float16 where the file
        holds them so, bfloat16 where they are quantized.

    Raises:
        DependencyError: the package that reads such files is not installed.
        CheckpointError: it is damaged, or no GGUF file.
        UnsupportedModelError: it scales rotary frequencies by a tensor, which the model library
            leaves out.
    """
    gguf = require("GGUF files", "gguf", "gguf")
    try:
        reader = gguf.GGUFReader(path)
        known = {name: reader.get_field(name) for name in ("general.file_type", _TOKENIZER)}
        kind, vocabulary = (field and field.contents() for field in known.values())
        scaled = any(tensor.name == _FREQUENCIES for tensor in reader.tensors)
    except Exception as error:  # whatever a damaged file makes the reader stumble over
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} cannot be read as a GGUF file ({reason}); fetch it again"
        ) from None
    if scaled:
        raise UnsupportedModelError(
            f"{path} scales rotary frequencies ({_FREQUENCIES}), which the model library does not"
            " read from GGUF files; give the folder that the file was made from"
        )
    if vocabulary in (None, "no_vocab"):
        raise CheckpointError(f"{path} holds no tokenizer; give a GGUF file that has one")
    return _AS_SAVED.get(-1 if kind is None else int(kind), torch.bfloat16)


def read_gguf(path: Path, dtype: str | torch.dtype) -> tuple[Any, dict[str, Any], Any]:
    """The model in a GGUF file, its weights unpacked.

    Returns:
        ``(model, loading information, tokenizer)``.

    Raises:
        DependencyError, CheckpointError: see :func:`check_gguf`.
    """
    import transformers

    saved, named = check_gguf(path), {"gguf_file": "model.gguf"}
    with tempfile.TemporaryDirectory() as folder:  # what lies beside the file is of other models
        (Path(folder) / named["gguf_file"]).symlink_to(path.resolve())
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            **named,
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=saved if dtype == "auto" else dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **named)
    model.name_or_path = model.config._name_or_path = tokenizer.name_or_path = str(path)
    return as_dense(model), info, tokenizer


def dequantizing(config: dict[str, Any], where: str) -> dict[str, Any]:
    """What the model library has to be told to give floating-point weights; nothing for models that
    have them, or that this package converted.

    Args:
        config: what ``config.json`` holds.
        where: the model, for messages.

    Raises:
        UnsupportedModelError: another method quantized the weights, and the library cannot undo it.
    """
    import transformers

    found = config.get("quantization_config")
    method = found.get("quant_method") if isinstance(found, dict) else None
    if found is None or method == METHOD:
        return {}
    if not isinstance(method, str) or method not in _DEQUANTIZED:
        named = method if isinstance(method, str) else "a method that config.json does not name"
        raise UnsupportedModelError(
            f"weights of {where} are quantized by {named}, which"
            " cannot be turned back into floating point; give the model that they were made from"
        )
    groups = found.get("config_groups")
    schemes = groups.values() if isinstance(groups, dict) else ()
    if any(isinstance(one, dict) and one.get("input_activations") for one in schemes):
        say_once(
            f"{where} quantizes the inputs of its layers too, which is left out here: its weights"
            " alone are read, and figures are those of a model whose inputs are whole"
        )
    kind = getattr(transformers, _DEQUANTIZED[method])
    return {"quantization_config": kind(dequantize=True)}


def as_dense(model: Any) -> Any:
    """Forget that a model was quantized, once its weights are floating point."""
    model.hf_quantizer, model.is_quantized = None, False
    model.config.__dict__.pop("quantization_config", None)
    return model
