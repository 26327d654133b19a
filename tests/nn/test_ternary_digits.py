"""Ternary weights stored as digits: the layer that has the same codes as planes, in less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import spikellm
from conftest import BUNDLED
from spikellm.algorithms.gptq import Target, fit_layer
from spikellm.algorithms.gptq_options import GptqOptions
from spikellm.nn.channels import Groups
from spikellm.nn.execution import set_execution_mode, spiking_linears
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.validation import validation_error
from spikellm.recipe import LinearRecipe
from spikellm.recipe.load import load_recipe

INPUTS = st.sampled_from(
    [
        {"bits": 16},
        {"bits": 3},
        {"bits": 4, "salient_rate": 0.3, "salient_steps": 2},
    ]
)


def fitted(
    inputs: int, seed: int, weights: dict[str, Any], activations: dict[str, Any] | None = None
) -> SpikingLinear:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, inputs, generator=generator)
    x = x @ torch.randn(inputs, inputs, generator=generator)
    dense = torch.nn.Linear(inputs, 6).requires_grad_(False)
    dense.weight.data = torch.randn(6, inputs, generator=generator)
    dense.bias.data = torch.randn(6, generator=generator)
    settings = LinearRecipe.model_validate(
        {"weights": {"format": "ternary", **weights}, "activations": activations or {"bits": 16}}
    )
    groups = (torch.arange(inputs) % len(settings.activations.group_steps)).to(torch.uint8)
    target = Target((x.T @ x).double())
    return fit_layer("layer", dense, settings, Groups(groups, None), target, GptqOptions())[0]


@given(
    st.sampled_from([None, 1.0, 1.4, 2.0, 3.3]),
    st.sampled_from([None, 5]),
    st.integers(1, 40),
    INPUTS,
    st.sampled_from(["auto", "torch"]),
    st.integers(0, 999),
)
def test_it_is_the_layer_that_planes_give(
    budget: float | None,
    size: int | None,
    inputs: int,
    activations: dict[str, Any],
    kernels: str,
    seed: int,
) -> None:
    weights = {"budget": budget, "group_size": size}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPIKELLM_KERNELS", kernels)
        planes, digits = (
            fitted(inputs, seed, {**weights, "packing": packing}, activations)
            for packing in ("planes", "digits")
        )
        assert torch.equal(digits.integer_weights(), planes.integer_weights())
        assert torch.equal(digits.dense_weight(), planes.dense_weight())
        x = torch.randn(4, inputs, generator=torch.Generator().manual_seed(seed))
        for form in ("merged", "stepped", "binary"):
            for layer in (planes, digits):
                set_execution_mode(layer, form)  # type: ignore[arg-type]
            assert torch.equal(digits(x), planes(x)), form
        pairs = (layer.format.planes(layer) for layer in (planes, digits))
        for one, other in zip(*pairs, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        sizes = digits.format.sizes_of(digits.state_dict())
        again = SpikingLinear(inputs, 6, digits.settings, sizes=sizes)
        again.load_state_dict(digits.state_dict())
        assert validation_error(again) is None
        set_execution_mode(again, "binary")
        assert torch.equal(again(x), digits(x))
        assert digits.average_steps == planes.average_steps
        assert digits.weight_bytes <= planes.weight_bytes


def test_bits_of_a_weight() -> None:
    layer = fitted(640, 0, {"packing": "digits", "scale_bits": 16, "group_size": 64})
    assert "column_steps" not in dict(layer.named_buffers())
    stored = 8 * (layer.get_buffer("spike_digits").nbytes + layer.weight_scale.nbytes)
    assert stored / layer.integer_weights().numel() == 1.6 + 16 / 64


@pytest.mark.parametrize(
    ("preset", "steps", "most"),
    [
        ("best-ternary-1.0", 1.0, 1.7),
        ("best-ternary-1.4", 1.4, 2.3),
        ("best-ternary-1.7", 1.7, 2.31),
    ],
)
def test_stored_bits_of_the_presets(preset: str, steps: float, most: float) -> None:
    """All that stands for the weights, of layers as small as those of an 8M model, were
    no column to take more than two steps (with three, where they gain more, it is less).
    """
    settings = load_recipe(preset).for_module("model.layers.0.mlp.up_proj")
    assert settings is not None
    stored = weights = 0
    for rows, columns, count in ((256, 256, 4), (688, 256, 2), (256, 688, 1)):
        sizes = (columns, round((steps - 1) * columns)) if steps > 1 else ()
        layer = SpikingLinear(columns, rows, settings, bias=False, sizes=sizes)
        stored += count * 8 * layer.weight_bytes
        weights += count * rows * columns
    assert most - 0.15 < stored / weights <= most


def test_damage_is_seen() -> None:
    layer = fitted(23, 0, {"packing": "digits"})
    layer.get_buffer("spike_digits")[2, 1] = 243
    assert "spike_digits holds bytes that are no digits of base 3" in str(validation_error(layer))
    layer = fitted(23, 0, {"packing": "digits", "budget": 1.4})
    layer.get_buffer("column_steps")[0] ^= 3
    assert "sizes in config.json are not those" in str(validation_error(layer))


def test_older_recipes_do_not_name_it() -> None:
    """So that their hashes, and with them resumed conversions, stay as they were."""
    saved = load_recipe("ternary-1.4").model_dump()["weights"]
    assert "packing" not in saved
    digits = load_recipe("ternary-1.4", ["weights.packing=digits"]).model_dump()["weights"]
    assert digits == {**saved, "packing": "digits"}


def test_a_model_is_resumed_saved_and_trained(
    tmp_path: Path, text_file: Path, tokens: torch.Tensor
) -> None:
    """With layers of one step, whose steps are not stored, and layers with a budget."""
    digits = "weights={format: ternary, packing: digits"
    settings = [
        f"{digits}}}",
        "algorithm.rounds=1",
        f"overrides=[{{match: '*.down_proj', {digits.replace('=', ': ')}, budget: 1.5}}}}]",
        "training={name: end-to-end, steps: 1, seqlen: 16, batch: 1, held_out: 0}",
    ]
    states = []
    for _ in range(2):
        model, tokenizer = spikellm.load(BUNDLED)
        spikellm.convert(
            model,
            tokenizer,
            "ternary-1.0",
            str(text_file),
            samples=2,
            seqlen=32,
            settings=settings,
            journal=tmp_path / "journal",
        )
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    for name, layer in spiking_linears(model).items():
        assert ("column_steps" in layer.state_dict()) == name.endswith("down_proj")
        assert "spike_digits" in layer.state_dict()
    spikellm.save(model, tokenizer, tmp_path / "out")
    again, _ = spikellm.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
