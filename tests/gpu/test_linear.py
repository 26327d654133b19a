"""Linear layers under Triton's interpreter, on the CPU (`make test-triton`): the same codes as in
torch, and the same bits of what is summed from integers.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import spikellm
from budget import examples
from conftest import first_blocks
from interpreted import QUIET, skip_unless_interpreted, triton_kernels
from layers import coded_layers, fit
from native import additive, anew
from spikellm.kernels.base import backends, reasons, select
from spikellm.kernels.prepared import Observed
from spikellm.nn.linear import SpikingLinear
from spikellm.recipe import ActivationRecipe, LinearRecipe

skip_unless_interpreted()
pytestmark = QUIET
__all__ = ["triton_kernels"]


def both(layer: SpikingLinear, x: Tensor) -> tuple[Observed, Observed]:
    """What the kernels and the reference show of a layer."""
    spec = layer.spec()
    assert select(spec, "cpu").name == "triton", reasons(spec, "cpu")
    found, expected = (
        backends[name].prepare_linear(spec, layer).observed(x) for name in ("triton", "torch")
    )
    return found, expected


def assert_same(found: Observed, expected: Observed) -> None:
    assert found.codes is not None
    assert found.baseline is not None
    assert expected.codes is not None
    assert expected.baseline is not None
    assert torch.equal(found.codes.int(), expected.codes)
    z = expected.baseline.expand_as(expected.codes)
    assert torch.equal(found.baseline.int().expand_as(z), z)
    assert found.y.dtype == expected.y.dtype
    assert torch.equal(found.y.isnan(), expected.y.isnan())
    assert torch.equal(found.y.nan_to_num(), expected.y.nan_to_num())


@given(drawn=coded_layers())
@examples(40)
def test_the_same_bits_as_torch(drawn: tuple[SpikingLinear, Tensor]) -> None:
    layer, x = drawn
    spec = layer.spec()
    reason = reasons(spec, "cpu")["triton"]
    if reason is not None:
        assert select(spec, "cpu").name == "torch"
        return
    assert_same(*both(layer, x[:20]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "recipe",
    [
        ActivationRecipe(bits=4),
        ActivationRecipe(bits=4, symmetric=True),
        ActivationRecipe(neuron="ternary", bits=2, symmetric=True),
    ],
)
def test_what_is_not_finite_stays_visible(recipe: ActivationRecipe, value: float) -> None:
    layer = fit(nn.Linear(40, 5), LinearRecipe(weights={"bits": 4}, activations=recipe))
    x = torch.randn(3, 40)
    x[1, 7] = value
    found, expected = both(layer, x)
    assert_same(found, expected)
    assert bool(found.y[1].isnan().all())
    assert not bool(found.y[[0, 2]].isnan().any())


@pytest.mark.parametrize("bits", range(2, 9))
def test_extreme_codes(bits: int) -> None:
    """The largest counts on the largest weights, in every width: counts of 255 are no signed
    bytes.
    """
    dense = nn.Linear(257, 9, bias=False)
    dense.weight.data = torch.where(torch.rand(9, 257) < 0.5, -1.0, 1.0)
    for steps in (1, 4):
        recipe = ActivationRecipe(bits=6, steps=steps)
        layer = fit(dense, LinearRecipe(weights={"bits": bits}, activations=recipe))
        layer.weight_codes.fill_(255)
        if 257 * bits % 8:  # what is beyond the last code stays zero
            layer.weight_codes[:, -1] = 2 ** (257 * bits % 8) - 1
        x = torch.ones(5, 257)
        x[:, ::2] = -1
        assert_same(*both(layer, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_types_and_shapes(tokens: int, dtype: torch.dtype) -> None:
    recipe = LinearRecipe(weights={"bits": 4}, activations=ActivationRecipe(bits=4))
    layer, x = fit(nn.Linear(70, 35), recipe), torch.randn(2, tokens, 70).to(dtype)
    found, expected = both(layer, x)
    assert found.y.shape == (2, tokens, 35)
    assert_same(found, expected)


@given(
    st.integers(2, 8),
    st.integers(1, 200),
    st.sampled_from([1, 3, 18]),
    st.sampled_from([None, 16, 50]),
    st.integers(0, 2**31),
)
@examples(20)
def test_weights_on_inputs_that_are_not_coded(
    bits: int, columns: int, tokens: int, group: int | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = {"bits": bits, "group_size": group}
    layer = fit(
        nn.Linear(columns, 37),
        LinearRecipe(weights=weights, activations=ActivationRecipe(bits=16)),
    )
    x = torch.randn(tokens, columns, generator=generator)
    found, expected = both(layer, x)
    torch.testing.assert_close(found.y, expected.y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("tokens", [1, 4, 5, 20])
def test_ternary_weights_are_exact_on_integers(tokens: int, most: int) -> None:
    """By additions up to four tokens, where all columns take one step."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(1, most + 1, (150,), generator=generator).to(torch.uint8)
    layer = additive(150, 40, steps, generator)
    layer.weight_scale.fill_(1.0)
    x = torch.randint(-9, 9, (tokens, 150), generator=generator).float()
    found, expected = both(layer, x)
    assert torch.equal(found.y, expected.y)


def test_what_it_does_not_run_goes_through_torch() -> None:
    priced = {"bits": 4, "spikes": 1.0, "train": "centered"}
    layer = fit(
        nn.Linear(20, 6),
        LinearRecipe(weights={"bits": 4}, activations=ActivationRecipe.model_validate(priced)),
    )
    assert "price" in str(reasons(layer.spec(), "cpu")["triton"])
    x = torch.randn(3, 20)
    layer.execution_mode = "stepped"
    assert "merged spikes" in str(reasons(layer.spec(), "cpu")["triton"])
    assert layer(x).shape == (3, 6)


@pytest.mark.parametrize("recipe", ["w4a4-t2", "ternary-1.0"])
def test_a_model_says_the_same(
    recipe: str, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = first_blocks()
    spikellm.convert(model, tokenizer, recipe, str(text_file), samples=2, seqlen=32)
    tokens = tokenizer("def main():\n    return", return_tensors="pt").input_ids
    with torch.no_grad():
        anew(model)
        found = model(tokens).logits
        monkeypatch.setenv("SPIKELLM_KERNELS", "torch")
        anew(model)
        expected = model(tokens).logits
    if recipe == "w4a4-t2":
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected)
