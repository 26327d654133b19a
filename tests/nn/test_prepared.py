"""What a module prepared dies with what it was made from."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from layers import fit
from spikellm.nn.attention import HeadShape, SpikingAttention
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.rotation import Rotation
from spikellm.quantization.affine import AffineWeights
from spikellm.recipe import ActivationRecipe, AttentionRecipe, LinearRecipe

RECIPE = LinearRecipe(
    weights={"bits": 4},
    activations=ActivationRecipe(bits=4, salient_rate=0.2, salient_steps=2, saliency="rms"),
)


def layer_and_input(seed: int = 0) -> tuple[SpikingLinear, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dense = nn.Linear(20, 6)
    nn.init.normal_(dense.weight, generator=generator)
    layer = fit(dense, RECIPE, sample=torch.randn(50, 20, generator=generator))
    return layer, torch.randn(3, 20, generator=generator)


def set_zero(layer: SpikingLinear) -> None:
    layer.weight_zero += 1


def set_scale(layer: SpikingLinear) -> None:
    layer.weight_scale = layer.weight_scale * 2


def set_bias(layer: SpikingLinear) -> None:
    layer.bias = nn.Parameter(torch.ones(6), requires_grad=False)


def set_weights(layer: SpikingLinear) -> None:
    codes = torch.randint(0, 16, (6, 20), generator=torch.Generator().manual_seed(9))
    groups = len(layer.layout().weight_groups)
    layer.set_weights(
        AffineWeights(
            codes.to(torch.uint8), torch.ones(6, groups), torch.full((6, groups), 8).byte()
        )
    )


def set_groups(layer: SpikingLinear) -> None:
    layer.set_groups(layer.channel_group.flip(0))


def load(layer: SpikingLinear) -> None:
    layer.load_state_dict(layer_and_input(seed=5)[0].state_dict())


def flip_codes_in_place(layer: SpikingLinear) -> None:
    layer.weight_codes.bitwise_xor_(1)


def scale_in_place(layer: SpikingLinear) -> None:
    layer.weight_scale.mul_(2)


def regroup_in_place(layer: SpikingLinear) -> None:
    layer.channel_group.copy_(layer.channel_group.flip(0))


def raise_bias_in_place(layer: SpikingLinear) -> None:
    assert layer.bias is not None
    layer.bias.add_(1)


def register_scale(layer: SpikingLinear) -> None:
    layer.register_buffer("weight_scale", layer.weight_scale * 2)


def register_bias(layer: SpikingLinear) -> None:
    layer.register_parameter("bias", nn.Parameter(torch.ones(6), requires_grad=False))


CHANGES = [
    set_zero,
    set_scale,
    set_bias,
    set_weights,
    set_groups,
    load,
    flip_codes_in_place,
    scale_in_place,
    regroup_in_place,
    raise_bias_in_place,
    register_scale,
    register_bias,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("choice", ["auto", "torch"])
def test_changed_state_is_seen(
    change: Callable[[SpikingLinear], None], choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPIKELLM_KERNELS", choice)
    layer, x = layer_and_input()
    before = layer(x)
    kept = layer._kernels
    assert layer(x) is not None
    assert layer._kernels is kept, "prepared once"
    change(layer)
    fresh = SpikingLinear(20, 6, RECIPE)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), fresh(x))
    assert not torch.equal(layer(x), before)


def test_moving_and_modes_prepare_anew() -> None:
    layer, x = layer_and_input()
    layer(x)
    layer.to(torch.bfloat16)
    assert layer._kernels is None
    assert layer.weight_scale.dtype == torch.float32
    merged = layer(x)
    layer.execution_mode = "binary"
    assert layer._kernels is None
    assert torch.equal(layer(x), merged)


def test_a_bias_of_a_short_type_is_read_anew() -> None:
    layer, x = layer_and_input()
    layer.to(torch.bfloat16)
    before = layer(x)
    assert layer.bias is not None
    layer.bias.add_(1)
    changed = layer(x)
    assert not torch.equal(changed, before)
    layer.bias.data.add_(1)
    layer.forget()  # what is written past torch's count is not seen
    assert not torch.equal(layer(x), changed)


def test_tensors_made_in_inference_mode_run() -> None:
    with torch.inference_mode():
        layer, x = layer_and_input()
        before = layer(x)
        assert torch.equal(layer(x), before)
        layer.set_groups(layer.channel_group.flip(0))
        assert not torch.equal(layer(x), before)
    assert layer(x).shape == before.shape


def test_a_rotation_sees_signs_written_in_place() -> None:
    rotation, x = Rotation.of(torch.ones(8, dtype=torch.uint8)), torch.randn(3, 8)
    before = rotation(x)
    rotation.signs.zero_()
    assert rotation(x) is x
    rotation.signs.fill_(2)
    assert torch.equal(rotation(x), -before)


def test_copies_prepare_their_own() -> None:
    layer, x = layer_and_input()
    before = layer(x)
    for other in (copy.copy(layer), copy.deepcopy(layer)):
        assert other._kernels is None
        other.bias = nn.Parameter(torch.full((6,), 7.0), requires_grad=False)
        assert not torch.equal(other(x), before)
    assert torch.equal(layer(x), before)


def test_the_environment_is_read_when_kernels_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_and_input()
    expected = layer(x)
    monkeypatch.setenv("SPIKELLM_KERNELS", "no such kernels")
    assert torch.equal(layer(x), expected), "nothing is looked up per call"


def test_attention_codes_with_its_own_groups() -> None:
    spikes = ActivationRecipe(
        bits=4, salient_rate=0.3, salient_steps=2, saliency="rms", thresholds="shared"
    )
    settings = AttentionRecipe(
        query=ActivationRecipe(bits=4), key=spikes, value=spikes, center=True
    )
    module = SpikingAttention(HeadShape(2, 10, 10), settings)
    key, value = torch.randn(2, 1, 2, 5, 10)
    before = module.code_key_value(key, value)
    group = torch.zeros(2, 10, dtype=torch.uint8)
    group[:, :3] = 1
    module.set_groups(group, group)
    changed = module.code_key_value(key, value)
    assert not torch.equal(changed[0], before[0])
    module.key_group.zero_()
    assert torch.equal(module.code_key_value(key, value)[0], before[0]), "written in place"
    module.key_group = group
    assert torch.equal(module.code_key_value(key, value)[0], changed[0])
    module.key_group = torch.zeros(2, 10, dtype=torch.uint8)
    assert torch.equal(module.code_key_value(key, value)[0], before[0])
    assert torch.equal(module.to(torch.bfloat16).key_mean, torch.zeros(2, 10))
    assert module.key_mean.dtype == torch.float32
