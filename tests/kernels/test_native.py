from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import spikellm
from budget import examples
from layers import coded_layers, fit
from native import additive, anew, best_level, both, forget, needs_compiler, runs_on
from spikellm.kernels.native import build, ops
from spikellm.neurons.base import keeps
from spikellm.nn.hooks import observe_spikes
from spikellm.nn.linear import SpikingLinear
from spikellm.recipe import ActivationRecipe, LinearRecipe

pytestmark = pytest.mark.usefixtures("native_kernels")


@needs_compiler
@given(drawn=coded_layers())
@pytest.mark.parametrize("level_name", build.LEVELS)
def test_the_same_bits_as_torch(level_name: str, drawn: tuple[SpikingLinear, Tensor]) -> None:
    if build.LEVELS.index(level_name) > best_level():
        return
    layer, x = drawn
    os.environ["SPIKELLM_KERNELS_LEVEL"] = level_name
    forget()
    try:
        spec = layer.spec()
        largest = max(*spec.tops, spec.massive_top) * (2 if spec.thresholds == "signed" else 1)
        if largest > 255 or spec.weight_bits > 8 or not keeps(spec.neuron, "encode"):
            chosen = runs_on(layer)
            if largest > 255 or spec.weight_bits > 8 or spec.neuron.levels_of(1) is None:
                assert chosen == "torch"
            if chosen == "torch":
                return
        found, expected = both(layer, x)
        assert build.level_of(build.load_library()) == level_name
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    finally:
        del os.environ["SPIKELLM_KERNELS_LEVEL"]


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_visible(level: str, value: float) -> None:
    if not level:
        return
    for recipe in (
        ActivationRecipe(bits=4),
        ActivationRecipe(bits=4, symmetric=True),
        ActivationRecipe(neuron="ternary", bits=2, symmetric=True),
    ):
        layer = fit(nn.Linear(40, 5), LinearRecipe(weights={"bits": 4}, activations=recipe))
        x = torch.randn(3, 40)
        x[1, 7] = value
        found, expected = both(layer, x)
        assert torch.equal(found.isnan(), expected.isnan())
        assert bool(found[1].isnan().all())
        assert torch.equal(found[[0, 2]], expected[[0, 2]])


@needs_compiler
@pytest.mark.parametrize("level", build.LEVELS, indirect=True)
def test_extreme_codes(level: str) -> None:
    """The largest counts on the largest weights, in every width."""
    if not level:
        return
    for bits in range(2, 9):
        dense = nn.Linear(257, 9, bias=False)
        dense.weight.data = torch.where(torch.rand(9, 257) < 0.5, -1.0, 1.0)
        layer = fit(
            dense,
            LinearRecipe(weights={"bits": bits}, activations=ActivationRecipe(bits=6, steps=4)),
        )
        layer.weight_codes.fill_(255)
        if 257 * bits % 8:  # what is beyond the last code stays zero
            layer.weight_codes[:, -1] = 2 ** (257 * bits % 8) - 1
        for tokens in (6, 40):
            x = torch.ones(tokens, 257)
            x[:, ::2] = -1
            found, expected = both(layer, x)
            assert torch.equal(found, expected)


@needs_compiler
@pytest.mark.parametrize("level", build.LEVELS, indirect=True)
def test_the_largest_charges(level: str) -> None:
    """Just within 32 bits; terms of them are beyond."""
    if not level:
        return
    columns = 32_000
    recipe = LinearRecipe(weights={"bits": 8}, activations=ActivationRecipe(bits=8))
    layer = fit(nn.Linear(columns, 3, bias=False), recipe)
    layer.weight_codes.fill_(255)
    layer.weight_zero.fill_(0)
    x = torch.ones(3, columns)
    found, expected = both(layer, x)
    assert torch.equal(found, expected)
    charge = float(found[0, 0] / layer.weight_scale[0, 0] * 255)
    assert 2**30 < charge < 2**31


