from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import spikellm
from budget import examples, mostly_slow
from conftest import BUNDLED, first_blocks
from layers import activation_recipes, fit
from spikellm.__main__ import main
from spikellm.core.errors import CheckpointError, DependencyError, RequestError
from spikellm.neurons import make_neuron, with_train
from spikellm.neurons.phase import places
from spikellm.nn.execution import spiking_linears
from spikellm.nn.linear import SpikingLinear
from spikellm.profiling import event_run
from spikellm.profiling import trace as tracer
from spikellm.profiling.event_run import events_of, run_events, synapses_of, weight_planes
from spikellm.profiling.events import read_codes, write_events
from spikellm.profiling.operations import count_operations
from spikellm.profiling.plots.membrane import membrane_by_phase, membrane_in_moments
from spikellm.profiling.population import channel_order, layer_population
from spikellm.profiling.trace import trace_block
from spikellm.recipe import ActivationRecipe, LinearRecipe

RECIPES = ["w4a4-t2", "spike-w4a4-t2", "ternary-1.4-a4-t2", "bcq-2-a4-t2", "w8a8"]
FAST = {
    "spike-w4a4-t2": ("algorithm.epochs=1",),
    "ternary-1.4-a4-t2": ("weights.allocation=layer", "algorithm.rounds=1"),
    "bcq-2-a4-t2": ("algorithm.rounds=1", "algorithm.descents=0"),
}


