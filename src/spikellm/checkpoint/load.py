"""Load a model, converted or not, from a folder or the hub: strictly, and with one clear line when
it cannot be done.
"""

from __future__ import annotations

import os
import warnings
from contextlib import nullcontext
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError

from spikellm.checkpoint.config import read_config
from spikellm.checkpoint.foreign import (
    as_dense,
    check_gguf,
    dequantizing,
    is_gguf,
    read_gguf,
)
from spikellm.checkpoint.integrity import check_folder
from spikellm.checkpoint.outline import bounded_build, model_class, require_outline
from spikellm.checkpoint.shards import Shards, headers_read_once
from spikellm.core.devices import find_device
from spikellm.core.errors import (
    CheckpointError,
    DependencyError,
    RequestError,
    SpikeLLMError,
    UnsupportedModelError,
)
from spikellm.core.files import exists

_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.*.json",
    "*.model",
    "*vocab*",
    "*merges*",
    "*.tiktoken",
    "tekken.json",
)
_BYTES = 256  # tokens of the smallest tokenizers that need no file
_LONGEST_NAME = 255  # bytes; the hub allows fewer


def load(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        source: folder, GGUF file, or name on the hub.
        device: where to put the model; the CPU by default.
        dtype: type of what is not converted; ``"auto"`` as saved.
        trust_remote_code: run Python code that comes with the model.

    Returns:
        ``(model, tokenizer)``, the model in evaluation mode.

    Raises:
        RequestError: no such folder or device, or not a model.
        CheckpointError: incomplete or damaged.
        DependencyError: the hub cannot be reached.
        UnsupportedModelError: not a causal language model, or its weights are quantized in a way
            that cannot be undone.
    """
    place = find_device(device or "cpu")
    where = str(source)
    local = exists(Path(where))
    named_gguf = where.lower().endswith(".gguf")
    if not local and (_is_path(source) or named_gguf):
        kind = "file" if named_gguf else "folder"
        raise RequestError(
            f"{kind} {where} does not exist; give a model folder, a GGUF file, or a hub name such"
            " as 'organisation/model'"
        )
    with headers_read_once():
        alone = is_gguf(Path(where))
        shards = check_folder(Path(where)) if local and not alone else None
        try:
            if alone:
                model, info, tokenizer = read_gguf(Path(where), dtype)
            else:
                with bounded_build(shards, where) if shards else nullcontext():
                    model, info = _read_model(
                        where, shards, dtype, trust_remote_code=trust_remote_code
                    )
                tokenizer = _tokenizer(where, local=local, trust_remote_code=trust_remote_code)
        except SpikeLLMError:
            raise
        except (SafetensorError, EOFError) as error:
            raise CheckpointError(f"weights of {where} cannot be read: {_line(error)}") from None
        except (
            Exception
        ) as error:  # whatever a damaged configuration makes the library stumble over
            raise _explain(where, local, error) from None
    dense = alone or bool(info.get("dequantized"))
    _require_complete(where, info, strict=dense or getattr(model, "is_quantized", False))
    return model.to(place).eval(), tokenizer


def require_model(source: str) -> None:
    """Look whether there is a model in a folder or on the hub, without loading it.

    Raises:
        RequestError: it is here, and no model.
        CheckpointError: it is here, and damaged.
        DependencyError: it is not here, and the hub has no such model or cannot be reached.
    """
    from transformers.utils import cached_file

    if is_gguf(Path(source)):
        check_gguf(Path(source))
        return
    if exists(Path(source)):
        check_folder(Path(source))
        return
    try:
        cached_file(source, "config.json")
    except (OSError, ValueError) as error:
        raise _not_on_hub(source, str(error)) from None


def _read_model(
    where: str, shards: Shards | None, dtype: str | torch.dtype, *, trust_remote_code: bool
) -> tuple[Any, dict[str, Any]]:
    import transformers

    import spikellm.checkpoint.save  # noqa: F401  registers the format

    if shards and read_config(Path(where)) is None:  # of a converted model see ``SpikeQuantizer``
        require_outline(where, shards, trust_remote_code=trust_remote_code)
    saved, _ = transformers.PretrainedConfig.get_config_dict(where)
    dense = dequantizing(saved, where)
    kind = transformers.AutoModelForCausalLM
    if shards and not trust_remote_code:
        kind = model_class(transformers.AutoConfig.from_pretrained(where))
    with warnings.catch_warnings():
        # It takes the saved settings, and from ours that weights are to be dequantized.
        warnings.filterwarnings("ignore", "You passed `quantization_config`", UserWarning)
        found: tuple[Any, dict[str, Any]] = kind.from_pretrained(
            where,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            **dense,
        )
    return (as_dense(found[0]), {**found[1], "dequantized": True}) if dense else found


def _require_complete(where: str, info: dict[str, Any], *, strict: bool) -> None:
    """Refuse what lacks tensors or has others; ``strict``: what has more, too."""
    problems = [
        f"{kind.split('_')[0]} {sorted(map(str, info[kind]))[0]}"
        for kind in ("missing_keys", "mismatched_keys")
        if info.get(kind)
    ]
    unexpected = sorted(info.get("unexpected_keys") or ())
    if problems or (unexpected and strict):
        problems += [f"unexpected {key}" for key in unexpected[:1]]
        raise CheckpointError(
            f"weights of {where} do not fit its configuration ({'; '.join(problems)}); restore it,"
            " or make it again"
        )


def _tokenizer(where: str, *, local: bool, trust_remote_code: bool) -> Any:
    import transformers

    unnamed = local and not any(next(Path(where).glob(pattern), None) for pattern in _VOCABULARIES)
    lacking = CheckpointError(
        f"{where} has no tokenizer.json (nor another vocabulary); copy the tokenizer's files there"
    )
    try:
        found = transformers.AutoTokenizer.from_pretrained(
            where, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise lacking if unnamed and "trust_remote_code" not in str(error) else error from None
    if unnamed and len(found) < _BYTES:
        raise lacking  # the library makes one of three words up
    return found


def _is_path(source: str | Path) -> bool:
    text = str(source)
    written = (
        text.startswith((".", "/", "~"))
        or text.endswith("/")
        or text.count("/") > 1
        or "\\" in text
    )
    return isinstance(source, Path) or written or len(os.fsencode(text)) > _LONGEST_NAME


def _not_on_hub(where: str, text: str) -> DependencyError:
    reason = shorten(text, 100, placeholder="…")
    return DependencyError(
        f"{where!r} is no folder here, and the hub could not give it ({reason}); give the path of a"
        " local model folder instead"
    )


def _explain(where: str, local: bool, error: Exception) -> SpikeLLMError:
    text = _line(error)
    if "trust_remote_code" in text:
        return RequestError(
            f"{where} brings its own Python code, which is run only with --trust-remote-code; read"
            " it first"
        )
    if not local and isinstance(error, OSError):
        return _not_on_hub(where, text)
    if (
        "Unrecognized configuration class" in text
        or "does not recognize this architecture" in text
        or "Unrecognized model" in text
    ):
        return UnsupportedModelError(
            f"{where} is not a causal language model that the installed transformers knows"
            f" ({text[:160]})"
        )
    return CheckpointError(f"{where} cannot be loaded: {text[:300]}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
