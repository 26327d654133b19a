"""What a conversion needs, and where it is kept."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import spikellm
from conftest import BUNDLED
from families import FAMILIES, build, by_family
from interruptions import bytes_of
from spikellm.commands import convert
from spikellm.commands.convert import ConvertOptions
from spikellm.commands.support.storage import choose_store
from spikellm.conversion import block_runner
from spikellm.conversion.estimate import Needs, find_units
from spikellm.core.errors import RequestError
from spikellm.models.families import find_blocks
from spikellm.models.plan import plan_blocks
from spikellm.observers.activation_store import ActivationStore
from spikellm.observers.input_stats import SampledInputs
from spikellm.observers.token_weights import SamplePlan
from spikellm.recipe.load import load_recipe

GIB = 1 << 30


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_states_in_a_file_are_those_in_ram(
    shapes: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    import tempfile

    batches = [torch.randn(*shape, 4).to(dtype) for shape in shapes]
    with tempfile.TemporaryDirectory() as place:
        ram, disk = ActivationStore(batches), ActivationStore(batches, Path(place))
        other, kept = ram.copy(), disk.copy()
        for store in (ram, disk):
            store[0] = store[0] * 2
        for store, same in ((ram, disk), (other, kept)):
            assert all(torch.equal(store[i], same[i]) for i in range(len(store)))
        assert ram.bytes == disk.bytes == sum(batch.nbytes for batch in batches)
        assert list(Path(place).iterdir()) == [], "the file has no name"


def test_the_store_changes_no_byte(text_file: Path, tmp_path: Path) -> None:
    for store in ("ram", "disk"):
        options = ConvertOptions(
            recipe="spike-w4a4-t2",
            calibration=str(text_file),
            samples=2,
            seqlen=32,
            settings=["algorithm.epochs=1"],
            store=store,
        )
        convert.convert(str(BUNDLED), tmp_path / store, options)
    assert {k: v for k, v in bytes_of(tmp_path / "ram").items() if k != "README.md"} == {
        k: v for k, v in bytes_of(tmp_path / "disk").items() if k != "README.md"
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "ram"]


@pytest.mark.parametrize(
    ("needs", "wanted", "expected"),
    [
        (Needs(1 * GIB, 2 * GIB, 1, 1), "auto", "ram"),
        (Needs(6 * GIB, 2 * GIB, 1, 1), "auto", "disk"),
        (Needs(1 * GIB, 2 * GIB, 1, 1), "disk", "disk"),
        (Needs(7 * GIB, 2 * GIB, 1, 1), "ram", "ram"),
        (
            Needs(9 * GIB, 2 * GIB, 1, 1),
            "ram",
            (
                "needs about 11.0 GiB of RAM and 10.0 GiB are free; take fewer --samples, or"
                " --store disk"
            ),
        ),
        (Needs(1, 12 * GIB, 1, 1), "auto", "12.0 GiB of RAM"),
        (Needs(6 * GIB, 1, 30 * GIB, 30 * GIB), "auto", "66.0 GiB of disk"),
    ],
)
def test_what_does_not_fit_is_refused(
    needs: Needs, wanted: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10 * GIB))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=50 * GIB))
    if expected in ("ram", "disk"):
        assert choose_store(needs, wanted, tmp_path / "out.partial") == (
            None if expected == "ram" else tmp_path / "out.partial"
        )
    else:
        with pytest.raises(RequestError, match=expected):
            choose_store(needs, wanted, tmp_path / "out.partial")


def test_an_unknown_store(text_file: Path, tmp_path: Path) -> None:
    options = ConvertOptions(calibration=str(text_file), store="tape")
    with pytest.raises(RequestError, match="expected auto, ram, disk"):
        convert.convert(str(BUNDLED), tmp_path / "out", options)


def test_estimates_are_of_the_right_size(text_file: Path) -> None:
    """The journal is what the codes take; the block holds at least its weights in float32."""
    told: list[Needs] = []
    model, tokenizer = spikellm.load(BUNDLED)
    block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    spikellm.convert(
        model, tokenizer, "gptq-w4a16", str(text_file), samples=2, seqlen=32, store=told.append
    )
    assert told[0].block >= 4 * block
    assert told[0].streams == 2 * 2 * 32 * model.config.hidden_size * 2
    assert 0.9 * 5 * block / 2 <= told[0].journal <= 1.1 * 5 * block / 2


def needs_of(model: Any, tokenizer: Any, recipe: str, text_file: Path, *settings: str) -> Needs:
    """What a conversion says it needs, before it does anything."""

    class Asked(Exception):  # noqa: N818
        pass

    def store(needs: Needs) -> None:
        raise Asked(needs)

    with pytest.raises(Asked) as asked:
        spikellm.convert(
            model,
            tokenizer,
            recipe,
            str(text_file),
            samples=4,
            seqlen=32,
            settings=settings,
            store=store,
        )
    found: Needs = asked.value.args[0]
    return found


def test_samples_and_the_output_projection_are_counted(tokenizer: Any, text_file: Path) -> None:
    model = build("llama")
    few, many = (
        needs_of(
            model, tokenizer, "w4a4-t2", text_file, f"calibration.saliency_tokens={count}"
        ).block
        for count in (16, 128)
    )
    assert many - few == 4 * (128 - 16) * (3 * 40 + 52), (
        "q, k and v read one tensor, gate and up another"
    )
    few, many = (
        needs_of(
            model, tokenizer, "rtn-w4a4", text_file, f"calibration.saliency_tokens={count}"
        ).block
        for count in (16, 128)
    )
    assert many == few, "nothing is ranked"
    one, two = (
        needs_of(model, tokenizer, "gptq-w4a16", text_file, f"lm_head={value}")
        for value in ("false", "true")
    )
    head = model.lm_head.weight.numel()
    assert two.block >= 4 * head
    assert two.block > one.block
    assert one.result - two.result == 4 * head - head // 2
    assert two.streams == one.streams


@pytest.mark.parametrize("family", by_family(FAMILIES))
def test_layers_that_read_one_tensor_are_found_on_two_tokens(family: str) -> None:
    """As they are on a whole text."""
    model, windows = (
        build(family),
        torch.randint(2, 2000, (2, 16), generator=torch.Generator().manual_seed(0)),
    )
    blocks = find_blocks(model)
    plan = plan_blocks(model, blocks, load_recipe("gptq-w4a16"))
    units = find_units(model, blocks.modules, plan, None, lambda settings: True)
    for unit in units:
        samples = SampledInputs(
            {name: model.get_submodule(name) for name in unit.plan.linears}, SamplePlan(32, 32)
        )
        with torch.no_grad(), samples.hooks():
            model(windows, use_cache=False)
        distinct = {id(samples[name]): samples[name].shape[1] for name in unit.plan.linears}
        assert sorted(unit.inputs) == sorted(distinct.values())


def test_with_a_folder_no_stream_is_ever_in_memory(
    tokenizer: Any, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what the first block and the output projection are fed one batch lives at a time.

    Survey, both streams and the projection keep theirs in files.
    """
    fed: list[weakref.ref[torch.Tensor]] = []
    folders: list[Path | None] = []
    original, begin = block_runner.input_of, ActivationStore.__init__

    def input_of(*arguments: Any) -> torch.Tensor:
        assert sum(one() is not None for one in fed) <= 1, "the one before"
        found = original(*arguments)
        fed.append(weakref.ref(found))
        return found

    def noted(self: ActivationStore, batches: Any, folder: Path | None = None) -> None:
        folders.append(folder)
        begin(self, batches, folder)

    monkeypatch.setattr("spikellm.conversion.block_runner.input_of", input_of)
    monkeypatch.setattr("spikellm.conversion.head.input_of", input_of)
    monkeypatch.setattr(ActivationStore, "__init__", noted)
    given = {"samples": 140, "seqlen": 64, "settings": ["lm_head=true"], "store": tmp_path}
    spikellm.convert(build("llama"), tokenizer, "ternary-1.4", str(text_file), **given)
    assert len(fed) == 2 + 3 * 5, (
        "two to check, and five batches for the survey, the streams and the projection"
    )
    assert folders == [tmp_path] * 4
    assert list(tmp_path.iterdir()) == []
