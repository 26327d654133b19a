from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.func import functional_call

from families import FAMILIES, GATED, OWN_ATTENTION, build, by_family
from spikellm.conversion.block_runner import BlockRunner
from spikellm.models.attention_interface import find_attention, use_interface
from spikellm.models.families import find_blocks
from spikellm.nn.attention import HeadShape
from spikellm.transforms.pairs import find_pairs
from spikellm.transforms.smoothing import Pair, Scaling, State, apply_pairs, holds, smooth_scale

ALL = ("norm", "value-output", "up-down", "query-key")


class Runner(torch.nn.Module):
    def __init__(self, block: torch.nn.Module, state: State) -> None:
        super().__init__()
        self.block, self.state = block, state

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return functional_call(self.block, self.state, arguments, keywords)


def pairs_of(model: Any) -> tuple[list[Pair], list[str], torch.nn.Module, Any]:
    with torch.no_grad():
        use_interface(model)
        shape: HeadShape = next(iter(find_attention(model).values()))
        windows = torch.randint(2, 2000, (2, 16), generator=torch.Generator().manual_seed(0))
        runner = BlockRunner(model, find_blocks(model), windows)
        block = find_blocks(model).modules[0]

        def run(module: torch.nn.Module, state: State) -> torch.Tensor:
            return runner.forward(0, Runner(module, state), next(runner.first_inputs()))

        kept, dropped = find_pairs(block, shape, ALL, run, seed=1)
    return kept, dropped, block, run


EXPECTED: dict[str, set[str]] = {
    "llama": {
        "input_layernorm -> q_proj, k_proj, v_proj",
        "post_attention_layernorm -> gate_proj, up_proj",
        "v -> o",
        "up-down",
        "q <-> k",
    },
    "qwen2": {
        "input_layernorm -> q_proj, k_proj, v_proj",
        "post_attention_layernorm -> gate_proj, up_proj",
        "v -> o",
        "up-down",
        "q <-> k",
    },
    "gemma": {
        "input_layernorm -> q_proj, k_proj, v_proj",
        "post_attention_layernorm -> gate_proj, up_proj",
        "v -> o",
        "up-down",
        "q <-> k",
    },
    "qwen3": {
        "input_layernorm -> q_proj, k_proj, v_proj",
        "post_attention_layernorm -> gate_proj, up_proj",
        "v -> o",
        "up-down",
    },
    "gemma3": {
        "input_layernorm -> q_proj, k_proj, v_proj",
        "pre_feedforward_layernorm -> gate_proj, up_proj",
        "v -> o",
        "up-down",
    },
    "phi3": {"input_layernorm -> qkv_proj", "post_attention_layernorm -> gate_up_proj"},
    "opt": {
        "self_attn_layer_norm -> q_proj, k_proj, v_proj",
        "final_layer_norm -> fc1",
        "v -> o",
        "q <-> k",
    },
}


@pytest.mark.parametrize("family", by_family(EXPECTED))
def test_pairs_of_a_family(family: str) -> None:
    kept, dropped, _, _ = pairs_of(build(family))
    assert {pair.name for pair in kept} == EXPECTED[family]
    assert set(dropped).isdisjoint(EXPECTED[family])


@pytest.mark.parametrize(
    "family", by_family(name for name in FAMILIES if name not in OWN_ATTENTION | {"gpt2"})
)
def test_whatever_is_kept_changes_nothing(family: str) -> None:
    """All kept pairs together, with large random scales, in the whole block."""
    kept, _, block, run = pairs_of(build(family))
    state: State = {name: parameter.detach() for name, parameter in block.named_parameters()}
    scales = {
        pair.name: torch.exp(torch.randn(pair.length, generator=torch.Generator().manual_seed(3)))
        for pair in kept
    }
    with torch.no_grad():
        torch.testing.assert_close(
            run(block, apply_pairs(state, kept, scales)), run(block, state), rtol=1e-3, atol=1e-3
        )


def test_a_pair_that_does_not_hold_is_dropped_and_named() -> None:
    """Norms behind the branch instead of before it: dividing the norm does not cancel."""
    _, dropped, _, _ = pairs_of(build("qwen3"))
    assert "q <-> k" in dropped, "norms of q and k stand between"


def test_untied_rotary_dimensions_would_not_hold() -> None:
    kept, _, block, run = pairs_of(build("llama"))
    tied = next(pair for pair in kept if pair.name == "q <-> k")
    free = [
        scaling._replace(spread=torch.arange(len(scaling.spread)) % 20) for scaling in tied.scalings
    ]
    assert holds(block, tied, run, 5)
    assert not holds(block, tied._replace(length=20, scalings=tuple(free)), run, 5)


def test_scaling_of_one_plus_weight() -> None:
    state = {"w": torch.tensor([0.0, 1.0, -0.5])}
    pair = Pair("p", 3, (Scaling("w", 0, -1, torch.arange(3), 1.0),))
    assert apply_pairs(state, [pair], {"p": torch.tensor([2.0, 4.0, 0.5])})["w"].tolist() == [
        -0.5,
        -0.5,
        0.0,
    ]


def test_smooth_scale() -> None:
    x, w = torch.tensor([100.0, 1.0, 0.0, 4.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    scale = smooth_scale(x, w, 0.5)
    assert float(scale[0] / scale[1]) == pytest.approx(10)
    assert scale[2:].tolist() == [1, 1], "dead channels are left"
    flat = smooth_scale(torch.tensor([3.0, 5.0]), torch.tensor([2.0, 7.0]), 0.0) / smooth_scale(
        torch.tensor([1.0, 1.0]), torch.tensor([2.0, 7.0]), 0.0
    )
    torch.testing.assert_close(flat, torch.ones(2))


def test_missing_parameter_does_not_hold() -> None:
    _, _, block, run = pairs_of(build("llama"))
    assert not holds(
        block,
        Pair("p", 1, (Scaling("nothing.weight", 0, 1, torch.zeros(1, dtype=torch.long)),)),
        run,
        0,
    )


def test_grouped_query_heads_share_a_scale() -> None:
    kept, _, _, _ = pairs_of(
        transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**GATED, head_dim=10)
        ).eval()
    )
    output = next(pair for pair in kept if pair.name == "v -> o").scalings[-1]
    assert (
        output.spread.view(4, 10)[0].tolist()
        == output.spread.view(4, 10)[1].tolist()
        == list(range(10))
    )
    assert output.spread.view(4, 10)[2].tolist() == list(range(10, 20))
