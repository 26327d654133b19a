"""The native decoder step: the integers of the module path in every layer, the same tokens, and the
module path wherever somebody looks on.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import spikellm
from conftest import first_blocks
from families import FAMILIES, GATED, by_family, randomized
from native import anew, needs_compiler
from spikellm.kernels.native.step_run import run_step
from spikellm.models.decoder_capture import capture
from spikellm.models.growing_cache import make_growing
from spikellm.nn.execution import set_execution_mode
from spikellm.nn.hooks import SpikeTrain, observe_spikes
from spikellm.nn.vocabulary import CodedHead
from spikellm.runtime.decoder_step.check import copied
from spikellm.runtime.decoder_step.hook import StepState, step_state
from spikellm.runtime.decoder_step.step import entries_of
from spikellm.runtime.decoder_step.summary import NATIVE, step_in_words, tried_step

pytestmark = needs_compiler

CODED = "{bits: 4, salient_rate: 0.2, salient_steps: 2, saliency: first-order, thresholds: shared}"
SPIKES = f"attention={{query: {{bits: 4}}, key: {CODED}, value: {CODED}}}"
TURNED = (
    "attention={query: {bits: 4}, key: {bits: 4}, value: {bits: 4}, rotate: true, center: true,"
    " balance: true}"
)
VOCABULARY = "vocabulary={bits: 8, group_size: 16}"
CONFIGS: dict[str, Any] = {
    **{name: FAMILIES[name] for name in ("llama", "qwen2", "qwen3", "mistral", "gemma3")},
    **{name: FAMILIES[name] for name in ("phi3", "opt", "gpt2", "gpt_neox", "phi", "stablelm")},
    "gemma2": lambda: transformers.Gemma2Config(
        **GATED, head_dim=12, sliding_window=8, attn_logit_softcapping=5.0
    ),
    "one head": lambda: transformers.LlamaConfig(
        **{**GATED, "num_attention_heads": 1, "num_key_value_heads": 1}, head_dim=14
    ),
}


def converted(family: str, text_file: Path, *settings: str, dtype: torch.dtype) -> Any:
    given = ["activations.saliency=first-order", *settings]
    return with_recipe("w4a4-t2", CONFIGS[family](), text_file, given, dtype)


def with_recipe(
    recipe: str, config: Any, text_file: Path, settings: Sequence[str], dtype: torch.dtype
) -> Any:
    torch.manual_seed(0)
    model = randomized(transformers.AutoModelForCausalLM.from_config(config)).to(dtype)
    tokenizer = spikellm.load(Path(spikellm.__file__).parent / "assets" / "stdlib-2m")[1]
    spikellm.convert(
        model, tokenizer, recipe, str(text_file), samples=2, seqlen=16, settings=settings
    )
    return model


@contextmanager
def library_path(model: Any) -> Iterator[None]:
    """The forward pass of the model's class."""
    own = model.__dict__.pop("forward")
    try:
        yield
    finally:
        model.forward = own


