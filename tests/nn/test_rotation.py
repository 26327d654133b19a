from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from native import needs_compiler
from spikellm.kernels.native import ops
from spikellm.nn.rotation import Rotation, layer_name, prepare_mix, rotation_of
from spikellm.quantization import hadamard


def rotation(signs: list[int]) -> Rotation:
    made = Rotation(len(signs))
    made.set_signs(torch.tensor(signs, dtype=torch.uint8))
    return made


@given(
    signs=st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=60), seed=st.integers(0, 1000)
)
def test_chosen_channels_are_rotated_among_each_other(signs: list[int], seed: int) -> None:
    x = torch.randn(
        4, len(signs), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    found, chosen = rotation(signs)(x), torch.tensor(signs) > 0
    assert torch.equal(found[:, ~chosen], x[:, ~chosen])
    if chosen.any():
        flipped = x[:, chosen] * (3 - 2 * torch.tensor(signs)[chosen]).double()
        assert torch.allclose(found[:, chosen], hadamard.mix(flipped), atol=1e-12)
    assert torch.allclose(found.norm(dim=1), x.norm(dim=1))
    half = rotation(signs)(x.bfloat16())
    assert half.dtype == torch.bfloat16


def test_without_channels_the_very_tensor_passes() -> None:
    x = torch.randn(2, 8)
    assert rotation([0] * 8)(x) is x


def test_state_travels() -> None:
    one, other = rotation([1, 2, 0, 2, 1, 1]), Rotation(6)
    x = torch.randn(3, 6)
    assert other(x) is x
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(x), one(x))
    assert one.rotated == 5
    assert one.to(torch.float16).signs.dtype == torch.uint8


def test_names() -> None:
    assert (
        layer_name("model.layers.0.mlp.down_proj.rotated_linear")
        == "model.layers.0.mlp.down_proj"
        == layer_name("model.layers.0.mlp.down_proj")
    )
    assert rotation_of("mlp.down_proj.rotated_linear") == "mlp.down_proj.rotation"


@needs_compiler
@pytest.mark.usefixtures("native_kernels")
@given(
    power=st.integers(0, 10),
    size=st.integers(1, 700),
    rows=st.integers(1, 70),
    seed=st.integers(0, 1000),
)
def test_kernel_has_the_same_bits(power: int, size: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2**power, generator=generator) * 100
    assert torch.equal(ops.mix(x), hadamard.mix(x))
    mix = prepare_mix(size, torch.device("cpu"))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        other = torch.randn(rows, size, generator=generator).to(dtype)
        assert torch.equal(mix(other), hadamard.mix(other))


def test_equal_rotations_of_one_tensor_are_computed_once() -> None:
    signs = torch.tensor([1, 2, 1, 0, 2, 1], dtype=torch.uint8)
    first, second, other = (
        Rotation.of(signs),
        Rotation.of(signs),
        Rotation.of(3 - signs.clamp(min=1)),
    )
    x = torch.randn(3, 6)
    turned = first(x)
    assert second(x) is turned
    assert torch.equal(Rotation.of(signs)(x.clone()), turned)
    assert not torch.equal(other(x), turned)
    x += 1
    assert second(x) is not turned
    assert torch.equal(second(x), Rotation.of(signs)(x.clone())), "a tensor that was written anew"


@needs_compiler
@given(
    channels=st.integers(1, 90),
    tokens=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    centered=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_one_pass_gives_the_bits_of_one_operation_after_the_other(
    channels: int, tokens: int, dtype: torch.dtype, centered: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(1, 3, (channels,), generator=generator).to(torch.uint8)
    offset = torch.randn(channels, generator=generator) if centered else None
    x = (torch.randn(2, tokens, channels, generator=generator) * 100).to(dtype)
    found = []
    for kernels in ("native", "torch"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SPIKELLM_KERNELS", kernels)
            made = Rotation(channels, centered=centered)
            made.set_signs(signs, offset)
            found.append(made(x.clone()))
    assert found[0].dtype == dtype
    assert torch.equal(*found)
