"""Models whose weights another program quantized: GGUF files, and checkpoints that the model
library can turn back into floating point.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from spikellm.checkpoint.config import METHOD
from spikellm.core.errors import CheckpointError, DependencyError, UnsupportedModelError

_MAGIC = b"GGUF"
_AS_SAVED = {0: torch.float32, 1: torch.float16}  # by the file's type; others are quantized
_DEQUANTIZED = {
    "fp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
    "compressed-tensors": "CompressedTensorsConfig",
}
"""Methods whose weights the model library gives back as floating point, and its configurations."""


def is_gguf(path: Path) -> bool:
    """Whether this is a file that calls itself GGUF, or begins as one."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix.lower() == ".gguf" or file.read(len(_MAGIC)) == _MAGIC


def check_gguf(path: Path) -> torch.dtype:
    """Check that a GGUF file can be read; its tensors are all within it.

    Returns:
        The type that weights get when they are to stay as saved: float32 or float16 where the file
        holds them so, bfloat16 where they are quantized.

    Raises:
        DependencyError: the package that reads such files is not installed.
        CheckpointError: it is damaged, or no GGUF file.
    """
    if find_spec("gguf") is None:
        raise DependencyError(
            f"{path} is a GGUF file, and the gguf package is not installed; pip install"
            " 'spikellm[gguf]'"
        )
    from gguf import GGUFReader

    try:
        field = GGUFReader(path).get_field("general.file_type")
        return _AS_SAVED.get(int(field.contents()) if field else -1, torch.bfloat16)
    except Exception as error:  # whatever a damaged file makes the reader stumble over
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} cannot be read as a GGUF file ({reason}); fetch it again"
        ) from None


def read_gguf(path: Path, dtype: str | torch.dtype) -> tuple[Any, dict[str, Any], Any]:
    """The model in a GGUF file, its weights unpacked.

    Returns:
        ``(model, loading information, tokenizer)``.

    Raises:
        DependencyError, CheckpointError: see :func:`check_gguf`.
    """
    import transformers

    saved = check_gguf(path)
    folder, named = str(path.parent), {"gguf_file": path.name}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        **named,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=saved if dtype == "auto" else dtype,
        output_loading_info=True,
    )
    model.name_or_path = model.config._name_or_path = str(path)
    return as_dense(model), info, transformers.AutoTokenizer.from_pretrained(folder, **named)


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
    if method not in _DEQUANTIZED:
        raise UnsupportedModelError(
            f"weights of {where} are quantized by {method or 'a method that is not named'}, which"
            " cannot be turned back into floating point; give the model that they were made from"
        )
    kind = getattr(transformers, _DEQUANTIZED[method])
    return {"quantization_config": kind(dequantize=True)}


def as_dense(model: Any) -> Any:
    """Forget that a model was quantized, once its weights are floating point."""
    model.hf_quantizer, model.is_quantized = None, False
    model.config.__dict__.pop("quantization_config", None)
    return model
