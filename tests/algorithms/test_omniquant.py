from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import spikellm
from conftest import first_blocks
from families import build, by_family
from layers import fit
from spikellm.algorithms.learning import Learning
from spikellm.core.errors import NumericalError, RecipeError
from spikellm.nn.fake_quant import FakeQuantLinear, InputCoder
from spikellm.recipe import LinearRecipe
from spikellm.recipe.load import load_recipe

FAST = ("algorithm.epochs=3", "algorithm.let_rate=0.01", "algorithm.lwc_rate=0.05")


def convert(
    recipe: str, text_file: Path, *settings: str, model: Any = None, **keywords: Any
) -> tuple[Any, spikellm.Conversion]:
    loaded, tokenizer = first_blocks()
    loaded = model if model is not None else loaded
    return loaded, spikellm.convert(
        loaded,
        tokenizer,
        recipe,
        str(text_file),
        samples=8,
        seqlen=64,
        settings=settings,
        **keywords,
    )


@pytest.mark.parametrize(
    "activations",
    [
        {"bits": 4},
        {"bits": 3, "symmetric": True},
        {"bits": 2, "neuron": "ternary", "symmetric": True, "steps": 2},
        {"bits": 4, "salient_rate": 0.2, "salient_steps": 2},
        {
            "bits": 4,
            "salient_rate": 0.2,
            "salient_steps": 3,
            "thresholds": "shared",
            "saliency": "rms",
        },
        {"bits": 16},
    ],
)
def test_surrogate_computes_what_the_spiking_layer_does(activations: dict[str, Any]) -> None:
    settings = LinearRecipe.model_validate({"weights": {"bits": 8}, "activations": activations})
    sample = torch.randn(50, 20)
    sample[:, 3] *= 30
    layer = fit(torch.nn.Linear(20, 6).requires_grad_(False), settings, sample)
    surrogate = FakeQuantLinear(layer.dense_weight(), layer.bias)
    if settings.activations.spiking:
        surrogate.coder = InputCoder(settings.activations, layer.channel_group)
    x = torch.randn(3, 7, 20, requires_grad=True)
    torch.testing.assert_close(surrogate(x), layer(x), rtol=1e-4, atol=1e-4)
    surrogate(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dense_weight().sum(0).expand(3, 7, 20))


def test_training_lowers_the_loss_of_every_block(text_file: Path) -> None:
    _, start = convert(
        "omniquant-w4a4",
        text_file,
        "algorithm.epochs=1",
        "algorithm.let_rate=1e-9",
        "algorithm.lwc_rate=1e-9",
    )
    _, trained = convert("omniquant-w4a4", text_file, *FAST[1:], "algorithm.epochs=6")
    assert trained.blocks[0].loss < start.blocks[0].loss
    assert trained.blocks[-1].loss < 0.97 * start.blocks[-1].loss


def test_steps_for_salient_channels_lower_it_further(text_file: Path) -> None:
    _, plain = convert("omniquant-w4a4", text_file, *FAST)
    _, spikes = convert("spike-w4a4-t2", text_file, *FAST)
    assert spikes.blocks[-1].loss < plain.blocks[-1].loss
    assert spikes.summary.average_steps == pytest.approx(1.1, abs=0.01)


