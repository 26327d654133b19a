from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from budget import examples
from layers import fit
from spikellm.core.errors import CheckpointError, DependencyError
from spikellm.export.nir import layer_graph, not_expressed, segment_weights, write_graph
from spikellm.export.nir_simulation import read_graph, run_graph, run_graph_to_values
from spikellm.models.rounding import fit_layer
from spikellm.nn.channels import Groups
from spikellm.nn.clusters import clusters_of
from spikellm.nn.constant_thresholds import constant_thresholds
from spikellm.nn.linear import SpikingLinear
from spikellm.profiling.population import layer_population
from spikellm.recipe import ActivationRecipe, LinearRecipe


def layer(
    seed: int = 0, columns: int = 11, *, signed: bool = False, rate: float = 0.3
) -> tuple[SpikingLinear, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.nn.Linear(columns, 4)
    torch.nn.init.normal_(dense.weight, generator=generator)
    kind = {"neuron": "ternary", "bits": 2, "symmetric": True} if signed else {"bits": 3}
    chosen = {"salient_rate": rate, "salient_steps": 2, "saliency": "rms"} if rate else {}
    recipe = LinearRecipe(
        weights={"bits": 4},
        activations=ActivationRecipe.model_validate({**kind, **chosen}),
    )
    return fit(dense, recipe, sample=torch.randn(32, columns, generator=generator)), torch.randn(
        3, columns, generator=generator
    )


@given(st.integers(0, 2**31), st.integers(1, 14), st.booleans(), st.sampled_from([0.0, 0.3]))
@examples(20)
def test_a_graph_ends_in_the_layer_s_integers(
    seed: int, columns: int, signed: bool, rate: float
) -> None:
    one, x = layer(seed, columns, signed=signed, rate=rate)
    graph, population = layer_graph(one), layer_population("layer", one, x)
    for token in range(len(x)):
        sums = run_graph(graph, population.of_token(token))
        assert torch.equal(sums, segment_weights(one) @ population.codes[token].long())


def test_a_file_holds_the_graph(tmp_path: Path) -> None:
    one, x = layer(signed=True)
    graph, spikes = layer_graph(one), layer_population("layer", one, x).of_token(0)
    write_graph(graph, tmp_path / "layer.nir")
    again = read_graph(tmp_path / "layer.nir")
    assert again.nodes.keys() == graph.nodes.keys()
    assert set(again.edges) == set(graph.edges)
    assert torch.equal(run_graph(again, spikes), run_graph(graph, spikes))
    assert [path.name for path in tmp_path.iterdir()] == ["layer.nir"]


def test_rows_of_segments_make_up_the_weights() -> None:
    one, _ = layer()
    rows = segment_weights(one).view(-1, one.out_features, one.in_features)
    assert len(rows) == len(one.layout().segments) > 1
    stored = one.integer_weights().long()
    assert torch.equal(rows.sum(0)[:, one.layout().order], stored)
    assert int((rows != 0).sum(0).max()) == 1, "a column belongs to one segment"


def test_a_changed_weight_changes_the_sums(tmp_path: Path) -> None:
    one, x = layer()
    graph, population = layer_graph(one), layer_population("layer", one, x)
    graph.nodes["synapses"].weight += 1
    assert not torch.equal(
        run_graph(graph, population.of_token(0)), segment_weights(one) @ population.codes[0].long()
    )


def test_damage_and_absence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.nir").write_bytes(b"nothing")
    for name in ("bad.nir", "missing.nir"):
        with pytest.raises(CheckpointError, match="not a NIR graph"):
            read_graph(tmp_path / name)
    monkeypatch.setitem(sys.modules, "nir", None)
    with pytest.raises(DependencyError, match=r"spikellm\[nir\]"):
        read_graph(tmp_path / "bad.nir")


def static_layer(train: str = "centered", *, signed: bool = False) -> SpikingLinear:
    torch.manual_seed(0)
    kind = {"neuron": "ternary", "bits": 2, "symmetric": True} if signed else {"bits": 3}
    settings = LinearRecipe.model_validate(
        {
            "weights": {"bits": 4},
            "activations": {
                **kind,
                "clusters": 3,
                "threshold_from": "calibration",
                "train": train,
            },
        }
    )
    dense, x = torch.nn.Linear(11, 4, bias=False), torch.randn(50, 11) * torch.logspace(-1, 1, 11)
    group = clusters_of(x, 3, 0)
    fixed = constant_thresholds(settings.activations, group, x, dense.weight)
    return fit_layer(dense, settings, Groups(group, None, fixed=fixed))


@pytest.mark.parametrize("signed", [False, True])
def test_constant_thresholds_are_those_of_the_graph_s_neurons(signed: bool, tmp_path: Path) -> None:
    one, x = static_layer(signed=signed), 2 * torch.randn(3, 11)
    write_graph(layer_graph(one), tmp_path / "layer.nir")
    graph, population = read_graph(tmp_path / "layer.nir"), layer_population("layer", one, x)
    assert one.fixed is not None
    theta = one.fixed.theta[one.channel_group.long()]
    assert torch.equal(torch.from_numpy(graph.nodes["neurons"].v_threshold), theta / 2)
    y = one(x)
    for token in range(len(x)):
        spikes = population.of_token(token)
        sums = segment_weights(one) @ population.fired[token].long()
        assert torch.equal(run_graph(graph, spikes), sums)
        values = run_graph_to_values(graph, spikes).view(-1, one.out_features).sum(0)
        torch.testing.assert_close(values.float(), y[token])


def test_what_graphs_leave_out_depends_on_thresholds() -> None:
    def anew(*layers: SpikingLinear) -> bool:
        return any("found anew" in line for line in not_expressed(layers))

    def charge(*layers: SpikingLinear) -> bool:
        return any("charge of baselines" in line for line in not_expressed(layers))

    dynamic, _ = layer()
    assert anew(dynamic)
    assert anew(dynamic, static_layer())
    assert not anew(static_layer())
    assert not charge(static_layer())
    assert charge(static_layer("published"))
