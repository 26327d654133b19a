"""Coded tables of the vocabulary in a configuration."""

from __future__ import annotations

from typing import Any

from torch import nn

from spikellm.checkpoint.config import SpikeConfig, StoredVocabulary
from spikellm.core.errors import CheckpointError
from spikellm.models.families import is_linear
from spikellm.models.vocabulary import CodedVocabulary, empty_vocabulary, put_vocabulary
from spikellm.nn.vocabulary import CodedEmbedding, CodedHead, CodedTable


def stored_vocabulary(model: nn.Module) -> dict[str, Any] | None:
    """What a configuration says of a model's coded tables; None where there are none."""
    found: dict[str, Any] = {"embedding": None, "head": None, "shared": False}
    for name, module in model.named_modules():
        if isinstance(module, CodedEmbedding):
            found["embedding"] = name
        elif isinstance(module, CodedHead):
            found |= {"head": name, "shared": module.shared}
    return found if found["embedding"] or found["head"] else None


def shown_vocabulary(model: nn.Module) -> dict[str, Any] | None:
    """The same with bits and bytes of the tables."""
    found = stored_vocabulary(model)
    tables = [module for module in model.modules() if isinstance(module, CodedTable)]
    if found is None:
        return None
    size = sum(table.weight_bytes for table in tables)
    return {**found, "bits": tables[0].settings.bits, "bytes": size}


def put_stored_vocabulary(model: nn.Module, config: SpikeConfig) -> None:
    """Put the coded tables that a configuration names into a model without its weights.

    Raises:
        CheckpointError: the model or the recipe says otherwise.
    """
    settings, found = config.parsed_recipe().vocabulary, getattr(config, "vocabulary", None)
    if found is None:
        return
    stored = StoredVocabulary.model_validate(found)
    sites = CodedVocabulary(stored.embedding, stored.head, stored.shared)
    kinds = ((sites.embedding, _is_embedding), (sites.head, is_linear))
    fits = settings is not None and (not sites.shared or len(sites.modules) == 2)
    for name, fitting in kinds:
        fits &= name is None or fitting(dict(model.named_modules()).get(name, model))
    if not fits or settings is None:
        raise CheckpointError(
            f"config.json lists {', '.join(sites.modules)} as coded tables, but its recipe or the"
            " model says otherwise; the folder is damaged"
        )
    put_vocabulary(model, empty_vocabulary(model, sites, settings))


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)
