"""Means taken away before something is coded: the function stays, family by family, and what is
coded has no mean.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fused import fuse, uneven
from torch import Tensor

import spikellm
from conftest import first_blocks
from families import FAMILIES, by_family
from spikellm.models.families import find_blocks
from spikellm.nn.rotation import Rotated, rotations

CENTERED = (
    "transforms=[value-centering,"
    " {name: online-rotation, layers: [attention-input, feedforward-input, output, down],"
    " center: true}]"
)
BALANCED = (
    "attention={query: {bits: 4}, key: {bits: 4}, value: {bits: 4}}",
    "transforms=[value-centering, {name: value-output-rotation, basis: balanced}]",
)


@pytest.mark.parametrize("family", by_family(FAMILIES))
def test_centering_changes_nothing(family: str, tokens: Tensor) -> None:
    model = uneven(family)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        notes = fuse(model, CENTERED)
        found = model(tokens, use_cache=False).logits
    assert torch.allclose(found, expected, atol=2e-3 * float(expected.abs().max()))
    offsets = [one.offset for one in rotations(model).values() if one.offset is not None]
    assert any(bool((one != 0).any()) for one in offsets) or notes, "and yet means are taken away"


@pytest.mark.parametrize("family", by_family(FAMILIES))
def test_balanced_heads_change_nothing(family: str, tokens: Tensor) -> None:
    model = uneven(family)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        before = {name: value.clone() for name, value in model.named_parameters()}
        notes = fuse(model, *BALANCED)
        found = model(tokens, use_cache=False).logits
    assert torch.allclose(found, expected, atol=2e-3 * float(expected.abs().max()))
    changed = [
        name
        for name, value in model.named_parameters()
        if name not in before or not torch.equal(value, before[name])
    ]
    assert changed or notes, "weights are others, or it is said why not"


def test_what_is_coded_has_no_mean(text_file: Path) -> None:
    means: dict[bool, list[float]] = {}
    for center in (False, True):
        model, tokenizer = first_blocks(1, dtype="float32")
        settings = [
            CENTERED.replace("center: true", f"center: {center}".lower()),
            "calibration.saliency_tokens=8192",  # all of them
        ]
        spikellm.convert(
            model, tokenizer, "rtn-w4a4", str(text_file), samples=128, seqlen=64, settings=settings
        )
        tokens = torch.tensor(tokenizer(text_file.read_text())["input_ids"][: 380 * 64])
        means[center] = _means(model, tokens.view(380, 64)[::3])
    assert len(means[True]) == 7
    assert sum(one**2 for one in means[True]) < 0.1 * sum(one**2 for one in means[False])


def _means(model: Any, tokens: Tensor) -> list[float]:
    """Length of the mean of what every layer of the first block is fed."""
    seen: list[float] = []

    def look(module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(float(arguments[0].flatten(0, -2).double().mean(0).norm()))

    block = find_blocks(model).modules[0]
    handles = [
        module.rotated_linear.register_forward_pre_hook(look)
        for module in block.modules()
        if isinstance(module, Rotated)
    ]
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def test_centered_models_reload_bit_for_bit(text_file: Path, tmp_path: Path) -> None:
    model, tokenizer = first_blocks(2)
    settings = [CENTERED, "attention={query: {bits: 4}, key: {bits: 4}, value: {bits: 4}}"]
    spikellm.convert(
        model, tokenizer, "rtn-w4a4", str(text_file), samples=4, seqlen=64, settings=settings
    )
    spikellm.save(model, tokenizer, tmp_path / "out")
    again, _ = spikellm.load(tmp_path / "out")
    tokens = torch.arange(2, 40).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)
    own, other = model.state_dict(), again.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert any(name.endswith("rotation.offset") for name in own)


def test_a_model_of_another_type_keeps_its_new_biases(text_file: Path) -> None:
    """The output layer has a bias from centering V when the block is compared in float32."""
    model, tokenizer = first_blocks(1, dtype="bfloat16")
    settings = (
        "transforms=[norm-equalization, value-centering, {name: online-rotation, layers:"
        " [attention-input], center: true}]",
    )
    done = spikellm.convert(
        model, tokenizer, "rtn-w4a4", str(text_file), samples=2, seqlen=64, settings=settings
    )
    assert not done.blocks[0].notes
    assert model.model.layers[0].self_attn.o_proj.bias is not None
