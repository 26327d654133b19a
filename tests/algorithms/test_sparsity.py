"""Weights of zero in the GPTQ pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spikellm
from budget import mostly_slow
from conftest import first_blocks
from spikellm.algorithms import gptq_options
from spikellm.algorithms.gptq_coders import column_coders
from spikellm.algorithms.gptq_layer import Target, fit_layer
from spikellm.algorithms.gptq_options import GptqOptions
from spikellm.algorithms.gptq_problem import GPTQProblem
from spikellm.algorithms.gptq_pruning import order_of_groups
from spikellm.core.errors import RecipeError, RequestError
from spikellm.nn.channels import Groups
from spikellm.nn.execution import spiking_linears
from spikellm.nn.linear import SpikingLinear
from spikellm.recipe import ActivationRecipe, LinearRecipe
from spikellm.recipe.load import load_recipe

COLUMNS, ROWS = 300, 24
WEIGHTS: dict[str, dict[str, Any]] = {
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4},
    "symmetric": {"bits": 4, "symmetric": True},
    "groups": {"bits": 3, "group_size": 64},
    "ternary": {"format": "ternary"},
    "steps": {"format": "ternary", "budget": 1.5},
}


def dense() -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(COLUMNS, ROWS, bias=False)
    layer.weight.data += 0.05  # ranges that are not about zero
    return layer


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5
    mixed = torch.randn(900, COLUMNS, generator=generator) @ (common + 0.3 * torch.eye(COLUMNS))
    return mixed * torch.logspace(-1, 0.5, COLUMNS)[torch.randperm(COLUMNS, generator=generator)]


def fitted(weights: dict[str, Any], **options: Any) -> SpikingLinear:
    x, group = inputs().double(), torch.zeros(COLUMNS, dtype=torch.uint8)
    group[::7] = 1  # so that stored columns are not in the channels' order
    activations = ActivationRecipe(bits=4, salient_rate=0.1, salient_steps=2)
    settings = LinearRecipe(weights=weights, activations=activations)
    target = Target(x.T @ x)
    return fit_layer("layer", dense(), settings, Groups(group, None), target, options_of(options))[
        0
    ]


def options_of(options: dict[str, Any]) -> GptqOptions:
    return GptqOptions(**options)


def error(layer: SpikingLinear) -> float:
    difference = inputs() @ (layer.dense_weight() - dense().weight.detach()).T
    return float(difference.square().sum())


def zeros(layer: SpikingLinear) -> Tensor:
    return layer.integer_weights() == 0


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("descents", [0, 3])
def test_zeros_are_as_many_as_asked_for_and_stay(weights: dict[str, Any], descents: int) -> None:
    for share in (0.5, 0.83):
        layer = fitted(weights, sparsity=share, descents=descents)
        found = int(zeros(layer).sum())
        assert found >= round(share * ROWS * COLUMNS)
        if weights == WEIGHTS["8 bits"]:
            assert found < round(share * ROWS * COLUMNS) + 100, "few others are rounded to zero"


@pytest.mark.parametrize("weights", [WEIGHTS["8 bits"], WEIGHTS["steps"]])
@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (5, 7)])
def test_n_of_every_m_stored_columns_are_zero(
    weights: dict[str, Any], order: bool, n: int, m: int
) -> None:
    for rule in ("second-order", "wanda", "magnitude"):
        options = {"pattern": f"{n}:{m}", "prune_by": rule, "activation_order": order}
        marks = zeros(fitted(weights, descents=2, **options))
        whole = COLUMNS // m * m
        groups = marks[:, :whole].view(ROWS, -1, m).sum(2)
        assert int(groups.min()) >= n
        if weights == WEIGHTS["8 bits"]:
            assert (groups == n).float().mean() > 0.9


def test_groups_are_coded_together_those_of_the_largest_inputs_first() -> None:
    power = torch.tensor([1.0, 2, 9, 7, 4, 5, 6, 6, 100, 3])
    grouped = order_of_groups(power, 4, by_power=True)
    assert grouped.tolist() == [6, 7, 5, 4, 2, 3, 1, 0, 8, 9]
    assert order_of_groups(power, 4, by_power=False).tolist() == list(range(10))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("bits", [4, 8])
def test_second_order_loses_less_than_wanda_and_wanda_less_than_magnitude(
    pattern: str, bits: int
) -> None:
    share = {"sparsity": 0.5} if pattern == "unstructured" else {"pattern": pattern}
    second, wanda, magnitude = (
        error(fitted({"bits": bits}, prune_by=rule, **share))
        for rule in ("second-order", "wanda", "magnitude")
    )
    assert second < 0.85 * wanda
    assert wanda < 0.9 * magnitude


def test_descents_lower_the_error_of_sparse_weights_too() -> None:
    for weights in (WEIGHTS["4 bits"], WEIGHTS["ternary"]):
        plain, descended = (
            error(fitted(weights, sparsity=0.6, descents=count)) for count in (0, 4)
        )
        assert descended < plain


def test_ranges_are_those_of_the_weights_that_remain() -> None:
    """A channel that never fires is pruned, and its weights widen no range."""
    x, layer = inputs().double(), dense()
    x[:, 5] = 0
    layer.weight.data[:, 5] = 3.0
    settings = LinearRecipe(weights={"bits": 4}, activations=ActivationRecipe(bits=16))
    groups = Groups(torch.zeros(COLUMNS, dtype=torch.uint8), None)
    scales = [
        fit_layer("layer", layer, settings, groups, Target(x.T @ x), options_of(options))[0]
        .weight_scale.max()
        .item()
        for options in ({"sparsity": 0.5}, {})
    ]
    assert scales[0] < 0.2 * scales[1]


def test_a_row_may_lose_everything() -> None:
    x, layer = inputs().double(), dense()
    layer.weight.data[3] *= 1e-4
    settings = LinearRecipe(weights={"bits": 4}, activations=ActivationRecipe(bits=16))
    groups = Groups(torch.zeros(COLUMNS, dtype=torch.uint8), None)
    found, _ = fit_layer(
        "layer", layer, settings, groups, Target(x.T @ x), GptqOptions(sparsity=0.3)
    )
    assert zeros(found)[3].all()
    assert torch.isfinite(found.weight_scale).all()


def test_a_coder_that_loses_zeros_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    affine = column_coders["affine"]

    class Shifted(affine):  # type: ignore[misc, valid-type]
        def code(self, problem: GPTQProblem) -> Any:
            weights = super().code(problem)
            return weights._replace(zero=weights.zero + 1)

    monkeypatch.setitem(column_coders._entries, "affine", Shifted)
    with pytest.raises(RequestError, match="made weights that are pruned other than zero"):
        fitted({"bits": 4}, sparsity=0.5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("algorithm.pattern=4:4",), "n < m and m of at most 128"),
        (("algorithm.pattern=2:200",), "n < m and m of at most 128"),
        (("algorithm.pattern=half",), "pattern"),
        (("algorithm.pattern=2:4", "algorithm.sparsity=0.6"), "has a sparsity of 0.5, not 0.6"),
        (("algorithm.pattern=2:4", "algorithm.sparsity_over=model"), "as many zeros everywhere"),
        (("algorithm.prune_by=wanda",), "prune_by has no effect without zeros"),
        (("algorithm.sparsity_over=model",), "sparsity_over has no effect without zeros"),
        (("algorithm.sparsity=1",), "less than 1"),
        (
            (
                "algorithm.sparsity=0.5",
                "algorithm.sparsity_over=model",
                "algorithm.prune_by=magnitude",
            ),
            "spends by second-order, not by magnitude",
        ),
        (
            ("weights={format: partly-binary, salient_rate: 0.1}", "algorithm.sparsity=0.5"),
            "hold zero",
        ),
        (
            ("algorithm={name: block-ap, start: {name: gptq, sparsity: 0.5}}",),
            "weights would not stay zero",
        ),
    ],
)
def test_what_cannot_be_is_refused(settings: tuple[str, ...], said: str) -> None:
    with pytest.raises(RecipeError, match=said) as refused:
        load_recipe("gptq-w4a16", settings)
    assert "\n" not in str(refused.value)


def test_recipes_without_zeros_are_saved_as_before(tmp_path: Path) -> None:
    algorithm = load_recipe("gptq-w4a16").model_dump(mode="json")["algorithm"]
    assert not {"sparsity", "pattern", "prune_by", "sparsity_over"} & set(algorithm)
    saved = load_recipe("gptq-w4a16", ("algorithm.pattern=2:4",)).model_dump(mode="json")
    assert saved["algorithm"]["pattern"] == "2:4"
    written = load_recipe("gptq-w4a16", ("algorithm.pattern=1:2",))
    (tmp_path / "mine.yaml").write_text(written.to_yaml())
    assert load_recipe(tmp_path / "mine.yaml").algorithm == written.algorithm


def convert(recipe: str, text_file: Path, *settings: str, **keywords: Any) -> tuple[Any, Any]:
    model, tokenizer = first_blocks()
    keywords = {"samples": 4, "seqlen": 64, **keywords}
    spikellm.convert(model, tokenizer, recipe, str(text_file), settings=settings, **keywords)
    return model, tokenizer


def density(model: Any) -> float:
    found = spikellm.api.summarize(model, density=True).weight_density
    assert found is not None
    return found


def test_zeros_are_shared_out_over_the_model_and_survive_a_reload(
    text_file: Path, tmp_path: Path
) -> None:
    model, tokenizer = convert("sparse-50-w4a4", text_file, "weights.bits=8")
    shares = [float(zeros(layer).float().mean()) for layer in spiking_linears(model).values()]
    assert 0.48 < density(model) <= 0.5
    assert max(shares) - min(shares) > 0.05, "layers differ"
    spikellm.save(model, tokenizer, tmp_path / "out")
    again, _ = spikellm.load(tmp_path / "out")
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items()
    )


@pytest.mark.parametrize(
    "recipe", mostly_slow(["sparse-50-ternary", "sparse-50-w4a16"], {"sparse-50-ternary"})
)
def test_resumed_it_ends_in_the_same_weights(recipe: str, text_file: Path, tmp_path: Path) -> None:
    class Stop(Exception):  # noqa: N818
        pass

    def stop(progress: Any) -> None:
        if progress.index == 1:
            raise Stop

    whole, _ = convert(recipe, text_file)
    assert density(whole) <= 0.5
    with pytest.raises(Stop):
        convert(recipe, text_file, journal=tmp_path / "journal", on_block=stop)
    resumed, _ = convert(recipe, text_file, journal=tmp_path / "journal")
    assert all(
        torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items()
    )


def test_a_kind_of_codes_without_zero_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq_options, "_without_zero", set())
    gptq_options.refuse_zeros("affine")
    with pytest.raises(RecipeError, match="hold zero, which codes of kind 'affine' do not"):
        load_recipe("gptq-w4a16", ("algorithm.sparsity=0.5",))
