"""The model that a configuration describes, without its weights, against what the shards hold: a
model that does not fit them is refused before anything of its size is made.

The model library itself says what there is to be: it builds the model on the meta device, where
tensors take no memory. What it makes one by one even there, layers and parameters, is bounded by
the number of tensors in the shards.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from spikellm.checkpoint.shards import Shards
from spikellm.core.errors import CheckpointError

_FREE_ENTRIES = 1 << 16  # of a list: cheap, and not all such numbers say how many layers there are
_FREE_PARAMETERS = 4096
_PARAMETERS = 16  # at most, for each tensor that is stored
_FREE_ELEMENTS = 1 << 27  # of tables of positions and masks, which are not stored


def require_few_layers(config: dict[str, Any], shards: Shards, where: str) -> None:
    """Refuse a number of layers, or of labels, far beyond the number of tensors: the model library
    makes lists of so many entries as soon as it reads a configuration. Keys that its class does not
    know are not looked at.

    Raises:
        CheckpointError: names the key.
    """
    most = max(_FREE_ENTRIES, len(shards.tensors))
    for key, value in _entries(config, _class_of(config)):
        if isinstance(value, (int, float)) and value > most:
            raise CheckpointError(
                f"{where} declares {key} {str(value)[:30]}, and the shards hold"
                f" {len(shards.tensors):,} tensors; the folder is damaged"
            )


def _class_of(config: dict[str, Any]) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    return CONFIG_MAPPING[kind] if isinstance(kind, str) and kind in CONFIG_MAPPING else None


def _entries(config: dict[str, Any], known: Any) -> Iterator[tuple[str, Any]]:
    mapped = getattr(known, "attribute_map", {}).get("num_hidden_layers")
    own = {"num_hidden_layers", mapped, "num_labels"}
    if is_dataclass(known):
        own |= {field.name for field in fields(known) if field.name.endswith("layers")}
    yield from ((key, value) for key, value in config.items() if key in own)
    for key in getattr(known, "sub_configs", None) or ():
        if isinstance(part := config.get(key), dict):
            yield from _entries(part, _class_of(part) or known.sub_configs[key])


@contextmanager
def bounded_build(shards: Shards, where: str) -> Iterator[None]:
    """While this holds, this thread registers no more parameters than the shards may hold.

    Raises:
        CheckpointError: from the building of a model that has more.
    """
    most = _PARAMETERS * len(shards.tensors) + _FREE_PARAMETERS
    thread, count = threading.get_ident(), 0

    def on_parameter(*_: object) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > most:
            raise CheckpointError(
                f"{where} declares a model of more than {most:,} parameters, and the shards hold"
                f" {len(shards.tensors):,} tensors; the folder is damaged"
            )

    handle = register_module_parameter_registration_hook(on_parameter)
    try:
        yield
    finally:
        handle.remove()


def model_class(config: Any) -> Any:
    """The class that makes a causal language model of a configuration: the library's automatic one,
    or, where it does not know the configuration of a text model that was parted from its wrapper,
    the class that the configuration names.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    named = str((getattr(config, "architectures", None) or [""])[0])
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and named.endswith("ForCausalLM"):
        found = getattr(transformers, named, None)
        if found is not None and found.config_class is type(config):
            return found
    return transformers.AutoModelForCausalLM


def outline_of(config: Any, *, trust_remote_code: bool = False) -> Any:
    """The causal language model of a configuration as the library builds it, without memory."""
    import transformers

    keywords = {"trust_remote_code": trust_remote_code}
    kind, make = model_class(config), "from_config"
    if kind is not transformers.AutoModelForCausalLM:
        keywords, make = {}, "_from_config"
    with torch.device("meta"):
        return getattr(kind, make)(config, **keywords)


def require_outline(where: str, shards: Shards, *, trust_remote_code: bool) -> None:
    """Refuse a folder whose model, built without memory, does not fit its shards.

    Raises:
        CheckpointError: see :func:`require_fit`.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    outline = outline_of(config, trust_remote_code=trust_remote_code)
    packed = getattr(config, "quantization_config", None) is not None
    require_fit(outline, shards, where, packed=packed)


def require_fit(model: nn.Module, shards: Shards, where: str, *, packed: bool = False) -> None:
    """Refuse a model, still without memory, whose tensors are not of the sizes that the shards
    hold.

    Tensors of the same name hold the same number of elements (the library transposes some), and
    all together are at most twice those stored, as tied ones are stored once, and what is not
    stored: tables of positions, masks.

    Args:
        packed: weights are stored in another form, where a byte may hold eight of them.

    Raises:
        CheckpointError: says both sizes.
    """
    for name, tensor in () if packed else model.state_dict(keep_vars=True).items():
        stored = shards.tensors.get(name)
        if stored is not None and stored.elements != tensor.numel():
            raise CheckpointError(
                f"weights of {where} do not fit its configuration: it declares {name} of shape"
                f" {tuple(tensor.shape)}, the shards hold {stored.shape}; restore the folder or"
                " convert again"
            )
    unique = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    needed = sum(tensor.numel() for tensor in unique.values())
    most = (8 * shards.bytes if packed else 2 * shards.elements) + _FREE_ELEMENTS
    if needed > most:
        raise CheckpointError(
            f"weights of {where} do not fit its configuration: it declares {needed:,} numbers, the"
            f" shards hold {shards.elements:,}; restore the folder or convert again"
        )
