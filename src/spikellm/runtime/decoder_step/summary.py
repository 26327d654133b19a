"""How a model decodes, in words."""

from __future__ import annotations

from typing import Any

import torch

from spikellm.models.attention_interface import observed
from spikellm.runtime.decoder_step.hook import StepState, step_state

NATIVE = "native"


def step_in_words(model: Any) -> str:
    """``native`` where a model decodes in native steps, else why it does not; as far as that is
    known before a first token.
    """
    state = step_state(model)
    if state is None:
        return "the model library's: the model is not converted"
    if state.step is not None:
        return NATIVE
    return f"the model library's: {state.reason or 'nothing was decoded yet'}"


@torch.no_grad()
def tried_step(model: Any) -> str:
    """The same after decoding a token."""
    state = step_state(model)
    if isinstance(state, StepState) and state.step is None and not observed():
        device = next(model.parameters()).device
        tokens = torch.zeros(1, 3, dtype=torch.long, device=device)
        filled = model(tokens, use_cache=True).past_key_values
        if filled is None:
            return "the model library's: it keeps no cache"
        model(tokens[:, :1], past_key_values=filled, use_cache=True)
    return step_in_words(model)
