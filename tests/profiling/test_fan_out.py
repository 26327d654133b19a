from __future__ import annotations

import pytest
import torch

from layers import fit
from spikellm.profiling.counted_layer import counted_layer
from spikellm.profiling.fan_out import count_by_column
from spikellm.recipe import ActivationRecipe, LinearRecipe


@pytest.mark.parametrize("shape", [(3, 8), (700, 16), (9, 7), (510, 8)])
def test_marks_are_counted(shape: tuple[int, int]) -> None:
    marks = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.9
    assert torch.equal(count_by_column(marks), marks.sum(0))


def test_weights_of_zero_are_no_synapses_and_written_layers_are_counted_anew() -> None:
    recipe = LinearRecipe(weights={"bits": 4}, activations=ActivationRecipe(bits=4))
    dense = torch.nn.Linear(12, 5)
    dense.weight.data[:2, :3] = 0
    layer = fit(dense, recipe)
    found = counted_layer(layer).reach
    assert counted_layer(layer) is counted_layer(layer), "found once"
    expected = (layer.integer_weights() != 0).sum(0)
    assert torch.equal(found, expected.unsqueeze(1))
    assert int(found.sum()) < 60
    with torch.no_grad():
        layer.weight_zero.add_(1)
    written = counted_layer(layer).reach
    assert torch.equal(written[:, 0], (layer.integer_weights() != 0).sum(0))
    assert not torch.equal(written, found)
