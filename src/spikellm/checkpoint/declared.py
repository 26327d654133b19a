"""Sizes that a configuration declares, against what the shards hold: compared before anything of
such a size is made. No name of a family is known here.
"""

from __future__ import annotations

import re
from itertools import chain
from typing import Any, NamedTuple

from torch import nn

from spikellm.core.errors import CheckpointError
from spikellm.core.io import leaves

_SIZES = re.compile(
    r"size|dim|embd|inner|position|embedding|hidden|width|vocab|rank|n_ctx|state", re.IGNORECASE
)
_COUNTS = re.compile(r"(layer|expert|head|block|group)s?$", re.IGNORECASE)
_NOT_SIZES = re.compile(r"theta|base|_id$|_ids$|eps|token|std|scale", re.IGNORECASE)
# Of layers, experts or heads, which are cheap to make without weights; some names do not say how
# many there are.
_FREE_COUNT = 1024
_FREE_SIZE = 1 << 24  # of a context, say, which no tensor shows
_FREE_ELEMENTS = 1 << 27  # of tables of positions and masks, which are not stored


class Held(NamedTuple):
    """How much is in the shards of a model."""

    tensors: int
    elements: int
    bytes: int


def require_bounded(config: dict[str, Any], held: Held, where: str) -> None:
    """Refuse numbers of layers beyond the number of tensors, and sizes beyond all elements there
    are: the model library makes lists and modules of so many.

    Raises:
        CheckpointError: names the key.
    """
    for place, value in leaves(
        {name: part for name, part in config.items() if name != "quantization_config"}
    ):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        key = place[-1]
        sized = not _COUNTS.search(key)
        if sized and (_NOT_SIZES.search(key) or not _SIZES.search(key)):
            continue
        most = max(_FREE_SIZE, held.elements) if sized else max(_FREE_COUNT, held.tensors)
        if not abs(value) <= most:
            there = f"{held.elements:,} numbers" if sized else f"{held.tensors:,} tensors"
            raise CheckpointError(
                f"{where} declares {key} {str(value)[:30]}, and the shards hold {there}; the folder"
                " is damaged"
            )


def require_held(model: nn.Module, held: Held, where: str, *, packed: bool = False) -> None:
    """Refuse a model, still without memory, that is far larger than what the shards hold.

    ``packed`` where a byte may hold eight weights.

    Raises:
        CheckpointError: says both sizes.
    """
    needed = sum(
        tensor.numel()
        for tensor in {
            id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())
        }.values()
    )
    most = (8 * held.bytes if packed else 2 * held.elements) + _FREE_ELEMENTS
    if needed > most:
        raise CheckpointError(
            f"weights of {where} do not fit its configuration: it declares {needed:,} numbers, the"
            f" shards hold {held.elements:,}; restore the folder or convert again"
        )