def test_scales_cancel_where_bits_abound(text_file: Path) -> None:
    """At 8 bits the smoothed model is the original, so norms and layers took over the same scales.

    Norms did change.
    """
    model, result = convert(
        "smoothquant-w4a4", text_file, "weights.bits=8", "activations.bits=8", "attention={}"
    )
    original, _ = first_blocks()
    tokens = torch.randint(2, 2000, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        error = (model(tokens).logits - original(tokens).logits).float().norm() / original(
            tokens
        ).logits.float().norm()
    assert float(error) < 0.03
    assert not torch.equal(
        model.model.layers[0].input_layernorm.weight,
        original.model.layers[0].input_layernorm.weight,
    )
    assert all(block.dropped == [] for block in result.blocks)


def test_hard_model_converts_like_the_easy_one(text_file: Path) -> None:
    """2% of the channels of each norm times 8, 16 or 32 and the following columns divided: the same
    function, with outliers.
    """
    easy, _ = first_blocks()
    easy = easy.float()
    hard, tokenizer = first_blocks()
    hard = hard.float()
    generator = torch.Generator().manual_seed(0)
    for layer in hard.model.layers:
        for norm, readers in (
            (layer.input_layernorm, "qkv"),
            (layer.post_attention_layernorm, ("gate", "up")),
        ):
            chosen = torch.randperm(192, generator=generator)[:4]
            factor = torch.tensor([8.0, 16.0, 32.0, 8.0])
            norm.weight.data[chosen] *= factor
            parent = layer.self_attn if readers == "qkv" else layer.mlp
            for reader in readers:
                getattr(parent, f"{reader}_proj").weight.data[:, chosen] /= factor
    tokens = torch.randint(2, 2000, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(hard(tokens).logits, easy(tokens).logits, rtol=1e-3, atol=1e-3)
    values = []
    for model in (easy, hard):
        spikellm.convert(
            model, tokenizer, "omniquant-w4a4", str(text_file), samples=16, seqlen=64, settings=FAST
        )
        values.append(spikellm.perplexity(model, tokenizer, str(text_file), limit=20).value)
    assert values[1] <= 1.05 * values[0]


def test_each_part_can_be_switched_off(text_file: Path) -> None:
    original, _ = first_blocks()
    without_let, result = convert(
        "omniquant-w4a4",
        text_file,
        "algorithm.epochs=3",
        "algorithm.lwc_rate=0.05",
        "algorithm.let=false",
    )
    assert torch.equal(
        without_let.model.layers[0].input_layernorm.weight,
        original.model.layers[0].input_layernorm.weight,
    )
    without_lwc, other = convert(
        "omniquant-w4a4",
        text_file,
        "algorithm.epochs=3",
        "algorithm.let_rate=0.01",
        "algorithm.lwc=false",
    )
    assert result.blocks[-1].loss != other.blocks[-1].loss
    _, coarse = convert("omniquant-w4a4", text_file, *FAST, "algorithm.batch_size=5")
    assert coarse.blocks[0].loss != convert("omniquant-w4a4", text_file, *FAST)[1].blocks[0].loss
    some, _ = convert("omniquant-w4a4", text_file, *FAST, "algorithm.pairs=[value-output]")
    assert torch.equal(
        some.model.layers[0].input_layernorm.weight, original.model.layers[0].input_layernorm.weight
    )
    assert not torch.equal(
        without_lwc.model.layers[0].input_layernorm.weight,
        original.model.layers[0].input_layernorm.weight,
    )


def test_loss_that_is_not_finite_restores_lowers_and_retries(
    text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    original = Learning._epoch

    def epoch(self: Any, learned: Any, optimizer: torch.optim.Optimizer) -> float:
        rates.append(optimizer.param_groups[-1]["lr"])
        return float("nan") if len(rates) == 2 else original(self, learned, optimizer)

    monkeypatch.setattr(Learning, "_epoch", epoch)
    _, result = convert("omniquant-w4a4", text_file, *FAST)
    assert result.blocks[0].notes == [
        "the loss was NaN or infinite in epoch 2; learned again at 0.5 of the rates"
    ]
    assert rates[:2] == [0.05, 0.05]
    assert rates[2:5] == [0.025] * 3, "the block starts again from its best state at half the rate"
    assert rates[5] == 0.05, "the next block does not suffer"


def test_a_step_into_nothing_is_taken_back(text_file: Path) -> None:
    """The first epoch's loss is finite, measured before its only step, which is so long that every
    loss after it is NaN.
    """
    _, result = convert(
        "omniquant-w4a4",
        text_file,
        "algorithm.let_rate=150",
        "algorithm.epochs=2",
        "algorithm.lwc=false",
        "algorithm.batch_size=64",
    )
    assert all(math.isfinite(block.loss) for block in result.blocks)


def test_loss_that_never_gets_finite_names_block_and_epoch(
    text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Learning, "_epoch", lambda *_: float("inf"))
    model, tokenizer = first_blocks()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        NumericalError, match=r"block model\.layers\.0 is NaN or infinite in epoch 1"
    ):
        spikellm.convert(model, tokenizer, "omniquant-w4a4", str(text_file), samples=1, seqlen=16)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()), (
        "the model is as it was"
    )


@pytest.mark.parametrize("family", by_family(["gemma", "qwen3", "phi3", "opt", "gpt_neox", "gpt2"]))
def test_other_families(family: str, text_file: Path, tmp_path: Path, tokens: torch.Tensor) -> None:
    model = build(family)
    tokenizer = first_blocks()[1]
    settings = (
        "algorithm.epochs=1",
        "activations.salient_rate=0.2",
        "algorithm.pairs=[norm, value-output, up-down, query-key]",
    )
    spikellm.convert(
        model, tokenizer, "spike-w4a4-t2", str(text_file), samples=2, seqlen=24, settings=settings
    )
    spikellm.save(model, tokenizer, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(
            spikellm.load(tmp_path / "out")[0](tokens, use_cache=False).logits,
            model(tokens, use_cache=False).logits,
        )


def test_resumed_gives_the_same_bytes(text_file: Path, tmp_path: Path) -> None:
    def stop(progress: Any) -> None:
        if progress.index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert("spike-w4a4-t2", text_file, *FAST, journal=tmp_path / "journal", on_block=stop)
    resumed, _ = convert("spike-w4a4-t2", text_file, *FAST, journal=tmp_path / "journal")
    whole, _ = convert("spike-w4a4-t2", text_file, *FAST)
    for (name, one), (other_name, other) in zip(
        resumed.state_dict().items(), whole.state_dict().items(), strict=True
    ):
        assert name == other_name
        assert torch.equal(one, other), name


@pytest.mark.parametrize(
    ("preset", "setting", "message"),
    [
        ("rtn-w4a4", "algorithm.epochs=3", "epochs is an option of 'block-ap' and 'omniquant'"),
        ("omniquant-w4a4", "omniquant={let: false, lwc: false}", "nothing is left of omniquant"),
        ("omniquant-w4a4", "algorithm.epochs=0", "lwc is learned"),
        ("omniquant-w4a4", "algorithm.pairs=[up]", "value-output"),
        ("omniquant-w4a4", "algorithm.let_rate=0", "greater than 0"),
    ],
)
def test_recipes_are_checked(preset: str, setting: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(preset, [setting])


def test_accumulated_gradients_are_those_of_a_larger_batch(text_file: Path) -> None:
    """Of all windows, since the parts of smaller steps lie evenly over the text.

    In float32, where sums differ in the last bits alone.
    """
    together, added, single = (
        convert(
            "omniquant-w4a4",
            text_file,
            "algorithm.epochs=1",
            *settings,
            model=first_blocks()[0].float(),
        )[1]
        for settings in (
            ("algorithm.batch_size=8",),
            ("algorithm.batch_size=1", "algorithm.accumulate=8"),
            ("algorithm.batch_size=1",),
        )
    )
    assert added.blocks[0].loss == pytest.approx(together.blocks[0].loss, rel=1e-5)
    assert abs(single.blocks[0].loss - together.blocks[0].loss) > 2 * abs(
        added.blocks[0].loss - together.blocks[0].loss
    )


def test_products_in_bfloat16_learn_nearly_as_well(text_file: Path) -> None:
    _, full = convert("omniquant-w4a4", text_file, *FAST)
    _, short = convert("omniquant-w4a4", text_file, *FAST, "algorithm.precision=bfloat16")
    assert short.blocks[-1].loss != full.blocks[-1].loss
    assert short.blocks[-1].loss < 1.05 * full.blocks[-1].loss


def test_weights_of_several_steps_lower_the_loss(text_file: Path) -> None:
    _, plain = convert("omniquant-w2a16", text_file, *FAST)
    _, spikes = convert("spike-w2a16", text_file, *FAST)
    assert spikes.blocks[-1].loss < plain.blocks[-1].loss
    assert spikes.summary.average_steps == pytest.approx(1.1, abs=0.01)


def test_what_is_learned_is_never_worse_than_its_start(text_file: Path) -> None:
    _, start = convert("smoothquant-w4a4", text_file)
    for epochs in (1, 2):
        _, learned = convert(
            "omniquant-w4a4",
            text_file,
            f"algorithm.epochs={epochs}",
            "algorithm.let_rate=2.0",
            "algorithm.lwc=false",
        )
        assert learned.blocks[0].loss <= 1.01 * start.blocks[0].loss


def test_pairs_that_touch_a_skipped_layer_are_dropped_and_it_stays(text_file: Path) -> None:
    original, _ = first_blocks()
    model, result = convert(
        "omniquant-w4a4", text_file, *FAST, "overrides=[{match: 're:.*(q|v)_proj', skip: true}]"
    )
    assert "v -> o" in result.blocks[0].dropped
    assert any(name.startswith("input_layernorm") for name in result.blocks[0].dropped)
    for name in ("q_proj", "v_proj"):
        assert torch.equal(
            getattr(model.model.layers[0].self_attn, name).weight,
            getattr(original.model.layers[0].self_attn, name).weight,
        )
