from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

import spikellm
from families import GATED, by_family, randomized
from spikellm.conversion.estimate import find_units
from spikellm.core.errors import NumericalError, UnsupportedModelError
from spikellm.data.shards import shard_windows
from spikellm.models.experts import every_expert_sees_every_token, fuse_again, unfuse_experts
from spikellm.models.families import find_blocks, linear_layers
from spikellm.models.plan import plan_blocks
from spikellm.models.prepare import prepared
from spikellm.nn.execution import set_execution_mode
from spikellm.nn.linear import SpikingLinear
from spikellm.observers.sensitivity import output_sensitivity
from spikellm.recipe.load import load_recipe

MIXTURES: dict[str, Any] = {
    "mixtral": lambda: t.MixtralConfig(**GATED, num_local_experts=4),
    "qwen3_moe": lambda: t.Qwen3MoeConfig(
        **GATED, head_dim=12, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20
    ),
    "qwen2_moe": lambda: t.Qwen2MoeConfig(
        **GATED,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=20,
        shared_expert_intermediate_size=24,
    ),
    "gpt_oss": lambda: t.GptOssConfig(
        **GATED, head_dim=12, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    ),
    "deepseek_v3": lambda: t.DeepseekV3Config(
        **{**GATED, "num_key_value_heads": 4},
        q_lora_rank=16,
        kv_lora_rank=12,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=20,
        first_k_dense_replace=1,
    ),
}
ALONE = {"gate", "router", "shared_expert_gate"}


def mixture(family: str) -> Any:
    return randomized(t.AutoModelForCausalLM.from_config(MIXTURES[family]()))


@pytest.mark.parametrize("family", by_family(MIXTURES))
def test_taken_apart_it_computes_the_same(family: str, tokens: torch.Tensor) -> None:
    model = mixture(family)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        expected = model(tokens).logits
        implementation = model.config._experts_implementation
        taken = unfuse_experts(model)
        assert taken
        assert not any(parameter.dim() == 3 for parameter in model.parameters())
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
        with every_expert_sees_every_token():
            torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
        fuse_again(model, taken, implementation)
        assert torch.equal(model(tokens).logits, expected)
    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == {
        n: tuple(p.shape) for n, p in before.items()
    }


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_experts_that_read_one_tensor_are_estimated_with_one_sample(family: str) -> None:
    """Also where the first block has no experts."""
    model = mixture(family)
    with prepared(model, attention=False):
        blocks = find_blocks(model)
        plan = plan_blocks(model, blocks, load_recipe("w4a4-t2"))
        last = find_units(model, blocks.modules, plan, None, lambda settings: True)[-1]
        experts = [name for name in last.plan.linears if ".experts." in name]
        assert len(experts) > 2
        assert last.inputs.count(20) == len([name for name in experts if ".down." in name]) + (
            family == "deepseek_v3"
        )
        assert last.inputs.count(40) == {"qwen3_moe": 2, "deepseek_v3": 3}[family], (
            "attention, experts, and a view that shared experts read"
        )


@pytest.mark.parametrize("family", by_family(MIXTURES))
@pytest.mark.parametrize("recipe", ["w4a4-t2", "spike-w4a4-t2"])
def test_every_expert_is_converted_and_reloads(
    family: str, recipe: str, tokenizer: Any, text_file: Path, tmp_path: Path, tokens: torch.Tensor
) -> None:
    model = mixture(family)
    router = {
        name: parameter.clone()
        for name, parameter in model.named_parameters()
        if ALONE & set(name.split("."))
    }
    settings = ["omniquant.epochs=1"] if recipe == "spike-w4a4-t2" else []
    result = spikellm.convert(
        model,
        tokenizer,
        recipe,
        str(text_file),
        samples=2,
        seqlen=24,
        settings=[*settings, "activations.salient_rate=0.2"],
    )
    experts = [layer for layer in result.summary.layers if ".experts." in layer.name]
    assert experts
    assert all(layer.spiking for layer in experts)
    dense = {layer.name.rpartition(".")[2] for layer in result.summary.layers if not layer.spiking}
    assert dense <= {"lm_head", *ALONE}
    assert all(torch.equal(model.get_parameter(name), value) for name, value in router.items())
    spikellm.save(model, tokenizer, tmp_path / "out")
    loaded, _ = spikellm.load(tmp_path / "out")
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        assert torch.equal(loaded(tokens, use_cache=False).logits, expected)
        set_execution_mode(loaded, "binary")
        assert torch.equal(loaded(tokens, use_cache=False).logits, expected)


