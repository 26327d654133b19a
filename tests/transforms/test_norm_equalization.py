"""Gains of norms equalized with the layers that read them: the function stays, family by family."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from families import FAMILIES, build, by_family
from spikellm.conversion.block_runner import BlockRunner
from spikellm.data.shards import shard_windows
from spikellm.models.families import find_blocks
from spikellm.models.plan import plan_blocks
from spikellm.observers.activation_store import ActivationStore
from spikellm.recipe.load import load_recipe
from spikellm.transforms import ModelState, transforms_of
from spikellm.transforms.block_state import BlockState
from spikellm.transforms.sequence import TransformSequence

STAYS = {"codegen", "gptj", "olmo", "olmo2", "openai_gpt"}
"""Families whose norms have no gain, feed no linear layer, or feed more than linear layers that are
known.
"""


@torch.no_grad()
def equalized(model: Any) -> list[str]:
    """Transform all blocks, code nothing; gives the notes."""
    recipe = load_recipe("rtn-w4a4", ["transforms=[norm-equalization]"])
    windows = torch.randint(2, 2000, (2, 16), generator=torch.Generator().manual_seed(0))
    blocks, shard = find_blocks(model), shard_windows(windows, len(windows))
    runner = BlockRunner(model, blocks, windows, {1})
    sequence = TransformSequence(transforms_of(recipe))
    sequence.insert(ModelState(model, blocks, recipe, windows[:1]))
    states, notes = ActivationStore(runner.first_inputs()), []
    for index, plan in enumerate(plan_blocks(model, blocks, recipe)):
        block, forward = blocks.modules[index], functools.partial(runner.forward, index)
        state = BlockState(plan, block, states, forward, shard, recipe)
        notes += sequence.prepare_block(state).notes
        states.advance(functools.partial(forward, block))
    return notes


@pytest.mark.parametrize("family", by_family(FAMILIES))
def test_equalized_norms_change_nothing(family: str, tokens: torch.Tensor) -> None:
    model = build(family)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # gains and biases that matter
            parameter.data += 0.3 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(len(name))
            )
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        before = {name: value.clone() for name, value in model.named_parameters()}
        notes = equalized(model)
        found = model(tokens, use_cache=False).logits
    assert torch.allclose(found, expected, atol=2e-3 * float(expected.abs().max()))
    changed = [name for name, value in model.named_parameters() if name in before]
    changed = [name for name in changed if not torch.equal(model.get_parameter(name), before[name])]
    gains = [name for name in changed if model.get_parameter(name).dim() == 1]
    assert bool(gains) == (family not in STAYS), "and yet gains are others"
    assert gains or any(note.startswith("norm-equalization: ") for note in notes), "or it is said"
