"""Rotations fused into models: the function stays, family by family, or the family is refused with
a reason.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from fused import fuse, uneven

import spikellm
from conftest import BUNDLED, first_blocks
from families import build, by_family
from spikellm.algorithms.compensation import SequentialFit
from spikellm.core.errors import RecipeError, RequestError, UnsupportedModelError
from spikellm.models.cache import spiking_cache
from spikellm.nn.rotation import Rotation, rotations
from spikellm.observers.activation_store import SharedStream
from spikellm.profiling.trace import trace_block
from spikellm.recipe.load import load_recipe

ROTATED = [
    "cohere",
    "gpt2",
    "gpt_neox",
    "gemma",
    "llama",
    "mistral",
    "olmo",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "stablelm",
]
REFUSED = ["bloom", "gemma3", "olmo2"]
WHOLE = (
    "rotation={residual: true, value_output: true, online: [output, down], equalize: true}",
    "attention={query: {bits: 4}, key: {bits: 4}, value: {bits: 4}, rotate: true, center: true}",
)


def rotated(model: Any, basis: str = "random") -> Any:
    """The model on a rotated residual stream, nothing coded."""
    fuse(
        model,
        "adapt=false",
        f"transforms=[{{name: residual-rotation, basis: {basis}}}, norm-equalization]",
    )
    return model


@pytest.mark.parametrize("basis", ["random", "learned"])
@pytest.mark.parametrize("family", by_family(ROTATED))
def test_a_rotated_stream_changes_nothing(family: str, basis: str, tokens: torch.Tensor) -> None:
    model = uneven(family)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        embedding = model.get_input_embeddings().weight.clone()
        found = rotated(model, basis)(tokens, use_cache=False).logits
    assert torch.allclose(found, expected, atol=2e-3 * float(expected.abs().max()))
    assert not torch.allclose(model.get_input_embeddings().weight, embedding, atol=0.01), (
        "and yet it is rotated"
    )


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_do_more_with_the_stream_are_refused(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match="leave residual-rotation out"):
        rotated(uneven(family))


def convert(
    text_file: Path, *settings: str, recipe: str = "gptq-w4a16", **keywords: Any
) -> tuple[Any, Any, spikellm.Conversion]:
    model, tokenizer = first_blocks(3)
    found = spikellm.convert(
        model,
        tokenizer,
        recipe,
        str(text_file),
        samples=8,
        seqlen=64,
        settings=settings,
        **keywords,
    )
    return model, tokenizer, found


def assert_report(model: Any, tokenizer: Any, text_file: Path) -> None:
    """Rotations are counted, layers go by their family's names, spikes can be traced."""
    report = spikellm.report(model, tokenizer, str(text_file), tokens=64, seqlen=32)
    turned, linear = report.part("rotation"), report.part("linear")
    assert 0 < turned.ace < 0.2 * linear.ace
    assert (
        report.part("whole").ace
        == turned.ace + linear.ace + report.part("attention").ace + report.part("head").ace
    )
    assert {
        "model.layers.0.mlp.down_proj",
        "model.layers.0.mlp.down_proj.rotation",
        "model.layers.0.self_attn rotation",
    } <= report.prefill.layers.keys()
    assert report.steps.keys() == {layer.name for layer in report.summary.layers if layer.spiking}
    traced = trace_block(model, torch.tensor([[5, 6, 7, 8]]), 0)
    assert traced.equal
    assert "mlp.down_proj" in traced.layers


def test_forms_cache_and_reload_agree_under_rotation(
    text_file: Path, tmp_path: Path, tokens: torch.Tensor
) -> None:
    choosing = (
        "rotation={residual: true, value_output: true, online: [output, down], equalize: true,"
        " choose: loss}"
    )
    settings = (
        "activations={bits: 4, salient_rate: 0.1, salient_steps: 2}",
        "gptq.compensate=true",
        WHOLE[1],
        choosing,
    )
    model, tokenizer, found = convert(text_file, *settings)
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
        for form in ("stepped", "binary", "merged"):
            spikellm.set_execution_mode(model, form)
            assert torch.equal(model(tokens, use_cache=False).logits, logits), form
        cache = spiking_cache(model)
        by_step = [
            model(tokens[:, i : i + 1], past_key_values=cache).logits
            for i in range(tokens.shape[1])
        ]
        assert torch.allclose(torch.cat(by_step, 1), logits, atol=2e-2)
        assert cache.layers[0].keys.dtype == torch.uint8
        spikellm.save(model, tokenizer, tmp_path / "out")
        again, _ = spikellm.load(tmp_path / "out")
        assert torch.equal(again(tokens, use_cache=False).logits, logits)
        assert torch.equal(
            again.generate(tokens, max_new_tokens=6, do_sample=False),
            model.generate(tokens, max_new_tokens=6, do_sample=False),
        )
    assert not again.config.tie_word_embeddings, (
        "the projection has gains of the last norm in it, the embedding has not"
    )
    assert_report(again, tokenizer, text_file)
    told = {name: channels for block in found.blocks for name, channels in block.rotated.items()}
    assert told == {
        name.removesuffix(".rotation"): one.rotated for name, one in rotations(again).items()
    }
    assert len(told) == 2 * len(found.blocks)


