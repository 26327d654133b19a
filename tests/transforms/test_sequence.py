"""A list of transforms: order, what is done once, and a check of everything that is fused."""

from __future__ import annotations

import functools
from typing import Any, Literal

import pytest
import torch

from families import build
from spikellm.conversion.block_runner import BlockRunner
from spikellm.core.errors import RequestError, UnsupportedModelError
from spikellm.data.shards import shard_windows
from spikellm.models.families import find_blocks
from spikellm.models.plan import plan_blocks
from spikellm.observers.activation_store import ActivationStore
from spikellm.recipe.base import TransformOptions
from spikellm.recipe.load import load_recipe
from spikellm.transforms import Transform, transforms, transforms_of
from spikellm.transforms.block_state import BlockState
from spikellm.transforms.sequence import TransformSequence


class ScaleOptions(TransformOptions):
    name: Literal["scale-up-down"] = "scale-up-down"
    down: float = 0.5


class Scale(Transform[ScaleOptions]):
    """Doubles what up gives; the function stays only if down halves it."""

    Options = ScaleOptions

    def __init__(self, options: ScaleOptions) -> None:
        super().__init__(options)
        self.seen: list[torch.Size] = []

    def observes(self, state: BlockState) -> list[str]:
        return ["down"]

    def prepare_block(self, state: BlockState) -> None:
        self.seen.append(state.inputs["down"].shape)
        state.fusion.rows(state.roles["up"], lambda x: x * 2)
        state.fusion.columns(state.roles["down"], lambda x: x * self.options.down)
        state.notes.append("scaled")


def first_block(model: Any) -> BlockState:
    recipe, blocks = load_recipe("rtn-w4a4"), find_blocks(model)
    windows = torch.randint(2, 2000, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        runner = BlockRunner(model, blocks, windows, {1})
        states = ActivationStore(runner.first_inputs())
    return BlockState(
        plan_blocks(model, blocks, recipe)[0],
        blocks.modules[0],
        states,
        functools.partial(runner.forward, 0),
        shard_windows(windows, 2),
        recipe,
    )


@torch.no_grad()
def test_what_is_fused_is_done_once_and_changes_nothing() -> None:
    model, scale = build("llama"), Scale(ScaleOptions())
    state, sequence = first_block(model), TransformSequence([scale])
    up = model.model.layers[0].mlp.up_proj.weight.clone()
    expected = state.forward(state.module, state.hidden)
    found = sequence.prepare_block(state)
    assert sequence.prepare_block(state) is found
    assert scale.seen == [(32, 52)]
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, 2 * up)
    assert torch.allclose(state.forward(state.module, state.hidden), expected, atol=1e-6)
    assert (found.notes, found.modules, found.dense, found.rotated) == (["scaled"], {}, {}, {})


@torch.no_grad()
def test_a_transform_that_changes_the_function_is_refused_by_name() -> None:
    model = build("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sequence = TransformSequence([Scale(ScaleOptions(down=0.6))])
    with pytest.raises(UnsupportedModelError, match="leave scale-up-down out of the recipe"):
        sequence.prepare_block(first_block(model))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_no_transform_needs_nothing() -> None:
    sequence = TransformSequence([])
    assert not sequence.active
    assert sequence.batch_sizes() == set()
    state = first_block(build("llama"))
    assert sequence.prepare_block(state).notes == []
    assert state.inputs == {}


def test_the_list_of_a_recipe_is_in_order() -> None:
    parts = transforms_of(load_recipe("best-w4a4"))
    assert [part.options.name for part in parts] == [
        "norm-equalization",
        "value-centering",
        "equalization",
        "value-output-rotation",
        "online-rotation",
    ]
    assert transforms_of(load_recipe("rtn-w4a4")) == []
    assert {part.options.name for part in parts} <= set(transforms.names())
    with pytest.raises(RequestError, match="unknown transform 'residual', did you mean"):
        transforms["residual"]


@pytest.mark.parametrize(
    ("settings", "sites"),
    [
        (["rotation={equalize: true, online: [down]}"], ("up-down",)),
        (["rotation={equalize: true, online: [output]}"], ("value-output",)),
        (["rotation={equalize: true, value_output: true}"], ("value-output",)),
        (
            ["rotation.equalize=true", "attention={key: {bits: 4}, value: {bits: 4}}"],
            ("query-key",),
        ),
    ],
)
def test_scales_stand_where_something_is_rotated_or_coded(
    settings: list[str], sites: tuple[str, ...]
) -> None:
    assert transforms_of(load_recipe("rtn-w4a4", settings))[0].options.sites == sites


def test_the_key_of_a_stream_names_what_its_bits_depend_on() -> None:
    def key(*settings: str, surveyed: bool = False) -> str:
        recipe = load_recipe("rtn-w4a4", list(settings))
        return TransformSequence(transforms_of(recipe)).stream_key(recipe, surveyed=surveyed)

    fused, residual = "rotation.value_output=true", "rotation.residual=true"
    assert key() == key("seed=7") == key(fused) == key(surveyed=True) == ""
    assert key(residual) != key()
    assert key(residual) != key(residual, "seed=7")
    assert key(residual) == key(residual, "weights.bits=3")
    assert key(fused, surveyed=True) != key(fused, "weights.bits=3", surveyed=True)
