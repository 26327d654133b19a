from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import spikellm
from conftest import first_blocks
from families import build, by_family
from layers import fit
from spikellm.algorithms import learned_layer
from spikellm.algorithms.learning import Learning
from spikellm.core.errors import RecipeError, RequestError
from spikellm.nn.linear import SpikingLinear
from spikellm.recipe import LinearRecipe
from spikellm.recipe.load import load_recipe

GPTQ = "algorithm.start={name: gptq, search_range: true, compensate: true}"
LEARNS = ("algorithm.epochs=3", "algorithm.weight_rate=0.006")
GROUPED = ("weights.bits=2", "weights.group_size=20")  # 192 and 512 columns are no multiple


def convert(
    text_file: Path, *settings: str, recipe: str = "rtn-w2a16", blocks: int = 1, **keywords: Any
) -> tuple[Any, spikellm.Conversion]:
    model, tokenizer = first_blocks(blocks)
    given = {"samples": 8, "seqlen": 64, "settings": settings, **keywords}
    return model, spikellm.convert(model, tokenizer, recipe, str(text_file), **given)


def same_bytes(one: Any, other: Any) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize(
    ("start", "settings"),
    [
        ("rtn", GROUPED),
        ("gptq", ("weights.bits=2", "weights.salient_rate=0.1", "weights.salient_steps=2")),
        ("{name: gptq, compensate: true}", ("weights={format: ternary, budget: 1.4}",)),
    ],
)
def test_no_epochs_keep_every_byte_of_the_start(
    start: str, settings: tuple[str, ...], text_file: Path
) -> None:
    plain, _ = convert(text_file, *settings, f"algorithm={start}")
    kept, _ = convert(
        text_file, *settings, f"algorithm={{name: block-ap, epochs: 0, start: {start}}}"
    )
    assert same_bytes(plain, kept)


