from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import spikellm
from conftest import SHARED, needs_shared
from spikellm.core.errors import NumericalError, RequestError
from spikellm.evaluation.perplexity import perplexity_of_windows


def test_against_a_loop_over_tokens(bundled: tuple[Any, Any], text_file: Path) -> None:
    """One window and one target at a time, from log-probabilities in float64."""
    model, tokenizer = bundled
    ids = tokenizer(text_file.read_text(encoding="utf-8"))["input_ids"]
    losses = []
    with torch.no_grad():
        for start in range(0, 3 * 50, 50):
            window = torch.tensor([ids[start : start + 50]])
            log_probabilities = model(window).logits[0].double().log_softmax(-1)
            losses += [-float(log_probabilities[i, window[0, i + 1]]) for i in range(49)]
    seen: list[tuple[int, int]] = []
    result = spikellm.perplexity(
        model,
        tokenizer,
        str(text_file),
        seqlen=50,
        limit=3,
        on_batch=lambda done, total: seen.append((done, total)),
    )
    assert result.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-3)
    assert (result.tokens, result.windows, result.seqlen) == (147, 3, 50)
    assert seen[-1] == (3, 3)


def test_windows_start_with_bos_where_the_tokenizer_adds_one(
    bundled: tuple[Any, Any], bos_tokenizer: Any, text_file: Path
) -> None:
    """Of the tokens of text each but the first of a window has been a target without it."""
    model, tokenizer = bundled
    ids = tokenizer(text_file.read_text(encoding="utf-8"))["input_ids"]
    losses = []
    with torch.no_grad():
        for start in (0, 49):
            window = torch.tensor([[0, *ids[start : start + 49]]])
            log_probabilities = model(window).logits[0].double().log_softmax(-1)
            losses += [-float(log_probabilities[i, window[0, i + 1]]) for i in range(49)]

    def measured(used: Any, **bos: Any) -> spikellm.Perplexity:
        return spikellm.perplexity(model, used, str(text_file), seqlen=50, limit=2, **bos)

    result = measured(bos_tokenizer)
    assert result.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-3)
    assert (result.tokens, result.seqlen, result.bos) == (98, 50, True)
    assert measured(bos_tokenizer, bos="always") == measured(tokenizer, bos="always") == result
    plain = measured(tokenizer)
    assert plain == measured(tokenizer, bos="never")
    assert not plain.bos
    usual = measured(bos_tokenizer, bos="never")
    assert not usual.bos
    assert usual.value not in (plain.value, result.value), "its first window alone has BOS"


def test_unknown_keywords_and_choices_are_refused(bundled: tuple[Any, Any]) -> None:
    with pytest.raises(TypeError, match="did you mean 'seqlen'"):
        spikellm.perplexity(*bundled, "stdlib", seqlength=3)  # type: ignore[call-arg]
    with pytest.raises(RequestError, match="bos is 'yes'"):
        spikellm.perplexity(*bundled, "stdlib", bos="yes")


def test_uniform_model_has_the_vocabulary_as_perplexity(bundled: tuple[Any, Any]) -> None:
    model, _ = bundled
    model.model.norm.weight.data.zero_()
    assert perplexity_of_windows(model, torch.randint(2, 2000, (2, 16))).value == pytest.approx(
        2048, rel=1e-5
    )


def test_batches_do_not_matter(bundled: tuple[Any, Any]) -> None:
    model, _ = bundled
    model.float()
    windows = torch.randint(2, 2000, (70, 64), generator=torch.Generator().manual_seed(0))
    alone = [math.log(perplexity_of_windows(model, window[None]).value) for window in windows]
    assert math.log(perplexity_of_windows(model, windows).value) == pytest.approx(
        sum(alone) / len(alone), rel=1e-5
    )


def test_default_window_is_the_models_maximum(bundled: tuple[Any, Any], text_file: Path) -> None:
    assert spikellm.perplexity(*bundled, str(text_file), limit=1).seqlen == 256


def test_in_training_mode_nothing_is_dropped_out(bundled: tuple[Any, Any], text_file: Path) -> None:
    model, tokenizer = bundled
    expected = spikellm.perplexity(model, tokenizer, str(text_file), limit=2).value
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    assert spikellm.perplexity(model, tokenizer, str(text_file), limit=2).value == expected
    assert model.training


@needs_shared
def test_the_tokenizer_of_another_model_is_refused(bundled: tuple[Any, Any]) -> None:
    _, other = spikellm.load(SHARED / "models" / "llama-wt2-8m")
    text = str(SHARED / "text" / "wikitext-2" / "test.txt")
    with pytest.raises(RequestError, match=r"gives token \d+ and the model knows 2048"):
        spikellm.perplexity(bundled[0], other, text, limit=1)
    with pytest.raises(RequestError, match=r"gives token \d+ and the model knows 2048"):
        spikellm.convert(bundled[0], other, "rtn-w4a4", text, samples=1)


def test_refusals(bundled: tuple[Any, Any], tmp_path: Path, text_file: Path) -> None:
    model, tokenizer = bundled
    (tmp_path / "short.txt").write_text("a few words", encoding="utf-8")
    with pytest.raises(RequestError, match="shorter than one window of 256"):
        spikellm.perplexity(model, tokenizer, str(tmp_path / "short.txt"))
    with pytest.raises(RequestError, match="above the model's maximum of 256"):
        spikellm.perplexity(model, tokenizer, str(text_file), seqlen=4096)
    with pytest.raises(RequestError, match="at least one window"):
        spikellm.perplexity(model, tokenizer, str(text_file), limit=0)
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(NumericalError, match="NaN or infinite"):
        spikellm.perplexity(model, tokenizer, str(text_file), limit=1)
