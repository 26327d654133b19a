from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import create_model

import spikellm
from budget import mostly_slow
from conftest import first_blocks
from families import build
from spikellm.algorithms import gptq_options
from spikellm.algorithms.gptq_coders import ColumnCoder, column_coders
from spikellm.algorithms.gptq_problem import GPTQProblem
from spikellm.core.errors import RecipeError, RequestError
from spikellm.nn.execution import spiking_linears
from spikellm.nn.formats import formats
from spikellm.nn.formats.affine import AffineFormat
from spikellm.nn.formats.affine_options import AffineOptions
from spikellm.quantization.affine import AffineWeights
from spikellm.recipe.base import WeightOptions

PRESETS = {
    "gptq-w4a16": (1.0, 0.0),
    "gptq-w2a16": (1.0, 0.0),
    "pbllm-95": (1.35, 0.95),
    "pbllm-90": (1.7, 0.9),
    "pbllm-80": (2.4, 0.8),
    "ternary-1.0": (1.0, 1.0),
    "ternary-1.4": (1.4, 1.0),
    "ternary-1.7": (1.7, 1.0),
    "ternary-2.4": (2.4, 1.0),
    "ternary-1.4-a8": (1.4, 1.0),
    "bcq-2": (2.0, 1.0),
    "bcq-3": (3.0, 1.0),
    "bcq-2-pot": (2.0, 1.0),
}


MIXED = ("weights.planes=null", "weights.budget=1.5", "weights.allocation=model")


def convert(
    recipe: str, text_file: Path, *settings: str, **keywords: Any
) -> tuple[Any, Any, spikellm.Conversion]:
    model, tokenizer = first_blocks()
    keywords = {"samples": 4, "seqlen": 64, **keywords}
    return (
        model,
        tokenizer,
        spikellm.convert(model, tokenizer, recipe, str(text_file), settings=settings, **keywords),
    )