def prompt(rows: int = 2, tokens: int = 12) -> tuple[Tensor, Tensor]:
    """Tokens of sequences, and a mask that pads the first on the left."""
    found = torch.randint(2, 2000, (rows, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(found)
    if rows > 1:
        mask[0, :5] = 0
    return found, mask


def generated(model: Any, count: int = 20, **options: Any) -> Tensor:
    tokens, mask = prompt()
    torch.manual_seed(0)
    given = {"do_sample": False, **options}
    found: Tensor = model.generate(
        tokens, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, **given
    )
    return found


def state(model: Any) -> StepState:
    found = step_state(model)
    assert found is not None
    return found


def is_native(model: Any) -> bool:
    return step_in_words(model) == NATIVE


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Any:
    """Two blocks of the bundled model, attention spiking."""
    model, tokenizer = first_blocks()
    spikellm.convert(
        model, tokenizer, "w4a4-t2", str(text_file), samples=2, seqlen=32, settings=[TURNED]
    )
    return model


@pytest.mark.parametrize("attention", [SPIKES, TURNED, "attention={}"])
@pytest.mark.parametrize("family", by_family(CONFIGS))
def test_every_layer_gets_the_integers_of_the_module_path(
    family: str, attention: str, text_file: Path
) -> None:
    """Several tokens of padded sequences at once, with windows that have slid; every layer is given
    what the layers before it gave in the module path, and gives the same bits.
    """
    if attention == TURNED and family == "one head":
        pytest.skip("heads of 14 channels are tried without a rotation")
    model = converted(family, text_file, attention, dtype=torch.float32)
    tokens, mask = prompt()
    with torch.no_grad():
        cache = model(tokens, attention_mask=mask, use_cache=True).past_key_values
        first = torch.full((2, 1), 12)
        mask = longer(mask, 1)
        model(tokens[:, :1], attention_mask=mask, past_key_values=cache, position_ids=first)
        assert is_native(model), step_in_words(model)
        new, step = tokens[:, 3:6], state(model).step
        assert step is not None
        assert make_growing(cache) is None
        before = entries_of(copied(cache), 3)
        seen_mask = longer(mask, 3)
        positions = torch.arange(13, 16).expand(2, 3).contiguous()
        layers = set(step.built.layers)
        with library_path(model):
            seen = capture(
                model,
                lambda: model(
                    new, attention_mask=seen_mask, past_key_values=cache, position_ids=positions
                ),
                layers,
            )
    own = iter(step.built.layers)
    for index, span in enumerate(pairwise(step.built.starts)):
        given = step.given(seen.given[index], positions, seen_mask, before)
        mine = [next(own) for _ in range(len(step.built.program.shown(*span)) // 2)]
        forced = [seen.outputs[layer].float() for layer in mine]
        _, shown = run_step(step.built.program, given, span, forced=forced)
        for layer, x, y in zip(mine, shown[::2], shown[1::2], strict=True):
            if family in TO_ROUNDING:
                wanted = seen.inputs[layer].reshape(x.shape)
                torch.testing.assert_close(x, wanted, rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(x, seen.inputs[layer].reshape(x.shape))
                assert torch.equal(y, seen.outputs[layer].reshape(y.shape))


TO_ROUNDING = {"gpt2", "gpt_neox", "phi", "gemma2"}
"""Their activation functions, or caps of scores, run in libraries of the processor's maker."""


def longer(mask: Tensor, by: int) -> Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), by)], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", [SPIKES, "attention={}"])
@pytest.mark.parametrize("family", by_family(CONFIGS))
def test_the_same_tokens_are_generated(
    family: str, attention: str, dtype: torch.dtype, text_file: Path
) -> None:
    model = converted(family, text_file, attention, dtype=dtype)
    with library_path(model):
        wanted = generated(model)
    assert torch.equal(generated(model), wanted)
    assert is_native(model), step_in_words(model)


@pytest.mark.parametrize(
    ("family", "recipe", "tied", "dtype"),
    [
        ("llama", "w4a4-t2", False, torch.float32),
        ("llama", "w4a4-t2", True, torch.bfloat16),
        ("phi", "w4a16", False, torch.bfloat16),
        ("gemma3", "w4a16", True, torch.float32),
    ],
)
def test_weights_on_inputs_that_are_not_coded(
    family: str, recipe: str, tied: bool, dtype: torch.dtype, text_file: Path
) -> None:
    """Embedding and output projection of codes, the latter with a bias in one family; layers of
    weights alone.
    """
    config = CONFIGS[family]()
    config.tie_word_embeddings = tied
    model = with_recipe(recipe, config, text_file, [VOCABULARY], dtype)
    head = model.get_output_embeddings()
    assert isinstance(head, CodedHead)
    assert head.shared is tied
    with library_path(model):
        wanted = generated(model, 8)
    assert torch.equal(generated(model, 8), wanted)
    assert is_native(model), step_in_words(model)
    step = state(model).step
    assert state(model).reason is None
    assert step is not None
    built = step.built
    hidden = torch.randn(2, 3, head.in_features, generator=torch.Generator().manual_seed(0))
    given = step.given(hidden.to(dtype), torch.arange(3).expand(2, 3).contiguous(), None, None)
    span = (built.starts[-1], built.program.length)
    _, (x, y) = run_step(built.program, given, span, forced=[torch.zeros(6, head.out_features)])
    with torch.no_grad():
        assert torch.equal(y, head(x.to(dtype)).float())


@pytest.mark.parametrize("threads", [1, 3])
def test_a_write_into_a_coded_table_is_seen(threads: int, text_file: Path) -> None:
    model = with_recipe("w4a4-t2", CONFIGS["llama"](), text_file, [VOCABULARY], torch.float32)
    table, before = model.get_output_embeddings().table, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first = generated(model, 8)
        assert is_native(model), step_in_words(model)
        with torch.no_grad():
            table.weight_scale.copy_(table.weight_scale.flip(0))
        second = generated(model, 8)
        assert is_native(model), step_in_words(model)
        with library_path(model):
            assert torch.equal(generated(model, 8), second)
    finally:
        torch.set_num_threads(before)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.8},
        {"num_beams": 3},
        {"repetition_penalty": 1.3},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_way_to_generate_uses_it(options: dict[str, Any], small: Any) -> None:
    if "prompt_lookup_num_tokens" in options:  # of one sequence alone
        tokens, mask = prompt(1)
        given = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, **options}
        with library_path(small):
            wanted = small.generate(tokens, **given)
        assert torch.equal(small.generate(tokens, **given), wanted)
    else:
        with library_path(small):
            wanted = generated(small, **options)
        assert torch.equal(generated(small, **options), wanted)
    assert is_native(small), step_in_words(small)


