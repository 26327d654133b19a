from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer

from conftest import BUNDLED
from spikellm.export.gguf_tokenizer import _WORDS, add_tokenizer

gguf = pytest.importorskip("gguf")

SIZE = 2050


def changed(**changes: Any) -> Any:
    """The bundled tokenizer with other parts; ``model`` and ``added`` change single values."""
    data = json.loads((BUNDLED / "tokenizer.json").read_text(encoding="utf-8"))
    data["model"] |= changes.pop("model", {})
    data["added_tokens"][1] |= changes.pop("added", {})
    backend = Tokenizer.from_str(json.dumps({**data, **changes}))
    ends = {"bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **ends)


def written(tokenizer: Any, folder: Path, size: int = SIZE) -> tuple[str | None, dict[str, Any]]:
    """Why it was left out, and what a file says of it."""
    writer = gguf.GGUFWriter(None, "llama")
    reason = add_tokenizer(writer, tokenizer, size)
    writer.write_header_to_file(folder / "t.gguf")
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    fields = gguf.GGUFReader(folder / "t.gguf").fields
    return reason, {name: field.contents() for name, field in fields.items()}


def split_by(expression: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated"}
    after = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    parts = [{**split, "invert": False}, {**after, "use_regex": False}]
    return {"type": "Sequence", "pretokenizers": parts}


def test_tokens_merges_and_types(tmp_path: Path) -> None:
    tokenizer = changed()
    tokenizer.chat_template = "{{ messages }}"
    reason, fields = written(tokenizer, tmp_path)
    assert reason is None
    own = json.loads((BUNDLED / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = fields["tokenizer.ggml.tokens"]
    assert {name: tokens.index(name) for name in own["vocab"]} == own["vocab"]
    assert tokens[2048:] == ["[PAD2048]", "[PAD2049]"]
    assert fields["tokenizer.ggml.token_type"] == [3, 3, *[1] * 2046, 5, 5]
    assert len(fields["tokenizer.ggml.merges"]) == len(own["merges"])
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.bos_token_id"] == 0
    assert fields["tokenizer.ggml.eos_token_id"] == 1
    assert not fields["tokenizer.ggml.add_bos_token"]
    assert fields["tokenizer.chat_template"] == "{{ messages }}"


def test_tokens_around_a_text(tmp_path: Path, bos_tokenizer: Any) -> None:
    reason, fields = written(bos_tokenizer, tmp_path)
    assert reason is None
    assert fields["tokenizer.ggml.add_bos_token"]
    assert not fields["tokenizer.ggml.add_eos_token"]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"pre_tokenizer": split_by(_WORDS % ""), "normalizer": {"type": "NFC"}}, "qwen2"),
        (
            {"pre_tokenizer": split_by(_WORDS % "{1,3}"), "model": {"ignore_merges": True}},
            "llama-bpe",
        ),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Digits", "individual_digits": True},
                        {
                            "type": "ByteLevel",
                            "add_prefix_space": False,
                            "trim_offsets": True,
                            "use_regex": True,
                        },
                    ],
                }
            },
            "smollm",
        ),
    ],
)
def test_names_of_other_ways_to_split(changes: dict[str, Any], name: str, tmp_path: Path) -> None:
    reason, fields = written(changed(**changes), tmp_path)
    assert reason is None
    assert fields["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model": {"byte_fallback": True}}, "no tokenizer of byte pairs"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "marks parts of words"),
        ({"pre_tokenizer": None}, "split text"),
        ({"pre_tokenizer": split_by(r"\s+")}, "split text"),
        ({"pre_tokenizer": split_by(_WORDS % "{1,3}")}, "whole words"),
        ({"normalizer": {"type": "Lowercase"}}, "changes text"),
        ({"added": {"lstrip": True}}, "take the space"),
    ],
)
def test_what_it_cannot_say_is_left_out(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    reason, fields = written(changed(**changes), tmp_path)
    assert why in str(reason)
    assert fields["tokenizer.ggml.model"] == "no_vocab"
    assert "tokenizer.ggml.tokens" not in fields


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    assert "more tokens than the model's 2047 rows" in str(written(changed(), tmp_path, 2047)[0])


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    assert "no tokenizer of byte pairs" in str(written(None, tmp_path)[0])