def test_a_conversion_that_fails_leaves_the_model_as_it_was(text_file: Path) -> None:
    model, tokenizer = spikellm.load(BUNDLED)
    before, tied = (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        model.config.tie_word_embeddings,
    )

    model.train()
    model.model.layers[0].eval()

    def stop(progress: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spikellm.convert(
            model,
            tokenizer,
            "rtn-w4a4",
            str(text_file),
            samples=2,
            seqlen=32,
            settings=WHOLE,
            on_block=stop,
        )
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.config.tie_word_embeddings == tied
    assert model.training
    assert not model.model.layers[0].training


def test_resumed_gives_the_same_bytes(text_file: Path, tmp_path: Path) -> None:
    settings = (
        *WHOLE,
        "activations.bits=4",
        "gptq.compensate=true",
        "overrides=[{match: '.*2.mlp.(up|down)_proj', skip: true}]",
    )

    def stop(progress: Any) -> None:
        if progress.index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(text_file, *settings, journal=tmp_path / "journal", on_block=stop)
    resumed, _, one = convert(text_file, *settings, journal=tmp_path / "journal")
    whole, _, other = convert(text_file, *settings)
    assert one.blocks == other.blocks
    for (name, tensor), (other_name, expected) in zip(
        resumed.state_dict().items(), whole.state_dict().items(), strict=True
    ):
        assert name == other_name
        assert torch.equal(tensor, expected), name
    assert "model.layers.2.mlp.down_proj" not in one.blocks[2].rotated, (
        "a layer that is skipped is not rotated"
    )


def planted(channel: int = 5, factor: float = 400.0) -> Any:
    """The bundled model with one channel between up and down that is large for some tokens, and
    outlasts every scale that is fixed.
    """
    model, tokenizer = first_blocks()
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[channel] *= factor
        layer.mlp.down_proj.weight.data[:, channel] /= factor
    return model, tokenizer


def last_loss(
    model: Any, tokenizer: Any, text_file: Path, *settings: str, recipe: str = "rtn-w4a4"
) -> float:
    found = spikellm.convert(
        model, tokenizer, recipe, str(text_file), samples=8, seqlen=64, settings=settings
    )
    return found.blocks[-1].relative_loss


def test_scales_take_outliers_away_before_they_are_rotated(text_file: Path) -> None:
    plain, rotated_only, even = (
        last_loss(*planted(), text_file, setting)
        for setting in (
            "rotation.online=[]",
            "rotation={online: [down]}",
            "rotation={online: [down], equalize: true}",
        )
    )
    assert even < 0.5 * min(plain, rotated_only)


def test_the_choice_leaves_out_a_channel_that_rotates_badly(text_file: Path) -> None:
    model, tokenizer = planted(factor=3000.0)
    settings = ("rotation={online: [down], choose: loss}", "activations.salient_rate=0.05")
    found = spikellm.convert(
        model, tokenizer, "rtn-w4a4", str(text_file), samples=8, seqlen=64, settings=settings
    )
    for index, block in enumerate(found.blocks):
        signs = rotations(model)[f"model.layers.{index}.mlp.down_proj.rotation"].signs
        assert int(signs[5]) == 0
        assert block.rotated[f"model.layers.{index}.mlp.down_proj"] == int((signs > 0).sum())
    everything = last_loss(
        *planted(factor=3000.0), text_file, "rotation={online: [down]}", settings[1]
    )
    assert found.blocks[-1].relative_loss < 0.5 * everything


def test_the_mean_of_keys_is_not_seen(text_file: Path) -> None:
    """Queries that point along a constant of K: coded with it, the rest of K drowns."""
    attention = "attention={query: {bits: 8}, key: {bits: 4}, value: {bits: 8}, center: %s}"
    losses = []
    for center in ("false", "true"):
        model, tokenizer = spikellm.load(BUNDLED)
        for layer in model.model.layers:
            bias = torch.zeros(layer.self_attn.k_proj.out_features, dtype=model.dtype)
            bias[-1] = 200.0  # of the slowest rotary pair, so that it stays a constant
            layer.self_attn.k_proj.bias = torch.nn.Parameter(bias)
        losses.append(
            last_loss(
                model,
                tokenizer,
                text_file,
                attention % center,
                "weights.bits=8",
                "activations.bits=8",
            )
        )
    assert losses[1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    "what", [("activations.bits=4",), ("activations.bits=16",), ("activations.bits=4", *WHOLE)]
)
def test_compensation_brings_blocks_nearer(what: tuple[str, ...], text_file: Path) -> None:
    losses = [
        convert(text_file, *what, f"gptq.compensate={on}")[2].blocks[-1].relative_loss
        for on in ("false", "true")
    ]
    assert losses[1] < 0.95 * losses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("transforms=[{name: equalization, sites: []}]",), "names no site"),
        (("transforms=[{name: equalization}]",), "query-key has no effect"),
        (("transforms=[{name: online-rotation, layers: [down, down]}]",), "twice"),
        (("transforms=[{name: online-rotation, layers: [up]}]",), "down"),
        (("transforms=[{name: residual-rotation, choose: loss}]",), "unknown key"),
        (("attention.rotate=true",), "rotate has no effect"),
        (("attention={query: {bits: 4}, center: true}",), "center has no effect"),
        (("algorithm.compensate=true",), "unknown key"),
        (
            ("algorithm=gptq", "algorithm.compensation_percdamp=0.1"),
            "compensation_percdamp has no effect",
        ),
    ],
)
def test_recipes_are_checked(settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("rtn-w4a4", list(settings))


def test_a_family_without_the_layer_is_refused(text_file: Path) -> None:
    model, (_, tokenizer) = build("bloom"), spikellm.load(BUNDLED)
    with pytest.raises(UnsupportedModelError, match=r"online-rotation names 'output'"):
        spikellm.convert(
            model,
            tokenizer,
            "rtn-w4a4",
            str(text_file),
            samples=2,
            seqlen=24,
            settings=["rotation.online=[output]"],
        )
    assert not any(isinstance(module, Rotation) for module in model.modules())


def test_layers_are_fitted_as_they_run(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This family lists its output layer before what feeds it."""
    order, real = list[str](), SequentialFit.moments

    def moments(self: SequentialFit, name: str, groups: Any) -> Any:
        order.append(name.rpartition(".")[2])
        return real(self, name, groups)

    monkeypatch.setattr(SequentialFit, "moments", moments)
    model, (_, tokenizer) = build("phi3"), spikellm.load(BUNDLED)
    spikellm.convert(
        model,
        tokenizer,
        "gptq-w4a16",
        str(text_file),
        samples=2,
        seqlen=24,
        settings=["gptq.compensate=true"],
    )
    assert order == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"] * len(model.model.layers)


def test_inputs_that_layers_share_are_run_once(
    text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, real = list[str](), SequentialFit.moments
    monkeypatch.setattr(
        SequentialFit,
        "moments",
        lambda self, name, groups: (names.append(name), real(self, name, groups))[1],
    )
    _, _, found = convert(text_file, "gptq.compensate=true", "activations.bits=16")
    assert len(names) == 4 * len(found.blocks)


def test_double_precision(text_file: Path, tokens: torch.Tensor) -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        model, tokenizer = spikellm.load(BUNDLED)
        model.to(dtype)
        spikellm.convert(
            model,
            tokenizer,
            "rtn-w4a4",
            str(text_file),
            samples=2,
            seqlen=32,
            settings=[*WHOLE, "weights.bits=8", "activations.bits=8"],
        )
        with torch.no_grad():
            found.append(model(tokens, use_cache=False).logits)
    assert found[1].dtype == torch.float64
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 0.1


def test_a_layer_that_is_rotated_but_never_converted_is_refused(text_file: Path) -> None:
    with pytest.raises(RequestError, match=r"online-rotation names 'down'"):
        convert(
            text_file, *WHOLE, "overrides=[{match: '.*down_proj', skip: true}]", recipe="rtn-w4a4"
        )


def test_the_projection_says_that_it_has_a_share_of_its_own(text_file: Path) -> None:
    settings = (
        "lm_head=true",
        "rotation.residual=true",
        "activations={bits: 4, salient_rate: 0.1, salient_steps: 2, salient_over: model}",
    )
    _, _, found = convert(text_file, *settings, recipe="rtn-w4a4")
    assert "its own share of channels" in " ".join(found.blocks[-1].notes)


@pytest.mark.parametrize("family", ["phi", "cohere"])
def test_a_large_channel_hides_no_scale_that_does_not_fit(family: str, text_file: Path) -> None:
    """Q and K of these mix other channels than i and i + d/2, so they cannot be scaled.

    A channel a thousand times as large must not hide that.
    """
    model, (_, tokenizer) = uneven(family), spikellm.load(BUNDLED)
    for name, module in model.named_modules():
        if name.endswith(("mlp.fc2", "mlp.down_proj")):
            module.weight.data[3] *= 1000
    settings = (
        "rotation.equalize=true",
        "attention={query: {bits: 8}, key: {bits: 8}, value: {bits: 8}}",
    )
    found = spikellm.convert(
        model, tokenizer, "rtn-w4a4", str(text_file), samples=2, seqlen=24, settings=settings
    )
    assert all("Q and K stay as they are" in " ".join(block.notes) for block in found.blocks)


def test_a_forward_of_a_blocks_own_survives(text_file: Path) -> None:
    model, tokenizer = spikellm.load(BUNDLED)
    block = model.model.layers[1]
    block.forward = wrapped = functools.partial(
        type(block).forward, block
    )  # as hooks of other libraries do
    spikellm.convert(
        model,
        tokenizer,
        "rtn-w4a4",
        str(text_file),
        samples=2,
        seqlen=32,
        settings=["rotation.residual=true"],
    )
    assert block.__dict__["forward"] is wrapped


def test_a_tied_output_projection_is_parted_and_converted(
    text_file: Path, tmp_path: Path, tokens: torch.Tensor
) -> None:
    model, tokenizer = spikellm.load(BUNDLED)
    assert model.config.tie_word_embeddings
    spikellm.convert(
        model,
        tokenizer,
        "rtn-w4a4",
        str(text_file),
        samples=2,
        seqlen=32,
        settings=["rotation.residual=true", "lm_head=true"],
    )
    spikellm.save(model, tokenizer, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(
            spikellm.load(tmp_path / "out")[0](tokens, use_cache=False).logits,
            model(tokens, use_cache=False).logits,
        )


@pytest.mark.slow
@pytest.mark.long
def test_one_model_compared_with_several_recipes_is_converted_as_it_is_alone(
    text_file: Path,
) -> None:
    """The full-precision stream is shared only where its bits are the same."""
    shared = SharedStream()
    for recipe, settings in (
        ("best-w4a4-1.10", ()),
        ("best-w4a4-1.10", ("attention.center=false",)),
        ("best-w4a4", ()),
    ):
        found = []
        for stream in (shared, None):
            model, tokenizer = spikellm.load(BUNDLED)
            spikellm.convert(
                model,
                tokenizer,
                recipe,
                str(text_file),
                samples=4,
                seqlen=64,
                settings=settings,
                shared=stream,
            )
            found.append(model.state_dict())
        assert all(torch.equal(found[1][name], tensor) for name, tensor in found[0].items()), (
            recipe,
            settings,
        )


def test_scales_and_clipping_are_learned_on_a_rotated_model(
    text_file: Path, tmp_path: Path, tokens: torch.Tensor
) -> None:
    settings = (*WHOLE, "omniquant.epochs=2", "omniquant.let_rate=0.005", "omniquant.lwc_rate=0.05")
    model, tokenizer, learned = convert(text_file, *settings, recipe="omniquant-w4a4")
    rounded = convert(text_file, *WHOLE, recipe="rtn-w4a4")[2]
    assert learned.blocks[-1].relative_loss < rounded.blocks[-1].relative_loss
    spikellm.save(model, tokenizer, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(
            spikellm.load(tmp_path / "out")[0](tokens, use_cache=False).logits,
            model(tokens, use_cache=False).logits,
        )
