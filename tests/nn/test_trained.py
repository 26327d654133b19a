"""A layer that is trained computes what it computes otherwise, and its gradients are those of the
values that its codes stand for.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from layers import activation_recipes, fit
from native import additive, needs_compiler
from spikellm.kernels.coding import InputCoding
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.trained import products_in
from spikellm.quantization.hadamard import mix, unmix
from spikellm.quantization.ste import share_gradient
from spikellm.recipe import ActivationRecipe, LinearRecipe


@st.composite
def layers(draw: st.DrawFn) -> tuple[SpikingLinear, Tensor]:
    """A layer of any kind whose scales and shares are trained, and inputs."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    columns, outputs = draw(st.integers(2, 60)), draw(st.integers(1, 20))
    activations = ActivationRecipe(bits=16)
    if draw(st.booleans()):
        activations = draw(activation_recipes(st.integers(2, 6), st.booleans()))
    if draw(st.booleans()):
        steps = torch.randint(1, 4, (columns,), generator=generator).to(torch.uint8)
        layer = additive(columns, outputs, steps, generator, bias=True, activations=activations)
    else:
        group = draw(st.sampled_from([None, 16]))
        settings = LinearRecipe.model_validate(
            {"weights": {"bits": 4, "group_size": group}, "activations": activations}
        )
        dense = nn.Linear(columns, outputs)
        nn.init.normal_(dense.weight, generator=generator)
        layer = fit(dense, settings, sample=torch.randn(40, columns, generator=generator))
    x = torch.randn(draw(st.integers(1, 9)), columns, generator=generator)
    if layer.neuron is not None:
        layer.share_ranges()
        layer.get_buffer("group_share").uniform_(0.5, 1.2, generator=generator)
        layer.forget()
    return layer, x


def train(layer: SpikingLinear) -> None:
    layer.weight_scale.requires_grad_()
    if layer.shares is not None:
        layer.shares.requires_grad_()
    assert layer.bias is not None
    layer.bias.requires_grad_()


@needs_compiler
@given(drawn=layers())
def test_it_computes_what_it_will_when_it_is_saved(drawn: tuple[SpikingLinear, Tensor]) -> None:
    layer, x = drawn
    with torch.no_grad():
        saved = layer(x)
    train(layer)
    trained = layer(x)
    assert trained.requires_grad
    torch.testing.assert_close(
        trained.detach(), saved, rtol=1e-4, atol=1e-4 * float(saved.abs().max())
    )
    with products_in(torch.bfloat16):
        short = layer(x).detach()
    assert layer.bias is not None
    added = x.abs() @ layer.dense_weight().detach().abs().T + layer.bias.detach().abs()
    assert float((short - saved).abs().max()) <= 0.05 * float(added.max()) + 1e-6


@given(drawn=layers())
def test_scales_and_biases_have_exact_gradients(drawn: tuple[SpikingLinear, Tensor]) -> None:
    layer, x = drawn
    before = {name: one.clone() for name, one in layer.named_buffers()}
    train(layer)
    outer = torch.randn(x.shape[0], layer.out_features, generator=torch.Generator().manual_seed(1))
    (layer(x) * outer).sum().backward()
    for name, one in layer.named_buffers():
        assert torch.equal(one, before[name]), "nothing is written"
    assert layer.bias is not None
    assert layer.bias.grad is not None
    torch.testing.assert_close(layer.bias.grad, outer.sum(0))
    # outputs are linear in scales
    scale = layer.weight_scale
    assert scale.grad is not None
    with torch.no_grad():
        gained = ((layer(x) - layer.bias) * outer).sum()
        size = ((layer(x) - layer.bias) * outer).abs().sum()
    torch.testing.assert_close(
        (scale.grad * scale).sum().detach(), gained, rtol=1e-3, atol=1e-4 * float(size)
    )


@needs_compiler
@given(drawn=layers(), short=st.booleans(), seed=st.integers(0, 10**6))
def test_native_kernels_code_as_torch_does(
    drawn: tuple[SpikingLinear, Tensor], short: bool, seed: int
) -> None:
    layer, x = drawn
    if layer.neuron is None:
        return
    spec, shares = layer.spec(), layer.shares
    assert shares is not None
    dtype = torch.bfloat16 if short else torch.float32
    x = x.to(dtype)
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    native = InputCoding(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPIKELLM_KERNELS", "torch")
        torch_ = InputCoding(spec)
    assert torch.equal(native.values(x, shares, dtype), torch_.values(x, shares, dtype))
    found, expected = (one.gradients(x, gradient, shares) for one in (native, torch_))
    assert torch.equal(found.inputs, expected.inputs)
    size = float((x.float().abs() * gradient.float().abs()).sum()) + 1e-6
    assert float((found.shares - expected.shares).abs().max()) <= 1e-4 * size


def test_a_share_moves_by_rounding_errors_and_by_the_ends() -> None:
    x, coded = torch.tensor([0.2, 0.9, -0.6]), torch.tensor([0.25, 0.5, -0.5])
    ends = torch.tensor(-1.0), torch.tensor(1.0)
    found = share_gradient(x, coded, torch.ones(3), 0.5, ends)
    torch.testing.assert_close(found, torch.tensor([0.1, 1.0, -1.0]))


@given(size=st.integers(1, 200))
def test_a_rotation_is_undone(size: int) -> None:
    x = torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    torch.testing.assert_close(unmix(mix(x)), x)