def test_experts_share_the_choice_of_input_channels_and_choose_their_own_behind_it(
    tokenizer: Any, text_file: Path
) -> None:
    model = mixture("qwen3_moe")
    spikellm.convert(
        model,
        tokenizer,
        "w4a4-t2",
        str(text_file),
        samples=2,
        seqlen=24,
        settings=["activations.salient_rate=0.2"],
    )
    experts = model.model.layers[0].mlp.experts
    first = experts.gate_up[0]
    assert isinstance(first, SpikingLinear)
    assert int((first.channel_group > 0).sum()) == 8
    assert all(
        torch.equal(other.channel_group, first.channel_group) for other in experts.gate_up
    ), "one population feeds them all"
    assert len({tuple(other.channel_group.tolist()) for other in experts.down}) > 1


def test_experts_the_router_never_asks_are_observed_too(tokenizer: Any, text_file: Path) -> None:
    model = mixture("mixtral")
    model.model.layers[0].mlp.gate.weight.data[3] = (
        -100 * model.model.layers[0].mlp.gate.weight.data[0].sign()
    )
    result = spikellm.convert(
        model,
        tokenizer,
        "w4a4-t2",
        str(text_file),
        samples=1,
        seqlen=4,
        settings=["activations.salient_rate=0.2"],
    )
    assert all(
        layer.salient_channels > 0 for layer in result.summary.layers if ".experts." in layer.name
    )


def test_after_an_error_experts_are_fused_as_before(
    tokenizer: Any, text_file: Path, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mixture("mixtral")
    with torch.no_grad():
        expected = model(tokens).logits

    def fail(*_: Any) -> None:
        raise NumericalError("made up")

    monkeypatch.setattr("spikellm.conversion.steps.record_of", fail)
    with pytest.raises(NumericalError, match="made up"):
        spikellm.convert(model, tokenizer, "w4a4-t2", str(text_file), samples=1, seqlen=8)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected)


def test_latent_attention_generates_with_the_latents_in_the_cache(
    tokenizer: Any, text_file: Path, tokens: torch.Tensor
) -> None:
    model = mixture("deepseek_v3")
    spikellm.convert(
        model,
        tokenizer,
        "w8a8",
        str(text_file),
        samples=2,
        seqlen=24,
        settings=["attention={query: {bits: 4}, key: {bits: 4}, value: {bits: 4}}"],
    )
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, model(tokens, use_cache=False).logits)
        cached, plain = (
            model.generate(tokens, max_new_tokens=5, do_sample=False, use_cache=use)
            for use in (True, False)
        )
    assert torch.equal(cached, plain)


def test_routers_inside_modules_stay_as_they_are() -> None:
    block = find_blocks(mixture("mixtral")).modules[0]
    with torch.no_grad():
        block.mlp.gate = torch.nn.Sequential(torch.nn.LayerNorm(40), torch.nn.Linear(40, 4))
    model = torch.nn.Module()
    model.block = block
    model.set_experts_implementation = lambda _: None
    unfuse_experts(model)
    assert not any("gate." in name and "gate_up" not in name for name in linear_layers(block))


def test_experts_out_of_reach_are_refused_not_left_dense() -> None:
    block = find_blocks(mixture("mixtral")).modules[0]
    with pytest.raises(
        UnsupportedModelError,
        match=r"mlp.experts.gate_up_proj in a MixtralExperts.*would stay dense",
    ):
        linear_layers(block)


@pytest.mark.parametrize("family", by_family(MIXTURES))
def test_a_budget_over_all_experts(family: str, tokenizer: Any, text_file: Path) -> None:
    """Experts weigh by what they do for the tokens that are sent to them.

    One without tokens gets no step above the first.
    """
    model = mixture(family)
    unfuse_experts(model)
    blocks = find_blocks(model)
    names = [
        f"{blocks.name}.{i}.{name}"
        for i, block in enumerate(blocks.modules)
        for name in linear_layers(block)
        if ".experts." in name
    ]
    found = output_sensitivity(model, shard_windows(torch.full((1, 2), 5), 1), names)
    assert any(not bool(value.any()) for value in found.values())
    assert any(bool(value.any()) for value in found.values())
    model = mixture(family)
    result = spikellm.convert(model, tokenizer, "ternary-1.7", str(text_file), samples=2, seqlen=24)
    assert result.summary.average_steps == pytest.approx(1.7, abs=0.02)