@st.composite
def layers(draw: st.DrawFn) -> tuple[SpikingLinear, torch.Tensor]:
    """A layer of any shape with spikes of any kind, and inputs for it."""
    columns, outputs, tokens = (
        draw(st.integers(1, 19)),
        draw(st.integers(1, 7)),
        draw(st.integers(1, 4)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    activations = draw(activation_recipes(st.integers(1, 5), st.just(False)))
    recipe = LinearRecipe(weights={"bits": draw(st.integers(2, 8))}, activations=activations)
    dense = torch.nn.Linear(columns, outputs, bias=draw(st.booleans()))
    torch.nn.init.normal_(dense.weight, generator=generator)
    x = torch.randn(tokens, columns, generator=generator)
    return fit(dense, recipe, sample=torch.randn(32, columns, generator=generator)), x


@given(layers(), st.sampled_from(["binary", "phase"]))
@examples(40)
def test_events_end_in_the_merged_integers_and_in_the_layer_s_output(
    drawn: tuple[SpikingLinear, torch.Tensor], form: Any
) -> None:
    layer, x = drawn
    population = layer_population("layer", layer, x)
    found = tracer._check_layer(population, layer, layer(x), form)
    assert found.equal
    assert found.mismatches == 0
    assert found.integers == len(x) * layer.out_features * len(layer.layout().segments)
    neuron, sizes = population.neuron, population.fired.abs()
    if form == "binary":
        fired = sizes
    else:
        fired = neuron.phase(population.fired, population.code_steps).abs().sum(0)
    assert found.spikes == int(fired.sum())
    stored = layer.integer_weights()
    some = torch.zeros(layer.in_features, dtype=torch.int64)
    some[channel_order(layer)] = (stored != 0).sum(0)
    assert found.additions == int((fired * some).sum()), "a weight of zero is no synapse"
    steps, order = population.code_steps, channel_order(layer)
    doubled = 0
    for part in layer.layout().segments:
        for most in steps[:, order[part.start : part.stop]].amax(1).tolist():
            doubled += places(most * neuron.levels, neuron.recoding) - 1
    assert found.shifts == (0 if form == "binary" else doubled * layer.out_features)


def test_events_arrive_in_the_order_of_time_and_none_at_rest() -> None:
    layer, x = one_layer(train="centered")
    x[1] = 0
    for form in ("binary", "phase"):
        events = events_of(layer_population("layer", layer, x), form)
        assert bool((events.time.diff() >= 0).all())
        assert 1 not in events.token, "a token of zeros is silent"
    events = events_of(layer_population("layer", one_layer()[0], x))
    run = run_events(events, synapses_of(layer), torch.ones(len(x), 1, dtype=torch.int64))
    assert run.sums.shape == (3, 1, 5)


@pytest.mark.parametrize("recipe", ["w4a4-t2", "w8a8", "ternary-1.4-a4-t2", "bcq-2-a4-t2"])
@pytest.mark.parametrize("form", ["binary", "phase"])
def test_events_are_as_many_as_the_report_counts(
    recipe: str, form: Any, text_file: Path, tokens: torch.Tensor
) -> None:
    model, tokenizer = first_blocks(dtype="float32")
    spikellm.convert(
        model,
        tokenizer,
        recipe,
        str(text_file),
        samples=2,
        seqlen=32,
        settings=FAST.get(recipe, ()),
    )
    window = tokens[:1]
    counts = count_operations(model, [window])["prefill"]
    found = trace_block(model, window, 0, form)
    assert found.equal
    for trace in found.traces:
        entry = counts.layers[f"{found.block}.{trace.name}"]
        assert (trace.spikes, trace.additions) == (entry.spikes[form], entry.sops[form])
        assert trace.shifts == (entry.shifts if form == "phase" else 0)
        assert entry.shifts > 0


def one_layer(**more: Any) -> tuple[SpikingLinear, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dense = torch.nn.Linear(12, 5)
    torch.nn.init.normal_(dense.weight, generator=generator)
    return fit(
        dense, LinearRecipe(weights={"bits": 4}, activations=ActivationRecipe(bits=4, **more))
    ), torch.randn(3, 12, generator=generator)


def test_a_lost_spike_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = one_layer()
    population = layer_population("layer", layer, x)
    honest = list(population.planes())
    honest[0][0][1, int(honest[0][0][1].nonzero()[0])] = 0
    monkeypatch.setattr(type(population), "planes", lambda self, form: iter(honest))
    found = tracer._check_layer(population, layer, layer(x))
    assert 0 < found.mismatches <= 5, "one token of five outputs lacks a weight"
    assert not found.equal


def test_another_output_is_found() -> None:
    layer, x = one_layer()
    y = layer(x)
    y[0, 0] = torch.nextafter(y[0, 0], torch.tensor(torch.inf))
    found = tracer._check_layer(layer_population("layer", layer, x), layer, y)
    assert found.mismatches == 0
    assert not found.equal


@pytest.fixture(scope="module", params=mostly_slow(RECIPES, {"w4a4-t2", "spike-w4a4-t2"}))
def model(request: pytest.FixtureRequest, text_file: Path) -> Any:
    loaded, tokenizer = spikellm.load(BUNDLED)
    spikellm.convert(
        loaded,
        tokenizer,
        request.param,
        str(text_file),
        samples=2,
        seqlen=32,
        settings=FAST.get(request.param, ()),
    )
    return loaded


def test_a_whole_block(model: Any, tmp_path: Path, tokens: torch.Tensor) -> None:
    before = model(tokens[:1], use_cache=False).logits
    found = trace_block(model, tokens[:1], 1)
    assert found.equal
    assert found.exact
    assert found.output_difference == 0
    assert found.output_values == tokens.shape[1] * model.config.hidden_size
    names = [population.name for population in found.populations]
    assert len(names) == (10 if model.config.quantization_config.attention else 7)
    assert torch.equal(model(tokens[:1], use_cache=False).logits, before), "the model is as it was"
    spikellm.set_execution_mode(model, "stepped")
    again = trace_block(model, tokens[:1], 1)
    assert {layer.execution_mode for layer in spiking_linears(model).values()} == {"stepped"}, (
        "each layer keeps its own form"
    )
    spikellm.set_execution_mode(model, "merged")
    assert again.traces == found.traces

    count = write_events(found.populations, tmp_path / "events.npz")
    codes = read_codes(tmp_path / "events.npz")
    assert list(codes) == names
    for population in found.populations:
        assert torch.equal(codes[population.name], population.fired.long())
    assert count == sum(trace.spikes for trace in found.traces)

    phased = trace_block(model, tokens[:1], 1, "phase")
    assert phased.equal
    write_events(phased.populations, tmp_path / "phase.npz", "phase")
    assert all(
        torch.equal(one, codes[name]) for name, one in read_codes(tmp_path / "phase.npz").items()
    )


def test_experts_that_no_token_reaches_are_left_out(tokenizer: Any, text_file: Path) -> None:
    """Mixture of experts: each expert is traced on the tokens that it was sent."""
    import transformers

    from families import GATED, randomized

    model = randomized(
        transformers.AutoModelForCausalLM.from_config(
            transformers.MixtralConfig(**GATED, num_local_experts=4)
        )
    )
    spikellm.convert(model, tokenizer, "w4a4-t2", str(text_file), samples=2, seqlen=16)
    found = trace_block(model, torch.tensor([[5]]), 0)
    assert found.equal
    experts = [trace for trace in found.traces if "experts" in trace.name]
    assert [trace.tokens for trace in experts] == [
        1,
        1,
        1,
        1,
    ], "two of the four experts, two layers each"


@pytest.mark.parametrize("train", ["centered", "published"])
def test_events_turn_back_into_values(train: str, tmp_path: Path) -> None:
    layer, x = one_layer(train=train)
    write_events([layer_population("layer", layer, x)], tmp_path / "events.npz")
    with np.load(tmp_path / "events.npz", allow_pickle=False) as file:
        found = dict(file)
    code = read_codes(tmp_path / "events.npz")["layer"].numpy()
    group = found["group.0"].astype(int)
    baseline = 0 if "centered.0" in found else found["baseline.0"][:, group]
    values = found["theta.0"][:, group] * (code - baseline)
    assert np.abs(values - x.numpy()).max() <= found["theta.0"].max() / 2 + 1e-6
    order = np.stack(
        [found[name].astype(np.int64) for name in ("population", "time", "token", "channel")]
    )
    assert np.array_equal(np.lexsort(order[::-1]), np.arange(order.shape[1]))


def test_damaged_events_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "events.npz"
    for content in (b"", b"nothing", b"PK\x03\x04 half a file"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a file of events"):
            read_codes(path)


@given(
    st.floats(-3, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from(["binary", "signed-digit"]),
)
def test_membrane_halves_its_threshold_in_phase(
    current: float, bits: int, steps: int, recoding: Any
) -> None:
    neuron = with_train(make_neuron("gif", bits), "centered", recoding)
    at, one, z = torch.tensor(current), torch.tensor(0.25), torch.tensor(1.0)
    potential, spikes, high, low = membrane_by_phase(neuron, at, one, z, steps)
    worth = 2.0 ** torch.arange(len(spikes)).flip(0).double()
    count = neuron.fired(neuron.encode(at, one, z, steps), z)
    assert float((spikes * worth).sum()) == float(count)
    falls = potential[:-1] - potential[1:]
    torch.testing.assert_close(falls, (spikes * worth)[:-1], atol=1e-6, rtol=0)
    # drawn thresholds are those at which it fires; a tie may stand on either side of one
    assert bool((potential[spikes > 0] >= high[spikes > 0] - 1e-6).all())
    assert bool((potential[spikes < 0] <= low[spikes < 0] + 1e-6).all())
    quiet = potential[spikes == 0]
    assert not bool((quiet > high[spikes == 0] + 1e-6).any())
    assert not bool((quiet < low[spikes == 0] - 1e-6).any())


def test_neurons_of_few_steps_wait_for_the_moments_of_the_layer() -> None:
    neuron = with_train(make_neuron("gif", 4), "centered", "binary")
    value = torch.tensor(-0.5), torch.tensor(0.25), torch.tensor(7.0)
    assert membrane_by_phase(neuron, *value, 1).spikes.tolist() == [0, 0, -1, 0]
    waits = membrane_by_phase(neuron, *value, 1, longest=2)
    assert waits.spikes.tolist() == [0, 0, 0, -1, 0]
    assert waits.low.tolist() == [-16, -8, -4, -2, -1]
    assert bool(waits.high.isnan().all()), "a negative neuron fires negative spikes alone"


@given(st.floats(-3, 3), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_membrane_falls_by_a_threshold_at_every_spike(
    current: float, bits: int, steps: int, signed: bool
) -> None:
    neuron = make_neuron("ternary", 2) if signed else make_neuron("gif", bits)
    one = torch.tensor(0.25)
    potential, spikes, *_ = membrane_in_moments(
        neuron, torch.tensor(current), one, torch.tensor(0.0), steps
    )
    assert int(spikes.sum()) == int(
        neuron.encode(torch.tensor(current), one, torch.tensor(0.0), steps)
    )
    falls = potential[:-1] - potential[1:]
    torch.testing.assert_close(falls, spikes[:-1].double(), atol=1e-9, rtol=0)
    assert bool((potential[spikes > 0] >= 1 - 1e-9).all())
    assert bool((potential[spikes < 0] <= -1 + 1e-9).all())


def test_nothing_to_trace(
    bundled: tuple[Any, Any], tokens: torch.Tensor, converted_folder: Path
) -> None:
    with pytest.raises(RequestError, match="nothing in model.layers.0 codes"):
        trace_block(bundled[0], tokens[:1], 0)
    with pytest.raises(RequestError, match="blocks 0 to 4"):
        trace_block(spikellm.load(converted_folder)[0], tokens[:1], 5)


def test_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, converted_folder: Path, text_file: Path
) -> None:
    out = tmp_path / "trace"
    assert (
        main(
            [
                "trace",
                str(converted_folder),
                "--text",
                str(text_file),
                "--seqlen",
                "16",
                "--layer",
                "2",
                "--token",
                "3",
                "--nir",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert "same bits in binary and in merged execution" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "events.npz",
        "layer.nir",
        "membrane.svg",
        "raster.svg",
        "trace.json",
    ]
    result = json.loads((out / "trace.json").read_text())
    assert result["equal"]
    assert result["nir"]["mismatches"] == 0
    assert result["block"] == "model.layers.2"
    assert result["events"] == sum(one["spikes"] for one in result["populations"])
    for picture in ("raster.svg", "membrane.svg"):
        root = ET.parse(out / picture).getroot()  # noqa: S314
        told = {child.tag.rpartition("}")[2] for child in root}
        assert {"title", "desc"} <= told
        assert "http" not in (out / picture).read_text().replace("http://www.w3.org/", "")
    arguments = [
        "trace",
        str(converted_folder),
        "--text",
        str(text_file),
        "--seqlen",
        "16",
        "--out",
        str(out),
    ]
    assert main(arguments) == 2, "the folder is not empty"
    assert main([*arguments, "--force", "--part", "mlp.down_proj", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["drawn"] == "mlp.down_proj"
    assert main([*arguments, "--force", "--form", "phase"]) == 0
    told = capsys.readouterr().out
    assert "doublings" in told
    assert "same bits in phase and in merged execution" in told
    phased = json.loads((out / "trace.json").read_text())
    assert phased["equal"]
    assert phased["form"] == "phase"
    assert main([*arguments[:-1], str(converted_folder), "--force"]) == 2
    assert "which is to be read" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert main([*arguments[:-1], str(tmp_path / "other"), "--force"]) == 2
    assert "holds no trace.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layer", "9"], "blocks 0 to 4"),
        (["--token", "16"], "tokens 0 to 15"),
        (["--part", "mlp.down"], "did you mean 'mlp.down_proj'"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--form", "merged"], "value for '--form': 'merged' is not one of 'binary', 'phase'"),
        (["--form", "phase", "--nir"], "NIR has no words for spikes worth powers of two"),
    ],
)
def test_wrong_requests(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    converted_folder: Path,
    text_file: Path,
    arguments: list[str],
    words: str,
) -> None:
    given = arguments if "--text" in arguments else ["--text", str(text_file), *arguments]
    assert (
        main(
            [
                "trace",
                str(converted_folder),
                "--seqlen",
                "16",
                "--out",
                str(tmp_path / "out"),
                *given,
            ]
        )
        == 2
    )
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_mismatch_ends_with_status_1(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    converted_folder: Path,
    text_file: Path,
) -> None:
    planes = weight_planes

    def broken(layer: SpikingLinear, plane: object = None) -> list[torch.Tensor]:
        found = planes(layer)
        found[0][0, 0] += 1
        return found

    monkeypatch.setattr(event_run, "weight_planes", broken)
    assert (
        main(
            [
                "trace",
                str(converted_folder),
                "--text",
                str(text_file),
                "--seqlen",
                "16",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 1
    )
    captured = capsys.readouterr()
    assert "NO: " in captured.out
    assert "differ" in captured.err.splitlines()[-1]


def test_pictures_ask_for_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from spikellm.profiling.plots.canvas import axes

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DependencyError, match=r"spikellm\[report\]"), axes():
        pass