@needs_compiler
@given(
    st.integers(1, 90),
    st.integers(1, 140),
    st.integers(0, 6),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_additions_of_ternary_weights(
    columns: int, outputs: int, tokens: int, most: int, bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, most + 1, (columns,), generator=generator).to(torch.uint8)
    layer = additive(columns, outputs, steps, generator, bias=bias)
    whole = torch.randint(-1000, 1000, (tokens, columns), generator=generator).float()
    found, expected = both(layer, whole)
    assert torch.equal(found, expected), "sums of integers are exact in any order"
    x = torch.randn(tokens, columns, generator=generator)
    found, expected = both(layer, x)
    torch.testing.assert_close(
        found,
        expected,
        rtol=1e-5,
        atol=1e-5 * max(1.0, float(expected.abs().max()) if tokens else 1.0),
    )


@needs_compiler
@given(
    st.integers(1, 90) | st.integers(1000, 1400),
    st.integers(1, 140),
    st.sampled_from([17, 31, 32, 33, 48, 49, 530]),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_ternary_weights_of_many_tokens(
    columns: int, outputs: int, tokens: int, most: int, bias: bool, seed: int
) -> None:
    """As of few: whole numbers of more digits than a short float has, and of both types."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, most + 1, (columns,), generator=generator).to(torch.uint8)
    layer = additive(columns, outputs, steps, generator, bias=bias)
    whole = torch.randint(-3000, 3000, (tokens, columns), generator=generator).float()
    for x in (whole, whole.bfloat16()):
        found, expected = both(layer, x)
        assert torch.equal(found, expected), "sums of integers are exact in any order"
    x = torch.randn(tokens, columns, generator=generator)
    found, expected = both(layer, x)
    torch.testing.assert_close(
        found, expected, rtol=1e-5, atol=1e-5 * max(1.0, float(expected.abs().max()))
    )


@needs_compiler
def test_ternary_weights_of_many_tokens_that_are_not_finite() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = additive(40, 70, torch.ones(40, dtype=torch.uint8), generator)
    x = torch.randn(40, 40, generator=generator)
    x[3, 5], x[20, 1] = math.inf, math.nan
    found, _ = both(layer, x)
    finite = torch.ones(40, dtype=torch.bool)
    finite[[3, 20]] = False
    assert not found[~finite].isfinite().all(1).any(), "no number is made of what is none"
    assert found[finite].isfinite().all(), "and no other token is touched"


@needs_compiler
@pytest.mark.parametrize("code", ["affine", "ternary"])
def test_every_level_adds_alike(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = (
        additive(70, 80, torch.ones(70, dtype=torch.uint8), generator)
        if code == "ternary"
        else fit(nn.Linear(70, 80), LinearRecipe(activations=ActivationRecipe(bits=4)))
    )
    x, found = torch.randn(3, 70, generator=generator), []
    for name in build.LEVELS[: best_level() + 1]:
        monkeypatch.setenv("SPIKELLM_KERNELS_LEVEL", name)
        forget()
        layer.forget()
        found.append(layer(x))
    assert all(torch.equal(one, found[0]) for one in found)


@needs_compiler
@pytest.mark.parametrize("code", ["affine", "ternary"])
def test_threads_change_nothing(code: str) -> None:
    layer = (
        additive(300, 130, torch.ones(300, dtype=torch.uint8), torch.Generator().manual_seed(0))
        if code == "ternary"
        else fit(
            nn.Linear(300, 130),
            LinearRecipe(weights={"bits": 4}, activations=ActivationRecipe(bits=4)),
        )
    )
    x, before = torch.randn(20, 300), torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outputs.append(layer(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@needs_compiler
def test_operators_are_sound() -> None:
    layer = fit(
        nn.Linear(20, 6),
        LinearRecipe(weights={"bits": 4}, activations=ActivationRecipe(bits=4)),
    )
    x = torch.randn(3, 20)
    for bias in (True, False):
        if not bias:
            layer.bias = None
        layer(x)
        assert layer._kernels is not None
        torch.library.opcheck(ops.spike_linear, (x, *layer._kernels.chosen.operands, 1))
        torch.library.opcheck(ops.spike_linear, (x.bfloat16(), *layer._kernels.chosen.operands, 0))
    other = additive(20, 6, torch.ones(20, dtype=torch.uint8), torch.Generator().manual_seed(0))
    other(x)
    assert other._kernels is not None
    torch.library.opcheck(ops.additive_linear, (x, *other._kernels.chosen.operands))


@needs_compiler
@pytest.mark.parametrize(
    "kind",
    [
        {"bits": 4},
        {"bits": 3, "symmetric": True},
        {"neuron": "ternary", "bits": 2, "symmetric": True},
        {"bits": 3, "token_steps": 8, "search_range": True},
    ],
)
@pytest.mark.parametrize("thresholds", ["split", "shared", None])
def test_spikes_are_shown_to_whoever_watches(kind: dict[str, Any], thresholds: str | None) -> None:
    salient = {"salient_rate": 0.2, "salient_steps": 3, "saliency": "rms", "thresholds": thresholds}
    recipe = ActivationRecipe.model_validate(
        {**kind, "train": "centered", **(salient if thresholds else {})}
    )
    layer = fit(
        nn.Linear(40, 6),
        LinearRecipe(weights={"bits": 4}, activations=recipe),
        sample=torch.randn(50, 40),
    )
    x, seen = torch.randn(8, 40), []
    x[1] = 0
    x[2] = x[2].abs()
    x[3, 5] = torch.inf
    x[4, 5] = torch.nan
    x[5] *= 40
    with observe_spikes(seen.append):
        found, expected = both(layer, x)
    native, reference = seen[-2:]
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(native.codes, reference.codes)
    assert torch.equal(native.steps, reference.steps)
    assert torch.equal(native.fired, reference.fired)
    assert bool((native.fired[1] == 0).all()), "silent at rest"
    assert native[:2] == reference[:2]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(
    kind=st.sampled_from(["affine", "ternary"]),
    tokens=st.integers(1, 3),
    seed=st.integers(0, 2**31),
    scale=st.integers(-30, 30),
)
@examples(30)
def test_short_types_are_rounded_as_torch_does(
    dtype: torch.dtype, kind: str, tokens: int, seed: int, scale: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = (
        additive(70, 40, torch.ones(70, dtype=torch.uint8), generator, bias=True)
        if kind == "ternary"
        else fit(nn.Linear(70, 40), LinearRecipe(activations=ActivationRecipe(bits=4)))
    )
    x = (torch.randint(-99, 99, (tokens, 70), generator=generator) * 2.0**scale).to(dtype)
    found, expected = both(layer, x)
    assert found.dtype == dtype
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@needs_compiler
def test_shapes_and_strides_of_inputs() -> None:
    layer = fit(nn.Linear(20, 6), LinearRecipe(activations=ActivationRecipe(bits=4)))
    x = torch.randn(2, 3, 40)[..., ::2]
    found, expected = both(layer, x)
    assert torch.equal(found, expected)
    assert layer(x[0, 0]).shape == (6,)
    assert layer(x[:, :0]).shape == (2, 0, 6)


@needs_compiler
def test_inference_mode() -> None:
    """Tensors made there count no versions."""
    x = torch.randn(2, 20)
    with torch.inference_mode():
        layer = fit(
            nn.Linear(20, 6),
            LinearRecipe(weights={"bits": 4}, activations=ActivationRecipe(bits=4)),
        )
        assert torch.equal(*both(layer, x))


@needs_compiler
def test_compiled_models_take_torch() -> None:
    layer = fit(
        nn.Linear(20, 6),
        LinearRecipe(weights={"bits": 4}, activations=ActivationRecipe(bits=4)),
    )
    x = torch.randn(2, 20)
    layer(x)
    assert layer._kernels is not None
    taken: list[int] = []
    layer._kernels = layer._kernels._replace(reference=lambda x: taken.append(1) or x[:, :6])
    assert layer(x.clone().requires_grad_()).requires_grad
    assert not taken, "gradients pass around the coding, so kernels run"
    assert layer.bias is not None
    layer.bias.requires_grad_()
    layer(x)
    assert taken == [1], "the bias asks for its own"
    with torch.no_grad():
        layer(x)
        assert taken == [1], "nothing is recorded, so kernels run"
        layer.forget()
        compiled = torch.compile(layer, backend="eager")
        assert torch.equal(compiled(x), layer(x))


@needs_compiler
def test_a_whole_model_says_the_same_words(
    converted_folder: Path, monkeypatch: pytest.MonkeyPatch, tokens: Tensor
) -> None:
    model, tokenizer = spikellm.load(converted_folder)
    told, logits = [], []
    for choice in ("native", "torch"):
        monkeypatch.setenv("SPIKELLM_KERNELS", choice)
        anew(model)
        told.append(spikellm.generate(model, tokenizer, "Return a list of", max_new_tokens=12))
        logits.append(model(tokens).logits)
    assert told[0] == told[1]
    assert torch.equal(logits[0], logits[1])
