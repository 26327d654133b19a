from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import spikellm
from conftest import first_blocks
from families import build
from spikellm.core.errors import NumericalError, RequestError
from spikellm.data.shards import shard_windows
from spikellm.models.families import find_blocks, linear_layers
from spikellm.nn.execution import spiking_linears
from spikellm.observers.sensitivity import output_sensitivity


def names_of(model: Any) -> list[str]:
    blocks = find_blocks(model)
    return [
        f"{blocks.name}.{index}.{name}"
        for index, block in enumerate(blocks.modules)
        for name in linear_layers(block)
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_it_is_the_squared_gradient_of_an_offset_to_each_output(family: str) -> None:
    """Against autograd on an offset that is added to the outputs of a layer, one layer after the
    other.
    """
    model = build(family)
    windows = torch.randint(2, 2000, (3, 16), generator=torch.Generator().manual_seed(0))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    found = output_sensitivity(model, shard_windows(windows, 1), names_of(model))
    assert {
        name: parameter.requires_grad for name, parameter in model.named_parameters()
    } == required
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert not model._forward_hooks
    for name in names_of(model)[:: max(1, len(names_of(model)) // 5)]:
        total = torch.zeros_like(found[name])
        for window in windows.split(1):
            offset = torch.zeros(1, 16, len(total), requires_grad=True)
            handle = model.get_submodule(name).register_forward_hook(
                lambda m, a, output, offset=offset: output + offset
            )
            loss = (
                model(window, labels=window, use_cache=False).loss * 15
            )  # of the mean over 15 targets, the sum
            total += torch.autograd.grad(loss, offset)[0].square().sum((0, 1))
            handle.remove()
        torch.testing.assert_close(found[name], total / windows.numel(), rtol=1e-3, atol=1e-12)
        assert float(found[name].sum()) > 0


def test_gradients_that_overflow_and_memory_that_runs_out_are_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("llama")
    windows = torch.randint(2, 2000, (1, 8), generator=torch.Generator().manual_seed(0))
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.Tensor,
            "backward",
            lambda self: (_ for _ in ()).throw(torch.OutOfMemoryError("full")),
        )
        with pytest.raises(
            RequestError,
            match=(
                r"does not fit into memory; set weights\.allocation and activations\.allocation"
                r" to layer"
            ),
        ):
            output_sensitivity(model, shard_windows(windows, 1), names_of(model))
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.lm_head.weight.data[0] = torch.inf
    with pytest.raises(
        NumericalError,
        match=r"layer model\.layers\.0\..*: the gradient of the loss is NaN or infinite",
    ):
        output_sensitivity(model, shard_windows(windows, 1), names_of(model))


def test_layers_that_count_more_get_more_steps(text_file: Path) -> None:
    """With the budget over the model the sum of steps is kept, and layers differ."""
    for scope in ("layer", "model"):
        model, tokenizer = first_blocks()
        settings = (f"weights.allocation={scope}",)
        result = spikellm.convert(
            model, tokenizer, "ternary-1.4", str(text_file), samples=8, seqlen=64, settings=settings
        )
        assert result.summary.average_steps == pytest.approx(1.4, abs=0.005)
        steps = {round(layer.average_steps, 2) for layer in spiking_linears(model).values()}
        assert (len(steps) == 1) == (scope == "layer")
