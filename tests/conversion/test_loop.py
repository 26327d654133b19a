from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import spikellm
from families import build
from spikellm.algorithms import algorithms
from spikellm.algorithms.gptq_options import GptqOptions
from spikellm.conversion.block_runner import BlockRunner
from spikellm.conversion.record import Progress
from spikellm.core.errors import (
    CheckpointError,
    NumericalError,
    RequestError,
    UnsupportedModelError,
)
from spikellm.models.families import find_blocks
from spikellm.nn.execution import spiking_linears
from spikellm.observers.input_stats import SampledInputs, TokenSample
from spikellm.observers.token_weights import SamplePlan
from spikellm.quantization.ste import WeightCoding
from spikellm.recipe.load import load_recipe


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt", "bloom"])
def test_replayed_blocks_are_the_model(family: str) -> None:
    """Hidden states behind every block, run one by one, equal those inside the whole model.

    With a last batch of another size.
    """
    model = build(family)
    blocks = find_blocks(model)
    windows = torch.randint(2, 2000, (70, 32), generator=torch.Generator().manual_seed(0))
    seen: dict[int, list[torch.Tensor]] = {}
    handles = [
        block.register_forward_hook(
            lambda m, a, output, i=index: seen.setdefault(i, []).append(
                output[0] if isinstance(output, tuple) else output
            )
        )
        for index, block in enumerate(blocks.modules)
    ]
    with torch.no_grad():
        for batch in windows.split(64):
            model(batch, use_cache=False)
        for handle in handles:
            handle.remove()
        runner = BlockRunner(model, blocks, windows)
        assert [batch.shape[0] for batch in runner.batches] == [64, 6]
        for batch, first in enumerate(runner.first_inputs()):
            hidden = first
            for index, block in enumerate(blocks.modules):
                hidden = runner.forward(index, block, hidden)
                assert torch.equal(hidden, seen[index][batch])


