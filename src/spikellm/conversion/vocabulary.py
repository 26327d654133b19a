"""Embedding and output projection as coded tables, after everything that reads them as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from spikellm.algorithms import FittedBlock
from spikellm.conversion.record import BlockRecord, record_of
from spikellm.models.families import weight_and_bias
from spikellm.models.vocabulary import CodedVocabulary, coded_vocabulary, put_vocabulary
from spikellm.nn.vocabulary import CodedTable
from spikellm.quantization.table import code_table
from spikellm.recipe import VocabularyRecipe

_ROWS = 1 << 12  # at a time


@torch.no_grad()
def code_vocabulary(
    model: Any, sites: CodedVocabulary, settings: VocabularyRecipe
) -> list[BlockRecord]:
    """Code what is planned, in place. One record a table: the difference of its weights."""
    tables, records = dict[str, CodedTable](), []
    for name in sites.modules[:1] if sites.shared else sites.modules:
        module = model.get_submodule(name)
        weight = module.weight if name == sites.embedding else weight_and_bias(module)[0]
        table = CodedTable.like(weight, settings)
        for first in range(0, table.rows, _ROWS):
            part = weight.detach()[first : first + _ROWS]
            table.set_weights(code_table(part, settings.bits, table.groups), first)
        tables[name] = table
        modules = dict.fromkeys(sites.modules if sites.shared else [name], table)
        fitted = FittedBlock({}, notes=[f"{name}: the difference is that of its weights"])
        records.append(record_of(name, modules, _pairs(table, weight), fitted))
    put_vocabulary(model, coded_vocabulary(model, sites, tables))
    return records


def _pairs(table: CodedTable, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for rows in torch.arange(table.rows, device=weight.device).split(_ROWS):
        yield table.look_up(rows, torch.float32), weight[rows]