def test_a_start_that_nothing_improves_keeps_its_bytes(
    text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = convert(text_file, "algorithm=gptq")
    monkeypatch.setattr(Learning, "_epoch", lambda *_: 1.0)
    kept, result = convert(text_file, "algorithm={name: block-ap, start: gptq}")
    assert same_bytes(plain, kept)
    assert result.blocks[0].notes == [
        "no loss was lowered; learned again at 0.25 of the rates",
        "no loss was lowered; learned again at 0.0625 of the rates",
        "learning lowered no loss, so the start is kept; lower algorithm.weight_rate and"
        " algorithm.scale_rate",
    ]


def losses(text_file: Path, *settings: str) -> Iterator[float]:
    """Of the start, and of what is learned, on so much text that GPTQ learns none by heart."""
    for learns in (("algorithm.epochs=0",), LEARNS):
        given = ("algorithm=block-ap", *learns, *settings)
        _, result = convert(text_file, *given, samples=48)
        yield result.blocks[-1].loss


@pytest.mark.parametrize(
    "settings",
    [
        ("algorithm.start=rtn", *GROUPED),
        (GPTQ, *GROUPED),
        (GPTQ, "weights.bits=2", "activations={bits: 4, salient_rate: 0.1, salient_steps: 2}"),
        (GPTQ, "weights={bits: 3, symmetric: true, salient_rate: 0.1, salient_steps: 2}"),
        (
            "algorithm.start={name: gptq, compensate: true}",
            "weights={format: ternary, budget: 1.4, group_size: 64}",
        ),
    ],
    ids=["rtn", "gptq", "spikes", "symmetric", "ternary"],
)
def test_learning_lowers_the_loss_of_the_last_block(
    settings: tuple[str, ...], text_file: Path
) -> None:
    start, learned = losses(text_file, *settings)
    assert learned < 0.985 * start


def test_values_are_learned_as_published(text_file: Path) -> None:
    _, start = convert(text_file, *GROUPED)
    published = "{name: block-ap, start: rtn, learn: values, weight_rate: 5e-4, scale_rate: 1e-3}"
    _, learned = convert(text_file, *GROUPED, f"algorithm={published}", "algorithm.epochs=8")
    assert learned.blocks[-1].loss < 0.9 * start.blocks[-1].loss


def test_spikes_of_attention_are_in_the_loop(text_file: Path) -> None:
    """Q, K and V are coded while the block learns, so what it learns is another."""
    settings = ("algorithm=block-ap", "algorithm.start=rtn", *LEARNS)
    coded = "attention={query: {bits: 3}, key: {bits: 3}, value: {bits: 3}}"
    plain, _ = convert(text_file, *settings)
    spiking, _ = convert(text_file, *settings, coded)
    scales = [one.model.layers[0].self_attn.q_proj.weight_scale for one in (plain, spiking)]
    assert not torch.equal(*scales)


@pytest.mark.parametrize("form", [{"bits": 3}, {"bits": 2, "symmetric": True, "group_size": 7}])
@pytest.mark.parametrize("by_value", [True, False])
def test_a_layer_starts_with_its_own_bits(form: dict[str, Any], *, by_value: bool) -> None:
    dense = torch.nn.Linear(20, 6).requires_grad_(False)
    settings = LinearRecipe.model_validate({"weights": form, "activations": {"bits": 16}})
    layer = fit(dense, settings)
    learnable = learned_layer.LearnableLayer(layer, dense.weight, by_value=by_value)
    assert torch.equal(learnable.value(learnable.start), layer.dense_weight())
    same = learnable.layer(learnable.start)
    assert all(
        torch.equal(one, other) for one, other in zip(same.buffers(), layer.buffers(), strict=True)
    )


@pytest.mark.parametrize("by_value", [True, False])
def test_what_a_layer_learns_is_what_it_becomes(*, by_value: bool) -> None:
    """Whatever scales and zero-points come to; steps of columns stay, in their order."""
    torch.manual_seed(0)
    dense = torch.nn.Linear(20, 6).requires_grad_(False)
    form = {"bits": 2, "group_size": 8, "salient_rate": 0.2, "salient_steps": 2}
    settings = LinearRecipe.model_validate({"weights": form, "activations": {"bits": 16}})
    layer = fit(dense, settings, torch.randn(50, 20))
    learnable = learned_layer.LearnableLayer(layer, dense.weight, by_value=by_value)
    weight, scale, zero = learnable.start
    assert zero is not None
    moved = learned_layer.LearnedLayer(
        weight + torch.randn_like(weight) * weight.std(),
        scale * torch.randn_like(scale),  # some are not even positive
        zero + 5 * torch.randn_like(zero),
    )
    made = learnable.layer(moved)
    assert torch.equal(learnable.value(moved), made.dense_weight())
    assert made.validation_error() is None
    assert bool((made.weight_scale > 0).all())
    assert torch.equal(made.get_buffer("column_steps"), layer.get_buffer("column_steps"))


def test_same_seed_same_bytes_and_resumed_the_same(text_file: Path, tmp_path: Path) -> None:
    def stop(progress: Any) -> None:
        if progress.index == 1:
            raise KeyboardInterrupt

    settings = ("algorithm=block-ap", *LEARNS, GPTQ, "algorithm.norms=true")
    with pytest.raises(KeyboardInterrupt):
        convert(text_file, *settings, blocks=2, journal=tmp_path / "journal", on_block=stop)
    resumed, _ = convert(text_file, *settings, blocks=2, journal=tmp_path / "journal")
    whole, _ = convert(text_file, *settings, blocks=2)
    assert same_bytes(resumed, whole)


def test_norms_are_learned_where_asked_for(text_file: Path, tmp_path: Path) -> None:
    original, tokenizer = first_blocks()
    before = original.model.layers[0].input_layernorm.weight
    settings = ("algorithm=block-ap", *LEARNS, "algorithm.start=rtn")
    without, _ = convert(text_file, *settings)
    assert torch.equal(without.model.layers[0].input_layernorm.weight, before)
    model, _ = convert(text_file, *settings, "algorithm.norms=true", "algorithm.scale_rate=0.05")
    learned = model.model.layers[0].input_layernorm.weight
    assert not torch.equal(learned, before)
    spikellm.save(model, tokenizer, tmp_path / "out")
    loaded, _ = spikellm.load(tmp_path / "out")
    assert torch.equal(loaded.model.layers[0].input_layernorm.weight, learned)


def test_heavy_tokens_do_not_rule_the_loss(text_file: Path) -> None:
    """Tokens weigh as they do in Hessians."""
    settings = ("algorithm=block-ap", *LEARNS, "algorithm.start=rtn")
    equal, _ = convert(text_file, *settings)
    robust, _ = convert(text_file, *settings, "calibration.token_weights=robust")
    assert not same_bytes(equal, robust)


@pytest.mark.parametrize("family", by_family(["gemma", "opt", "gpt2"]))
def test_other_families(family: str, text_file: Path, tokens: Tensor, tmp_path: Path) -> None:
    model, tokenizer = build(family), first_blocks()[1]
    settings = (
        "algorithm={name: block-ap, start: gptq, epochs: 1, norms: true}",
        "activations={bits: 4, salient_rate: 0.1, salient_steps: 2}",
    )
    spikellm.convert(
        model, tokenizer, "rtn-w2a16", str(text_file), samples=2, seqlen=24, settings=settings
    )
    spikellm.save(model, tokenizer, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(
            spikellm.load(tmp_path / "out")[0](tokens, use_cache=False).logits,
            model(tokens, use_cache=False).logits,
        )


def test_rotated_layers_learn(text_file: Path) -> None:
    rotated = "transforms=[{name: online-rotation, layers: [down]}]"
    start, learned = losses(text_file, GPTQ, rotated, "weights.bits=2", "activations.bits=4")
    assert learned < 0.985 * start


def test_a_format_without_gradients_is_refused(text_file: Path) -> None:
    with pytest.raises(RequestError, match="'block-ap' fits weight codes of kind affine or tern"):
        convert(text_file, "algorithm=block-ap", recipe="pbllm-90")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("algorithm.start=omniquant", "'omniquant' is no start for block-ap; set start to rtn or"),
        ("algorithm.start={name: gptq, steps: 3}", "start.steps"),
        ("algorithm={name: block-ap, weight_rate: 0, scale_rate: 0}", "nothing is learned"),
        ("algorithm={name: block-ap, epochs: 0, weight_rate: 0.5}", "weight_rate would have no"),
        ("algorithm={name: block-ap, start: {name: gptq, rounds: 3}}", "rounds would have no eff"),
    ],
)
def test_recipes_are_checked(setting: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("rtn-w2a16", ["algorithm=block-ap", setting])


def test_rounding_to_nearest_starts_no_ternary_weights() -> None:
    with pytest.raises(RecipeError, match="'rtn' fits weight codes of kind affine"):
        load_recipe("ternary-1.4", ["algorithm={name: block-ap, start: rtn}"])


def test_the_output_projection_gets_the_start(
    tokenizer: Any, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Learning, "from_start", lambda _, start: start)
    heads = []
    for algorithm in ("{name: gptq, compensate: true}", "{name: block-ap, epochs: 1}"):
        model = build("llama")
        settings = (
            "lm_head=true",
            f"algorithm={algorithm}",
            "overrides=[{match: 'model.layers.1.*', skip: true}]",
        )
        spikellm.convert(
            model, tokenizer, "rtn-w2a16", str(text_file), samples=2, seqlen=24, settings=settings
        )
        heads.append(model.lm_head)
    assert isinstance(heads[0], SpikingLinear)
    assert same_bytes(*heads)