def test_family_that_passes_something_between_blocks_is_refused(
    tokenizer: Any, text_file: Path
) -> None:
    model = build("llama")
    second = model.model.layers[1]
    original, passes = second.forward, []

    def remembers(hidden: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        passes.append(1)
        return original(hidden + len(passes), *arguments, **keywords)

    second.forward = remembers
    with pytest.raises(
        UnsupportedModelError, match="one by one do not give what the whole model gives"
    ):
        spikellm.convert(model, tokenizer, "w8a8", str(text_file), samples=1, seqlen=16)


def test_family_whose_blocks_see_the_tokens_is_refused(tokenizer: Any, text_file: Path) -> None:
    """What a block is given beside its hidden states is recorded for one batch.

    It must not depend on the tokens.
    """
    model = build("llama")
    inner, block = model.model.forward, model.model.layers[1]
    original = block.forward

    def forward(input_ids: torch.Tensor, **keywords: Any) -> Any:
        for layer in model.model.layers:
            layer.tokens = input_ids
        return inner(input_ids, **keywords)

    block.forward = lambda hidden, *a, extra=None, **k: original(
        hidden + (extra if extra is not None else 0), *a, **k
    )
    block.register_forward_pre_hook(
        lambda m, a, k: (a, {"extra": m.tokens[..., None].float() / 100, **k}), with_kwargs=True
    )
    model.model.forward = forward
    with pytest.raises(UnsupportedModelError, match="one by one do not give"):
        spikellm.convert(model, tokenizer, "w8a8", str(text_file), samples=2, seqlen=16)


def test_small_change_beside_a_massive_channel_is_seen(tokenizer: Any, text_file: Path) -> None:
    model = build("llama")
    model.model.embed_tokens.weight.data[:, 0] = 3000
    second, passes = model.model.layers[1], []
    original = second.forward

    def remembers(hidden: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        passes.append(1)
        shift = torch.ones_like(hidden)
        shift[..., 0] = 0
        return original(hidden + len(passes) * shift, *arguments, **keywords)

    second.forward = remembers
    with pytest.raises(UnsupportedModelError, match="one by one do not give"):
        spikellm.convert(model, tokenizer, "w8a8", str(text_file), samples=1, seqlen=16)


def test_saliency_is_measured_on_the_converted_stream(
    bundled: tuple[Any, Any], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the second block's criterion sees is what the converted first block gives, on as many
    tokens as asked for.
    """
    from spikellm.data.datasets import read_text
    from spikellm.data.tokens import tokenize
    from spikellm.data.windows import random_windows
    from spikellm.nn import channels

    seen: dict[str, torch.Tensor] = {}
    original = channels.salient_channels

    def watch(sample: channels.Sample, settings: Any, seed: int, name: str, *more: Any) -> Any:
        seen[name] = sample.x.clone()
        return original(sample, settings, seed, name, *more)

    monkeypatch.setattr("spikellm.nn.channels.salient_channels", watch)
    model, tokenizer = bundled
    result = spikellm.convert(
        model,
        tokenizer,
        "w4a4-t2",
        str(text_file),
        samples=2,
        seqlen=32,
        settings=["calibration.saliency_tokens=16"],
    )
    windows = random_windows(
        tokenize(tokenizer, read_text(str(text_file), "calibration")),
        32,
        2,
        result.recipe.seed,
        "t",
    )
    captured: list[torch.Tensor] = []
    model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(
        lambda m, a: captured.append(a[0])
    )
    with torch.no_grad():
        model(windows, use_cache=False)
    expected = captured[0].reshape(-1, 192)[::4].float()
    assert seen["model.layers.1.self_attn.q_proj"].shape == (16, 192)
    assert torch.equal(seen["model.layers.1.self_attn.q_proj"], expected)


def test_token_sample_is_spread_evenly() -> None:
    sample = TokenSample(SamplePlan(seen=100, wanted=10))
    for start in range(0, 100, 7):
        sample.update(torch.arange(start, min(start + 7, 100)).view(1, -1, 1))
    assert sample.tokens().flatten().tolist() == list(range(0, 100, 10))


def test_layers_with_one_input_share_one_sample() -> None:
    q, k, o = (torch.nn.Linear(4, 4) for _ in range(3))
    samples = SampledInputs({"q": q, "k": k, "o": o}, SamplePlan(12, 100))
    with samples.hooks():
        for _ in range(2):
            x = torch.randn(2, 3, 4)
            q(x), k(x), o(x * 2)
    assert samples["q"] is samples["k"]
    assert samples["q"].shape == (12, 4)
    torch.testing.assert_close(samples["o"], samples["q"] * 2)


def test_records_are_true(bundled: tuple[Any, Any], text_file: Path) -> None:
    """The loss of the last block against both whole models run side by side."""
    from spikellm.data.datasets import read_text
    from spikellm.data.tokens import tokenize
    from spikellm.data.windows import random_windows

    model, tokenizer = bundled
    original, _ = spikellm.load(Path(model.config._name_or_path))
    seen: list[Progress] = []
    result = spikellm.convert(
        model, tokenizer, "w4a4-t2", str(text_file), samples=4, seqlen=32, on_block=seen.append
    )
    assert [progress.record for progress in seen] == result.blocks
    assert len(result.blocks) == 5
    windows = random_windows(
        tokenize(tokenizer, read_text(str(text_file), "calibration")),
        32,
        4,
        result.recipe.seed,
        "t",
    )
    states = []
    for one in (original, model):
        captured: list[torch.Tensor] = []
        handle = one.model.layers[-1].register_forward_hook(
            lambda m, a, out, kept=captured: kept.append(out)
        )
        with torch.no_grad():
            one(windows, use_cache=False)
        handle.remove()
        states.append(captured[0].double())
    difference = float((states[1] - states[0]).square().mean())
    assert result.blocks[-1].loss == pytest.approx(difference, rel=1e-6)
    assert result.blocks[-1].relative_loss == pytest.approx(
        difference / float(states[0].square().mean()), rel=1e-6
    )
    assert result.summary.average_steps == pytest.approx(1.1, abs=0.01)


def test_same_seed_same_bytes_and_another_seed_not(text_file: Path, tmp_path: Path) -> None:
    from conftest import BUNDLED

    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        model, tokenizer = spikellm.load(BUNDLED)
        spikellm.convert(
            model, tokenizer, "w4a4-t2", str(text_file), samples=2, seqlen=32, seed=seed
        )
        spikellm.save(model, tokenizer, tmp_path / name)
    for file in sorted(path.name for path in (tmp_path / "a").iterdir()):
        if file != "README.md":  # carries the folder's name
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), (
                file
            )
    assert (tmp_path / "a" / "model.safetensors").read_bytes() != (
        tmp_path / "c" / "model.safetensors"
    ).read_bytes()


class InterruptedByTestError(Exception):
    pass


@pytest.mark.parametrize("stop_after", [0, 2, 4])
def test_interrupted_and_resumed_gives_the_same_bytes(
    stop_after: int, text_file: Path, tmp_path: Path
) -> None:
    from conftest import BUNDLED

    def run(journal: Path | None, on_block: Any = None) -> dict[str, torch.Tensor]:
        model, tokenizer = spikellm.load(BUNDLED)
        spikellm.convert(
            model,
            tokenizer,
            "w4a4-t2",
            str(text_file),
            samples=2,
            seqlen=32,
            journal=journal,
            on_block=on_block,
        )
        return dict(model.state_dict())

    def stop(progress: Progress) -> None:
        if progress.index == stop_after:
            raise InterruptedByTestError

    resumed: list[bool] = []
    with pytest.raises(InterruptedByTestError):
        run(tmp_path / "journal", stop)
    again = run(tmp_path / "journal", lambda progress: resumed.append(progress.resumed))
    whole = run(None)
    assert resumed == [index <= stop_after for index in range(5)]
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_journal_of_something_else_is_refused(
    text_file: Path, tmp_path: Path, bundled: tuple[Any, Any]
) -> None:
    from conftest import BUNDLED

    arguments = (str(text_file),)
    spikellm.convert(*bundled, "w8a8", *arguments, samples=1, seqlen=16, journal=tmp_path / "j")
    with pytest.raises(RequestError, match=r"another recipe\.activations\.bits \(8, now 16\)"):
        spikellm.convert(
            *spikellm.load(BUNDLED),
            "w4a16",
            *arguments,
            samples=1,
            seqlen=16,
            journal=tmp_path / "j",
        )
    other, tokens = spikellm.load(BUNDLED)
    other.config.rms_norm_eps = 1e-3
    with pytest.raises(RequestError, match="another model"):
        spikellm.convert(
            other, tokens, "w8a8", *arguments, samples=1, seqlen=16, journal=tmp_path / "j"
        )
    other, tokens = spikellm.load(BUNDLED)
    other.model.norm.weight.data[0] += 1
    with pytest.raises(RequestError, match="another model"):
        spikellm.convert(
            other, tokens, "w8a8", *arguments, samples=1, seqlen=16, journal=tmp_path / "j"
        )
    changed = text_file.parent / "changed.txt"
    changed.write_text(text_file.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    text_file.rename(text_file.with_suffix(".kept"))
    try:
        changed.rename(text_file)
        with pytest.raises(RequestError, match="another text"):
            spikellm.convert(
                *spikellm.load(BUNDLED),
                "w8a8",
                *arguments,
                samples=1,
                seqlen=16,
                journal=tmp_path / "j",
            )
    finally:
        text_file.with_suffix(".kept").replace(text_file)
    block = tmp_path / "j" / "block-00001.safetensors"
    block.write_bytes(block.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="is damaged"):
        spikellm.convert(
            *spikellm.load(BUNDLED),
            "w8a8",
            *arguments,
            samples=1,
            seqlen=16,
            journal=tmp_path / "j",
        )


def test_bad_weights_and_streams_are_named(tokenizer: Any, text_file: Path) -> None:
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 1 NaN"):
        spikellm.convert(model, tokenizer, "w8a8", str(text_file), samples=1, seqlen=16)
    model = build("llama")
    model.model.layers[1].mlp.down_proj.weight.data[:] = 3e38
    with pytest.raises(NumericalError, match=r"behind block model\.layers\.1"):
        spikellm.convert(model, tokenizer, "w8a8", str(text_file), samples=1, seqlen=16)
    assert not spiking_linears(model), "the model is as it was"


def test_non_finite_converted_stream_is_named(
    tokenizer: Any, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = WeightCoding.code

    def overflow(*arguments: Any) -> Any:
        coded = original(*arguments)
        return coded._replace(scale=coded.scale * 1e38)

    monkeypatch.setattr(WeightCoding, "code", overflow)
    with pytest.raises(
        NumericalError, match=r"converted model gives NaN or infinity behind model\.layers\.0"
    ):
        spikellm.convert(build("llama"), tokenizer, "w4a4-t2", str(text_file), samples=1, seqlen=16)


def test_layer_that_never_runs_is_refused_not_left_without_salient_channels(
    tokenizer: Any, text_file: Path
) -> None:
    model = build("llama")
    model.model.layers[0].mlp.extra = torch.nn.Linear(40, 8)
    with pytest.raises(
        UnsupportedModelError, match=r"mlp\.extra was not run on the calibration text"
    ):
        spikellm.convert(model, tokenizer, "w4a4-t2", str(text_file), samples=1, seqlen=16)


def test_requests_that_cannot_be_met(
    tokenizer: Any, text_file: Path, bundled: tuple[Any, Any]
) -> None:
    def convert(*settings: str) -> None:
        spikellm.convert(
            build("llama"),
            tokenizer,
            "w8a8",
            str(text_file),
            samples=1,
            seqlen=16,
            settings=settings,
        )

    with pytest.raises(RequestError, match="matches no layer; names are like"):
        convert("overrides=[{match: q_proj, skip: true}]")
    with pytest.raises(RequestError, match="nothing to convert"):
        convert("overrides=[{match: '*', skip: true}]")
    with pytest.raises(RequestError, match="unknown algorithm 'magic'"):
        convert("algorithm=magic")
    spikellm.convert(*bundled, "w8a8", str(text_file), samples=1, seqlen=16)
    with pytest.raises(RequestError, match="converted already"):
        spikellm.convert(*bundled, "w8a8", str(text_file), samples=1, seqlen=16)


def test_skipped_layers_stay_as_they_are(
    tokenizer: Any, text_file: Path, tmp_path: Path, tokens: torch.Tensor
) -> None:
    model = build("llama")
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    spikellm.convert(
        model,
        tokenizer,
        "w4a4-t2",
        str(text_file),
        samples=1,
        seqlen=16,
        settings=[
            "overrides=[{match: '.*q_proj', skip: true}, {match: '.*down_proj', weights: {bits:"
            " 3}}]"
        ],
    )
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)
    assert model.model.layers[1].mlp.down_proj.settings.weights.bits == 3
    spikellm.save(model, tokenizer, tmp_path / "mixed")
    assert torch.equal(spikellm.load(tmp_path / "mixed")[0](tokens).logits, model(tokens).logits)


def test_an_unknown_keyword_is_refused_with_the_nearest(bundled: tuple[Any, Any]) -> None:
    with pytest.raises(TypeError, match="unknown keyword of convert 'sample', did you mean"):
        spikellm.convert(*bundled, "w8a8", sample=1)  # type: ignore[call-arg]


def test_algorithms_say_on_what_they_run_blocks() -> None:
    learned = load_recipe("omniquant-w4a4", ["algorithm.batch_size=3"])
    assert algorithms["omniquant"]().batch_sizes([8, 7], learned) == {3, 2, 1}
    assert algorithms["gptq"]().batch_sizes([8, 7], learned) == set()
    fitted = load_recipe("gptq-w4a16", ["algorithm.compensate=true"])
    alone = algorithms["gptq"]().for_head(fitted)
    assert fitted.options(GptqOptions).compensate
    assert alone == fitted.replaced({"algorithm.compensate": False})
    assert algorithms["rtn"]().for_head(learned) is learned
