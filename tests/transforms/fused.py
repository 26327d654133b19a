"""Models with transforms applied and nothing coded."""

from __future__ import annotations

import functools
from typing import Any

import torch

from families import build
from spikellm.algorithms import algorithms
from spikellm.conversion.context import ConversionContext
from spikellm.conversion.options import RunOptions
from spikellm.conversion.plan import plan_conversion
from spikellm.models.attention_interface import can_spike, use_interface
from spikellm.recipe.load import load_recipe


def uneven(family: str) -> Any:
    """A random model with gains and biases that matter."""
    model = build(family)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(len(name))
            )
    return model


@torch.no_grad()
def fuse(model: Any, *settings: str) -> list[str]:
    """Apply the transforms that settings name to a model in place; gives notes of all blocks."""
    recipe = load_recipe("rtn-w4a4", ["adapt=true", *settings])
    if recipe.attention.spiking and can_spike(model):
        use_interface(model)
    windows = torch.randint(2, 2000, (4, 32), generator=torch.Generator().manual_seed(0))
    plan = plan_conversion(model, windows, recipe, algorithms["rtn"]())
    nobody = lambda *_, **__: None  # noqa: E731
    options = RunOptions(torch.device("cpu"), None, nobody, nobody, None, None)
    context = ConversionContext.begin(plan, options)
    context.prepare_model()
    states, notes = context.first_states(), list[str]()
    for index, module in enumerate(context.blocks.modules):
        state = context.block_state(index, states)
        context.transforms.prepare_stream(state)
        transformed = context.transforms.prepare_block(state)
        notes += transformed.notes
        states.advance(functools.partial(context.runner.forward, index, module))
    return notes
