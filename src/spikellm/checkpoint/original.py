"""The model that another was converted from, loaded again beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spikellm.checkpoint.config import read_config
from spikellm.checkpoint.load import load
from spikellm.checkpoint.save import spike_config
from spikellm.conversion.fingerprint import model_fingerprint
from spikellm.core.errors import RequestError


def original_of(
    model: Any, original: Any | str | Path | None, *, trust_remote_code: bool = False
) -> Any:
    """The original of a converted model, in evaluation mode.

    Args:
        original: folder, GGUF file or hub name, or the model itself; None for where the
            converted one was loaded from before its conversion.

    Raises:
        RequestError: it is another model, or nobody says where it is.
    """
    config = spike_config(model)
    found: Any = original
    where = "original"
    if original is None or isinstance(original, (str, Path)):
        where = str(original or getattr(model.config, "_name_or_path", ""))
        if not where or (original is None and read_config(Path(where)) is not None):
            raise RequestError(
                "the original is needed, and a converted model does not say where it is; give what"
                " it was converted from (--original, original=)"
            )
        found, _ = load(where, trust_remote_code=trust_remote_code)
    if found is model or spike_config(found) is not None:
        raise RequestError(f"{where} is a converted model; expected the one it was converted from")
    for key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        theirs, own = (getattr(one.config.get_text_config(), key, None) for one in (found, model))
        if theirs != own:
            raise RequestError(
                f"{where} has {key} {theirs}, the converted model {own}; give the model that it"
                " was converted from"
            )
    expected = "" if config is None else str((config.record or {}).get("model", ""))
    if expected and model_fingerprint(found) != expected:
        raise RequestError(
            f"{where} has the shape of the model that was converted, but other weights or another"
            " number type; give the very same"
        )
    return found.eval()
