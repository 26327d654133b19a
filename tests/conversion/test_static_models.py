"""Clusters of channels and thresholds that are constants, through whole conversions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import spikellm
from conftest import first_blocks
from native import needs_compiler
from spikellm.commands.inspect import _spikes
from spikellm.commands.trace import _thresholds_in_words
from spikellm.core.errors import RequestError
from spikellm.nn.execution import set_execution_mode, spiking_linears
from spikellm.nn.rotation import layer_name
from spikellm.profiling.operations import count_operations
from spikellm.profiling.trace import trace_block
from spikellm.runtime.decoder_step.summary import NATIVE, tried_step
from spikellm.training.parameters import shares_of

PRESETS = ["clusters-w4a4", "static-w4a8"]


def convert(recipe: str, text_file: Path, *settings: str, blocks: int = 1) -> tuple[Any, Any]:
    model, tokenizer = first_blocks(blocks, dtype="float32")
    spikellm.convert(
        model, tokenizer, recipe, str(text_file), samples=4, seqlen=64, settings=settings
    )
    return model, tokenizer


@pytest.fixture(scope="module", params=PRESETS)
def converted(request: pytest.FixtureRequest, text_file: Path) -> tuple[str, Any, Any]:
    return (request.param, *convert(request.param, text_file))


def test_readers_of_one_tensor_share_clusters_and_thresholds(
    converted: tuple[str, Any, Any],
) -> None:
    recipe, model, _ = converted
    layers = {
        layer_name(name).rpartition(".")[2]: layer for name, layer in spiking_linears(model).items()
    }
    q, k, down = layers["q_proj"], layers["k_proj"], layers["down_proj"]
    assert torch.equal(q.channel_group, k.channel_group)
    assert len(set(q.channel_group.tolist())) == 8
    assert not torch.equal(q.channel_group, layers["gate_proj"].channel_group)
    if recipe == "static-w4a8":
        assert q.fixed is not None
        assert k.fixed is not None
        assert all(map(torch.equal, q.fixed, k.fixed))
        assert not torch.equal(q.fixed.theta, down.fixed.theta)  # type: ignore[union-attr]
    shown = _spikes(vars(spikellm.summarize(model).layers[0]))
    static = recipe == "static-w4a8"
    assert shown == ("gif 8, 8 clusters, static" if static else "gif 4, 8 clusters")


def test_a_saved_model_is_the_same(
    converted: tuple[str, Any, Any], tmp_path: Path, tokens: torch.Tensor
) -> None:
    _, model, tokenizer = converted
    spikellm.save(model, tokenizer, tmp_path / "model")
    again, _ = spikellm.load(tmp_path / "model")
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_converting_again_gives_the_same_bytes(
    converted: tuple[str, Any, Any], text_file: Path
) -> None:
    recipe, model, _ = converted
    again, _ = convert(recipe, text_file)
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_all_forms_agree_and_traces_say_what_thresholds_are(
    converted: tuple[str, Any, Any], tokens: torch.Tensor
) -> None:
    recipe, model, _ = converted
    with torch.no_grad():
        merged = model(tokens).logits
        for mode in ("stepped", "binary", "phase"):
            set_execution_mode(model, mode)
            assert torch.equal(model(tokens).logits, merged), mode
        set_execution_mode(model, "merged")
    found = trace_block(model, tokens[:1, :6], 0)
    assert found.equal
    lines = _thresholds_in_words([vars(one) for one in found.traces])
    if recipe == "static-w4a8":
        assert lines == [
            "thresholds of all populations are constants: no smallest or largest value is looked"
            " for"
        ]
    else:
        assert not lines


def test_coding_by_constants_takes_less(text_file: Path, tokens: torch.Tensor) -> None:
    work = []
    for source in ("range", "calibration"):
        model, _ = convert(
            "static-w4a8", text_file, f"activations.threshold_from={source}", "algorithm=rtn"
        )
        counts = count_operations(model, [tokens])["prefill"]
        work.append(counts.work["coding"]["merged"])
    assert work[1]["compare"] < 0.55 * work[0]["compare"]
    assert work[1]["divide"] == 0 < work[0]["divide"]


@needs_compiler
def test_the_native_step_gives_the_same_tokens(converted: tuple[str, Any, Any]) -> None:
    _, model, tokenizer = converted
    tokens = tokenizer("def read(path):", return_tensors="pt").input_ids
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    assert tried_step(model) == NATIVE
    found, own = model.generate(tokens, **options), model.__dict__.pop("forward")
    try:
        assert torch.equal(model.generate(tokens, **options), found)
    finally:
        model.forward = own


def test_tokens_are_weighed_but_coded_as_they_are(text_file: Path) -> None:
    """Thresholds reach as far as the inputs do, even where sums make massive tokens smaller."""
    theta = []
    for rule in ("equal", "robust"):
        model, _ = convert(
            "static-w4a8",
            text_file,
            "algorithm=rtn",
            "activations.search_range=false",
            "activations.clusters=1",
            f"calibration.token_weights={rule}",
        )
        theta.append([float(one.fixed.theta) for one in spiking_linears(model).values()])
    assert theta[1] == pytest.approx(theta[0], rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        ["algorithm=block-ap", "algorithm.epochs=1"],
        ["algorithm={name: omniquant, let: false, epochs: 1}"],
        ["algorithm.compensate=true", "lm_head=true", "transforms=[residual-rotation]"],
        ["activations.salient_rate=0.1", "activations.salient_steps=2"],
        ["transforms=[{name: online-rotation, layers: [down], choose: loss}]"],
        ["algorithm=gptq", "weights=ternary"],
    ],
)
def test_algorithms_and_transforms_go_with_constants(
    text_file: Path, tokens: torch.Tensor, settings: list[str]
) -> None:
    model, _ = convert("static-w4a8", text_file, *settings)
    layers = spiking_linears(model)
    assert all(one.fixed is not None for one in layers.values())
    with torch.no_grad():
        merged = model(tokens).logits
        set_execution_mode(model, "binary")
        assert torch.equal(model(tokens).logits, merged)
    assert bool(torch.isfinite(merged).all())


def test_shares_of_constants_are_not_trained(text_file: Path) -> None:
    model, _ = convert("static-w4a8", text_file, "algorithm=rtn")
    with pytest.raises(RequestError, match="are constants.*set shares to false"):
        shares_of(model)
