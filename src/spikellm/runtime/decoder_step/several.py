"""The next token of several generations at once, each with a cache of its own: they may be of any
length, and come and go without a row being moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from spikellm.models.attention_interface import observed
from spikellm.models.growing_cache import make_growing
from spikellm.runtime.decoder_step.hook import MOST_TOKENS, step_state
from spikellm.runtime.decoder_step.step import DecoderStep


@torch.no_grad()
def decode_each(model: Any, tokens: Sequence[int], caches: Sequence[Cache]) -> Tensor:
    """Logits behind one new token of each generation; the tokens are cached.

    All of them are one native step where the model has one, which reads the weights once and gives
    each generation what it would get alone; elsewhere one forward pass after the other.

    Args:
        caches: of the tokens before, filled.

    Returns:
        ``(generations, vocabulary)``.
    """
    rows: list[Tensor] = []
    while len(rows) < len(caches):
        first = len(rows)
        step = _step_of(model)
        taken = caches[first : first + (MOST_TOKENS if step else 1)]
        own = torch.tensor(tokens[first : first + len(taken)]).unsqueeze(1)
        if step is None or any(make_growing(cache) is not None for cache in taken):
            device = next(model.parameters()).device
            found = model(own[:1].to(device), past_key_values=caches[first], logits_to_keep=1)
            rows.append(found.logits[0, -1])
            continue
        positions = torch.tensor([[cache.get_seq_length()] for cache in taken])
        rows.extend(step.run_each(own, positions, taken)[:, -1])
    return torch.stack(rows)


def decodes_together(model: Any) -> bool:
    """Whether several generations are one step; known once one of them has decoded a token."""
    return _step_of(model) is not None


def _step_of(model: Any) -> DecoderStep | None:
    state = step_state(model)
    if state is None or observed():
        return None
    state.forget_if_changed(continues=True)
    return state.step