@pytest.mark.parametrize(
    "recipe",
    mostly_slow(
        [*PRESETS, "ternary-1.4-a4-t2", "bcq-2-a4-t2", "billm", "reference-billm"],
        {"gptq-w4a16", "pbllm-90", "ternary-1.4", "ternary-1.4-a4-t2", "billm"},
    ),
)
def test_presets_convert_count_save_and_generate(
    recipe: str, text_file: Path, tmp_path: Path
) -> None:
    model, tokenizer, result = convert(recipe, text_file)
    if recipe in PRESETS:
        steps, share = PRESETS[recipe]
        assert result.summary.average_steps == pytest.approx(steps, abs=0.005)
        assert result.summary.additive_share == pytest.approx(share, abs=0.001)
    spikellm.save(model, tokenizer, tmp_path / "out")
    again, tokenizer = spikellm.load(tmp_path / "out")
    tokens = torch.randint(2, 2000, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert spikellm.generate(again, tokenizer, "Return the", max_new_tokens=4) == spikellm.generate(
        model, tokenizer, "Return the", max_new_tokens=4
    )
    if recipe.startswith("ternary"):
        assert (
            result.summary.weight_bytes
            < (0.17 * max(1.0, result.summary.average_steps) + 0.06) * result.summary.dense_bytes
        )


@functools.cache
def last_loss(recipe: str, text_file: Path) -> float:
    return convert(recipe, text_file, samples=16)[2].blocks[-1].loss


@pytest.mark.parametrize(
    "order",
    mostly_slow(
        [
            ("gptq-w4a16", "gptq-w2a16", "rtn-w2a16"),
            ("ternary-2.4", "ternary-1.7", "ternary-1.4", "ternary-1.0"),
            ("pbllm-80", "pbllm-90", "pbllm-95"),
            ("ternary-1.4", "pbllm-95"),
            ("ternary-1.7", "pbllm-90"),
            ("ternary-2.4", "pbllm-80"),
            ("bcq-3", "bcq-2", "gptq-w2a16"),
        ],
        {("gptq-w4a16", "gptq-w2a16", "rtn-w2a16"), ("ternary-1.4", "pbllm-95")},
    ),
    ids=" ".join,
)
def test_losses_are_in_the_order_that_the_method_promises(
    order: tuple[str, ...], text_file: Path
) -> None:
    losses = [last_loss(recipe, text_file) for recipe in order]
    assert losses == sorted(losses)
    assert len(set(losses)) == len(losses)


def test_searched_ranges_lose_less(text_file: Path) -> None:
    plain, searched = (
        convert("gptq-w2a16", text_file, *settings, samples=16)[2].blocks
        for settings in ((), ("algorithm.search_range=true",))
    )
    assert searched[0].loss < plain[0].loss
    assert searched[-1].loss < plain[-1].loss
    with pytest.raises(RecipeError, match="no effect on weights of format 'ternary'"):
        convert("ternary-1.0", text_file, "algorithm.search_range=true")


def test_additions_alone_give_the_model_s_logits(text_file: Path) -> None:
    model, tokenizer = first_blocks(dtype="float32")
    spikellm.convert(model, tokenizer, "ternary-1.4", str(text_file), samples=4, seqlen=64)
    tokens = torch.randint(2, 2000, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        merged = model(tokens).logits
        spikellm.set_execution_mode(model, "stepped")
        torch.testing.assert_close(model(tokens).logits, merged, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("ternary-1.4", ()),
        pytest.param("bcq-2", MIXED, marks=pytest.mark.slow),
        pytest.param("billm", (), marks=pytest.mark.slow),
        pytest.param("static-w4a8", (), marks=pytest.mark.slow),
    ],
)
def test_resumed_it_ends_in_the_same_weights(
    recipe: str, settings: tuple[str, ...], text_file: Path, tmp_path: Path
) -> None:
    class Stop(Exception):  # noqa: N818
        pass

    def stop(progress: Any) -> None:
        if progress.index == 1:
            raise Stop

    whole, _, _ = convert(recipe, text_file, *settings)
    with pytest.raises(Stop):
        convert(recipe, text_file, *settings, journal=tmp_path / "journal", on_block=stop)
    resumed, _, _ = convert(recipe, text_file, *settings, journal=tmp_path / "journal")
    assert all(
        torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items()
    )


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi3"])
def test_other_families(family: str, tokenizer: Any, text_file: Path) -> None:
    model = build(family)
    result = spikellm.convert(model, tokenizer, "ternary-1.4", str(text_file), samples=2, seqlen=24)
    assert all(layer.format.name == "ternary" for layer in spiking_linears(model).values())
    assert result.summary.additive_share == 1.0


def test_other_pipelines_refuse_these_codes(text_file: Path) -> None:
    for pipeline in ("rtn", "omniquant"):
        with pytest.raises(
            RequestError,
            match=r"fits weight codes of kind affine, .* has kind 'ternary'; set .* or gptq",
        ):
            convert("ternary-1.0", text_file, f"algorithm={pipeline}")


def test_a_raised_damping_is_in_the_record(
    text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spikellm.observers.input_stats import TokenSample

    original = TokenSample.update

    def spoil(self: TokenSample, x: torch.Tensor, *, hessian: bool = False) -> None:
        original(self, x, hessian=hessian)
        assert self.hessian is not None
        self.hessian -= 0.03 * self.hessian.diagonal().mean() * torch.eye(len(self.hessian))

    monkeypatch.setattr(TokenSample, "update", spoil)
    _, _, result = convert("gptq-w4a16", text_file)
    assert any(
        "is not positive definite; damping was raised to 0.1 of its mean diagonal" in note
        for note in result.blocks[0].notes
    )


def test_a_format_of_known_codes_is_fitted_like_them(
    text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_format(monkeypatch, "mine")
    for algorithm in ("rtn", "gptq"):
        mine, affine = (
            convert("gptq-w4a16", text_file, f"algorithm={algorithm}", f"weights.format={name}")[0]
            for name in ("mine", "affine")
        )
        layer = spiking_linears(mine)["model.layers.0.mlp.up_proj"]
        assert layer.format.name == "mine"
        expected = affine.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in mine.state_dict().items())


def test_a_new_kind_of_codes_is_one_coder(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(column_coders, "_entries", dict(column_coders._entries))
    monkeypatch.setattr(gptq_options, "_limited", {})

    @column_coders.register("halves")
    class Halves(ColumnCoder):
        options = ("rounds",)

        def code(self, problem: GPTQProblem) -> AffineWeights:
            weights = column_coders["affine"]().code(problem)
            return weights._replace(scale=weights.scale / 2)

    add_format(monkeypatch, "mine", "halves")
    halves, affine = (
        spiking_linears(convert("gptq-w4a16", text_file, *settings)[0])[
            "model.layers.0.mlp.up_proj"
        ]
        for settings in (("weights.format=mine", "algorithm.rounds=2"), ())
    )
    assert torch.equal(2 * halves.dense_weight(), affine.dense_weight())
    with pytest.raises(RecipeError, match="no effect on weights of format 'affine', only on 'hal"):
        convert("gptq-w4a16", text_file, "algorithm.rounds=2")
    with pytest.raises(
        RequestError, match="fits weight codes of kind affine, and .* asks for format 'mine'"
    ):
        convert("rtn-w4a4", text_file, "weights.format=mine")


def add_format(monkeypatch: pytest.MonkeyPatch, name: str, coding: str | None = None) -> None:
    """A format that stores what affine does, as a plugin would add it, until the test ends."""
    own = {"name": name} if coding is None else {"name": name, "coding": coding}
    options = create_model("Mine", __base__=AffineOptions, format=(Literal[name], name))
    monkeypatch.setitem(formats._entries, name, type("Mine", (AffineFormat,), own)())
    monkeypatch.setitem(WeightOptions.registry._entries, name, options)