def test_torch_says_the_same_words(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    for kernels in ("native", "torch"):
        monkeypatch.setenv("SPIKELLM_KERNELS", kernels)
        anew(small)
        told.append(generated(small, 40))
        assert is_native(small) == (kernels == "native")
    monkeypatch.undo()
    anew(small)
    assert torch.equal(*told)


def test_hooks_modes_and_observers_run_the_module_path(small: Any) -> None:
    """None of them is left out, whenever it comes."""
    assert tried_step(small) == NATIVE
    seen: list[Any] = []
    layer = small.model.layers[1].mlp.down_proj
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    generated(small, 4)
    assert len(seen) == 4
    assert "has hooks" in step_in_words(small)
    handle.remove()
    generated(small, 4)
    assert is_native(small)
    trains: list[SpikeTrain] = []
    with observe_spikes(trains.append):
        generated(small, 2)
    assert len(trains) > 0
    set_execution_mode(small, "binary")
    generated(small, 3)
    assert "binary" in step_in_words(small)
    set_execution_mode(small, "merged")
    generated(small, 3)
    assert is_native(small)


def test_a_write_into_weights_is_seen(small: Any) -> None:
    model = copy.deepcopy(small)
    before = generated(model)
    assert is_native(model)
    scale = model.model.layers[0].mlp.down_proj.get_buffer("weight_scale")
    with torch.no_grad():
        scale.mul_(-8)
    after = generated(model)
    with library_path(model):
        assert torch.equal(generated(model), after)
    assert not torch.equal(before, after)


def test_the_cache_stays_the_librarys(small: Any) -> None:
    """Native steps leave a cache that the module path goes on with, cropped or not."""
    tokens, _ = prompt(1, 16)
    with torch.no_grad():
        whole = small(tokens, use_cache=False).logits
        cache = small(tokens[:, :8], use_cache=True).past_key_values
        for index in range(8, 12):
            small(tokens[:, index : index + 1], past_key_values=cache)
        assert is_native(small)
        assert cache.get_seq_length() == 12
        cache.crop(-2)
        assert [layer.keys.shape[2] for layer in cache.layers] == [10, 10]
        with library_path(small):
            found = small(tokens[:, 10:12], past_key_values=copy.deepcopy(cache)).logits
        again = small(tokens[:, 10:12], past_key_values=cache).logits
        assert torch.equal(found, again) or float((found - again).abs().max()) < 0.1
        torch.testing.assert_close(found[:, -1].argmax(-1), whole[:, 11].argmax(-1))


@pytest.mark.parametrize("during", ["a step", "the library's pass"])
def test_an_interrupt_leaves_the_cache_usable(
    during: str, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, _ = prompt(1, 16)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        cache = small(tokens[:, :8], use_cache=True).past_key_values
        small(tokens[:, 8:9], past_key_values=cache)
        with monkeypatch.context() as patch:
            if during == "a step":
                patch.setattr(state(small).step, "finish", stop)
            else:
                patch.setattr(type(small.model.layers[1].mlp), "forward", stop)
                patch.setattr(state(small), "reason", "it is tried")
            with pytest.raises(KeyboardInterrupt):
                small(tokens[:, 9:10], past_key_values=cache)
        lengths = {layer.keys.shape[2] for layer in cache.layers}
        assert len(lengths) == 1
        at = lengths.pop()
        found = small(tokens[:, at : at + 1], past_key_values=cache).logits[:, -1]
        wanted = small(tokens[:, : at + 1], use_cache=False).logits[:, -1]
        assert torch.equal(found.argmax(-1), wanted.argmax(-1))


def test_two_threads_run_two_models(small: Any) -> None:
    models = [small, copy.deepcopy(small)]
    wanted = generated(small, 30)
    found: list[Tensor] = []
    threads = [
        threading.Thread(target=lambda model=model: found.append(generated(model, 30)))
        for model in models
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert all(torch.equal(one, wanted) for one in found)


def test_a_structure_that_it_does_not_know_says_why(text_file: Path) -> None:
    CONFIGS["mixtral"] = lambda: transformers.MixtralConfig(**GATED, num_local_experts=4)
    try:
        model = converted("mixtral", text_file, dtype=torch.float32)
    finally:
        del CONFIGS["mixtral"]
    assert "no feed-forward part" in tried_step(model)
