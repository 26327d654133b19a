from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from budget import examples
from layers import fit
from native import best_level, both, forget, needs_compiler, runs_on
from spikellm.kernels import RowSpec, select
from spikellm.kernels.native import build
from spikellm.kernels.native.weight_only import MOST_TOKENS
from spikellm.nn.linear import SpikingLinear
from spikellm.recipe import ActivationRecipe, LinearRecipe

pytestmark = pytest.mark.usefixtures("native_kernels")


@st.composite
def layers(draw: st.DrawFn) -> SpikingLinear:
    """Integer weights of every width, inputs that are not coded."""
    columns, outputs = draw(st.integers(1, 300)), draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    several = (
        {"salient_rate": 0.2, "salient_steps": draw(st.integers(2, 3)), "saliency": "rms"}
        if draw(st.booleans())
        else {}
    )
    weights = {
        "bits": draw(st.integers(2, 6 if several else 8)),
        "symmetric": draw(st.booleans()),
        **(several or {"group_size": draw(st.sampled_from([None, 16, 64, 100]))}),
    }
    dense = nn.Linear(columns, outputs, bias=draw(st.booleans()))
    for parameter in dense.parameters():
        nn.init.normal_(parameter, generator=generator)
    return fit(
        dense,
        LinearRecipe(weights=weights, activations=ActivationRecipe(bits=16)),
        sample=torch.randn(40, columns, generator=generator),
    )


def inputs(layer: SpikingLinear, tokens: int, *, whole: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    if whole:
        return torch.randint(-60, 60, (tokens, layer.in_features), generator=generator).float()
    return torch.randn(tokens, layer.in_features, generator=generator)


@needs_compiler
@given(layers(), st.integers(0, MOST_TOKENS + 9))
def test_sums_are_those_of_torch(layer: SpikingLinear, tokens: int) -> None:
    if layer.spec().weight_bits > 8:
        assert runs_on(layer) == "torch"
        return
    found, expected = both(layer, inputs(layer, tokens, whole=True))
    if layer.weight_scale.shape[1] == 1:
        assert torch.equal(found, expected), "sums of integers are exact in any order"
    x = inputs(layer, tokens)
    found, expected = both(layer, x)
    added = 0.0 if layer.bias is None else layer.bias.abs()
    most = x.abs() @ layer.dense_weight().abs().T + added + 1e-6
    assert bool(((found - expected).abs() <= 1e-6 * most).all())
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(layer(x.view(1, *x.shape))[0], layer(x))


@needs_compiler
@examples(20)
@given(layers(), st.integers(1, MOST_TOKENS))
def test_the_same_bits_on_every_level_and_for_every_number_of_threads(
    layer: SpikingLinear, tokens: int
) -> None:
    if layer.spec().weight_bits > 8:
        return
    x, found, threads = inputs(layer, tokens), [], torch.get_num_threads()
    try:
        for level in build.LEVELS[: best_level() + 1]:
            os.environ["SPIKELLM_KERNELS_LEVEL"] = level
            forget()
            for count in (1, 3):
                torch.set_num_threads(count)
                layer.forget()
                found.append(layer(x))
            assert build.level_of(build.load_library()) == level
    finally:
        torch.set_num_threads(threads)
        os.environ.pop("SPIKELLM_KERNELS_LEVEL", None)
        forget()
    assert all(torch.equal(found[0], one) for one in found[1:])
    assert torch.equal(found[0][-1], layer(x[-1:])[0]), "a token does not depend on the others"


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [3, MOST_TOKENS + 1])
def test_what_is_not_finite_stays_visible(value: float, tokens: int) -> None:
    for bits in (2, 3, 4, 6, 8):
        layer = fit(
            nn.Linear(70, 5),
            LinearRecipe(weights={"bits": bits}, activations=ActivationRecipe(bits=16)),
        )
        x = torch.randn(tokens, 70)
        x[1, 7] = value
        found = layer(x)
        assert not bool(found[1].isfinite().any())
        assert bool(found[[0, 2]].isfinite().all())


@needs_compiler
@given(layers(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_rows_that_are_looked_up_are_those_of_torch(
    layer: SpikingLinear, dtype: torch.dtype
) -> None:
    spec = RowSpec(layer.spec())
    if spec.weights.weight_bits > 8:
        return
    asked = torch.randint(0, layer.out_features, (2, 5))
    found = {}
    for name in ("native", "torch"):
        os.environ["SPIKELLM_KERNELS"] = name
        try:
            backend = select(spec, "cpu")
            assert backend.name == name
            rows = backend.prepare_rows(spec, layer)
            found[name] = rows(asked, dtype)
            for beyond in (-1, layer.out_features):
                with pytest.raises(IndexError):
                    rows(torch.tensor([0, beyond]), dtype)
        finally:
            del os.environ["SPIKELLM_KERNELS"]
    assert found["native"].dtype == dtype
    assert torch.equal(found["native"], found["torch"])
    assert torch.equal(found["torch"], layer.dense_weight()[asked].to(dtype))
