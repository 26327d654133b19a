"""Which kernels run what of a model."""

from __future__ import annotations

from pathlib import Path

import pytest

import spikellm
from conftest import first_blocks
from spikellm.models.kernel_summary import summarize_kernels
from spikellm.nn.rotation import rotations


def test_every_coded_part_and_rotation_counts(
    text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = first_blocks(1)
    settings = [
        "transforms=[{name: online-rotation, layers: [down]}]",
        "attention={query: {bits: 4}, key: {bits: 4}, value: {bits: 4}, probabilities: {bits: 8},"
        " rotate: true}",
    ]
    spikellm.convert(
        model, tokenizer, "w4a4-t2", str(text_file), samples=2, seqlen=32, settings=settings
    )
    monkeypatch.setenv("SPIKELLM_KERNELS", "torch")
    found = summarize_kernels(model)
    assert {one.backend for one in found} == {"torch"}
    # seven layers, the rotation before one; Q, K, V, probabilities, the rotation of Q and K
    assert sum(one.modules for one in found) == 7 + 1 + 4 + 1
    [probabilities] = [one for one in found if one.example.endswith(".probabilities")]
    assert (probabilities.modules, probabilities.against["native"]) == (
        1,
        "there are as many channels as keys",
    )
    for rotation in rotations(model).values():
        rotation.set_signs(rotation.signs * 0)
    assert sum(one.modules for one in summarize_kernels(model)) == 7 + 4 + 1
