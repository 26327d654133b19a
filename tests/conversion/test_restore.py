"""Journals are files like others: what no conversion would have written into one is named, and
nothing of it is used.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import spikellm
from conftest import BUNDLED
from spikellm.core.errors import CheckpointError

LAYER = "model.layers.0.mlp.up_proj"
NORM = "model.layers.0.input_layernorm.weight"
CONVERT = {"samples": 1, "seqlen": 16}
TERNARY = [
    "pipeline=gptq",
    "weights={code: ternary, bits: 2, symmetric: true, salient_rate: 0.1, salient_steps: 2}",
    "attention={key: {bits: 8}, value: {bits: 8}}",
]


def stopped(place: Path, text: Path, *settings: str) -> Path:
    """The journal of a conversion that was interrupted after its first block."""

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spikellm.convert(
            *spikellm.load(BUNDLED),
            "w4a4-t2",
            str(text),
            **CONVERT,
            settings=settings,
            journal=place,
            on_block=stop,
        )
    return place


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    return stopped(tmp_path_factory.mktemp("journal") / "one", text_file)


@pytest.fixture(scope="module")
def ternary(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    return stopped(tmp_path_factory.mktemp("journal") / "two", text_file, *TERNARY)


def refused(
    journal: Path,
    place: Path,
    text: Path,
    change: Callable[[dict[str, Tensor], dict[str, Any]], Any],
    *settings: str,
) -> str:
    """What is said of a journal that was changed."""
    copy = Path(shutil.copytree(journal, place / "journal"))
    block = copy / "block-00000.safetensors"
    with safe_open(block, framework="pt") as file:
        tensors, record = (
            {name: file.get_tensor(name) for name in file.keys()},
            json.loads(file.metadata()["record"]),
        )  # noqa: SIM118
    made = change(tensors, record)
    save_file(
        tensors, block, metadata={"record": made if isinstance(made, str) else json.dumps(record)}
    )
    with pytest.raises(CheckpointError) as caught:
        spikellm.convert(
            *spikellm.load(BUNDLED),
            "w4a4-t2",
            str(text),
            **CONVERT,
            settings=settings,
            journal=copy,
        )
    message = str(caught.value)
    assert message.startswith(f"{block} is damaged (")
    assert message.endswith("; delete it to convert that block again")
    assert "\n" not in message
    return message


def put(name: str, change: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    return lambda tensors, record: tensors.update({name: change(tensors[name]).contiguous()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(f"{LAYER}.weight_zero", lambda t: t + 200), "weight_zero exceeds the largest code"),
        (put(f"{LAYER}.group_steps", torch.zeros_like), "the recipe says"),
        (put(f"{LAYER}.channel_group", lambda t: t + 200), "channel_group names group"),
        (put(f"{LAYER}.weight_scale", lambda t: -t), "not finite and positive"),
        (put(f"{LAYER}.weight_scale", lambda t: t / 0), "not finite"),
        (
            put(f"{LAYER}.weight_codes", lambda t: t.float()),
            "weight_codes holds torch.float32 of shape",
        ),
        (put(f"{LAYER}.weight_codes", lambda t: t[:1]), "weight_codes holds torch.uint8 of shape"),
        (lambda tensors, _: tensors.pop(f"{LAYER}.weight_codes"), f"it lacks {LAYER}.weight_codes"),
        (lambda tensors, _: tensors.update({f"{LAYER}.more": torch.zeros(1)}), "Unexpected key"),
        (
            lambda tensors, _: tensors.update({"model.norm.weight": torch.zeros(128)}),
            "model.norm.weight, which is no parameter of",
        ),
        (
            lambda tensors, _: tensors.update(
                {"model.layers.1.input_layernorm.weight": torch.zeros(128)}
            ),
            "is no parameter of",
        ),
        (lambda tensors, _: tensors.update({"nothing": torch.zeros(1)}), "it holds nothing, which"),
        (lambda tensors, _: tensors.update({NORM: torch.zeros(3)}), f"{NORM} holds"),
        (
            lambda tensors, _: tensors.update({NORM: torch.zeros(3, dtype=torch.int64)}),
            f"{NORM} holds",
        ),
        (lambda *_: "5", "a record of a block does not hold name, loss"),
        (lambda *_: "{}", "a record of a block does not hold name, loss"),
        (lambda *_: "[" * 100_000, "nested too deeply"),
        (lambda *_: "{", "not JSON"),
        (lambda _, record: record.update(more=1), "a record of a block does not hold"),
        (lambda _, record: record.update(loss="x"), "loss in the record of a block is 'x'"),
        (
            lambda _, record: record.update(loss=float("nan")),
            "loss in the record of a block is 'nan'",
        ),
        (
            lambda _, record: record.update(relative_loss=None),
            "relative_loss in the record of a block",
        ),
        (
            lambda _, record: record.update(name="model.layers.3"),
            "it holds the record of 'model.layers.3'",
        ),
        (lambda _, record: record.update(layers=[]), "of 0 modules, expected model.layers.0, of 7"),
        (lambda _, record: record.update(notes=["\x1b[2J"]), "notes in the record of a block"),
        (lambda _, record: record.update(rotated={"a": 1}), "it holds the record of"),
    ],
)
def test_what_no_conversion_writes_is_refused(
    change: Any, message: str, journal: Path, tmp_path: Path, text_file: Path
) -> None:
    assert message in refused(journal, tmp_path, text_file, change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            put(f"{LAYER}.column_steps", lambda t: t.long() << 40),
            "column_steps holds torch.int64, expected torch.uint8",
        ),
        (
            put(f"{LAYER}.column_steps", lambda t: torch.full((2**20,), 255, dtype=torch.uint8)),
            "of shape",
        ),
        (put(f"{LAYER}.spikes_plus", lambda t: t * 0 + 255), "fire at once"),
        (
            put("model.layers.0.self_attn.spikes.key_group", lambda t: t + 9),
            "key_group names group 9",
        ),
    ],
)
def test_other_kinds_of_modules(
    change: Any, message: str, ternary: Path, tmp_path: Path, text_file: Path
) -> None:
    assert message in refused(ternary, tmp_path, text_file, change, *TERNARY)


def test_sound_journals_are_taken(ternary: Path, tmp_path: Path, text_file: Path) -> None:
    resumed, known = [], []
    for place, seen in (
        (Path(shutil.copytree(ternary, tmp_path / "one")), resumed),
        (tmp_path / "two", known),
    ):
        model, tokenizer = spikellm.load(BUNDLED)
        done = spikellm.convert(
            model, tokenizer, "w4a4-t2", str(text_file), **CONVERT, settings=TERNARY, journal=place
        )
        seen += [done.blocks, *model.state_dict().values()]
    assert resumed[0] == known[0]
    assert all(torch.equal(one, other) for one, other in zip(resumed[1:], known[1:], strict=True))
