"""Which backend runs what, and why not others; a further backend is one class that registers
itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from layers import fit
from native import additive, forget, needs_compiler, runs_on
from spikellm.core.errors import DependencyError
from spikellm.kernels import Backend, LinearSpec, MixSpec, backends, describe, reasons, select
from spikellm.kernels.base import register
from spikellm.kernels.prepared import LinearWeights, Observed
from spikellm.kernels.spec import Spec
from spikellm.kernels.torch.backend import TorchBackend
from spikellm.kernels.torch.linear import TorchLinear
from spikellm.nn.head_codec import HeadCoder
from spikellm.nn.hooks import SpikeTrain, observe_spikes
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.rotation import prepare_mix
from spikellm.recipe import ActivationRecipe, LinearRecipe


def layer_of(weights: int = 4, activations: int = 4, steps: int = 1) -> SpikingLinear:
    recipe = LinearRecipe(
        weights={"bits": weights},
        activations=ActivationRecipe(bits=activations, steps=steps),
    )
    return fit(nn.Linear(20, 6), recipe)


@needs_compiler
def test_reasons_against_native() -> None:
    good = layer_of()
    assert reasons(good.spec(), "cpu") == {
        "native": None,
        "triton": "it runs on cuda, not on cpu",
        "torch": None,
    }
    assert runs_on(good) == "native"
    assert reasons(good.spec(), "cuda:1")["native"] == "it runs on cpu, not on cuda"
    assert select(good.spec(), "meta").name == "torch"
    good.execution_mode = "stepped"
    assert reasons(good.spec(), "cpu")["native"] == "it runs merged spikes, not stepped ones"
    assert reasons(layer_of(activations=16).spec(), "cpu")["native"] is None
    many = reasons(layer_of(activations=8, steps=2).spec(), "cpu")["native"]
    assert many == "spike counts up to 510 do not fit into a byte"
    ternary = additive(20, 6, torch.ones(20, dtype=torch.uint8), torch.Generator())
    assert runs_on(ternary) == "native"
    coder = HeadCoder(ActivationRecipe(bits=4), torch.zeros(2, 10, dtype=torch.uint8), "sequence")
    assert reasons(coder.spec, "cpu")["native"] == "ranges run over the sequence"


def test_what_describes_the_cpu_runs_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a machine with a GPU and no compiler."""
    monkeypatch.setattr(type(backends["triton"]), "missing", lambda self: None)
    monkeypatch.setattr(type(backends["native"]), "missing", lambda self: "no compiler")
    monkeypatch.delenv("SPIKELLM_KERNELS", raising=False)
    assert describe() == "torch (no compiler)"


@needs_compiler
def test_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIKELLM_KERNELS", "torch")
    assert select(MixSpec(8), "cpu").name == describe() == "torch"
    assert reasons(MixSpec(8), "cpu")["native"] == "SPIKELLM_KERNELS is torch"
    monkeypatch.setenv("SPIKELLM_KERNELS", "native")
    forget()
    assert select(MixSpec(8), "cpu").name == "native"
    assert runs_on(layer_of(activations=8, steps=2)) == "torch", "what native does not support"
    monkeypatch.setenv("SPIKELLM_KERNELS", "fast")
    with pytest.raises(DependencyError, match="SPIKELLM_KERNELS is 'fast'; expected auto, "):
        select(MixSpec(8), "cpu")


class Loud(TorchLinear):
    """Twice the reference."""

    def observed(self, x: Tensor) -> Observed:
        y, codes, _ = super().observed(x)
        return Observed(2 * y, codes)


class LoudBackend(TorchBackend):
    name = "loud"
    preference = 99

    def supports(self, spec: Spec) -> str | None:
        if isinstance(spec, LinearSpec) and spec.columns == 20:
            return None
        return "it takes 20 columns"

    def prepare_linear(self, spec: LinearSpec, weights: LinearWeights) -> Loud:
        return Loud(spec, weights)


@pytest.fixture
def loud() -> Iterator[Backend]:
    register(LoudBackend)
    yield backends["loud"]
    del backends._entries["loud"]


def test_a_further_backend(loud: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(), torch.randn(3, 20)
    assert select(layer.spec(), "cpu") is loud
    found = layer(x)
    assert layer._kernels is not None
    assert torch.equal(found, 2 * layer._kernels.reference(x))
    seen: list[SpikeTrain] = []
    with observe_spikes(seen.append):
        layer(x)
    expected = layer._kernels.reference.observed(x).baseline
    assert expected is not None
    assert torch.equal(seen[0].baseline, expected), "found from the inputs"
    monkeypatch.setenv("SPIKELLM_KERNELS", "torch")
    layer.forget()
    assert torch.equal(2 * layer(x), found)
    assert reasons(MixSpec(8), "cpu")["loud"] == "SPIKELLM_KERNELS is torch"


class LinearOnly(Backend):
    """Has what an abstract backend asks for, and claims more than it has."""

    name = "linear-only"
    preference = 99

    def supports(self, spec: Spec) -> str | None:
        return None

    def prepare_linear(self, spec: LinearSpec, weights: LinearWeights) -> TorchLinear:
        return TorchLinear(spec, weights)


def test_a_backend_that_supports_what_it_does_not_prepare(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(backends._entries, "linear-only", LinearOnly())
    layer, x = layer_of(), torch.randn(3, 20)
    assert layer(x).shape == (3, 6)
    with pytest.raises(DependencyError, match="'linear-only' supports MixSpec and has no prepare"):
        prepare_mix(8, torch.device("cpu"))
    coder = HeadCoder(ActivationRecipe(bits=4), torch.zeros(2, 10, dtype=torch.uint8))
    with pytest.raises(DependencyError, match="supports HeadSpec and has no prepare_heads"):
        coder.fake_quantize(torch.randn(1, 2, 3, 10))


def test_a_backend_that_is_asked_for_and_missing(
    loud: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoudBackend, "missing", lambda self: "its machine is not here")
    assert runs_on(layer_of()) != "loud"
    assert reasons(layer_of().spec(), "cpu")["loud"] == "its machine is not here"
    monkeypatch.setenv("SPIKELLM_KERNELS", "loud")
    with pytest.raises(DependencyError, match="its machine is not here"):
        layer_of()(torch.randn(1, 20))
