"""Tokenizers of byte pairs in GGUF files; others have no exact words there, or none that this
package knows.
"""

from __future__ import annotations

import json
from typing import Any

from spikellm.models.families import GGUF_BYTE_PAIRS, GGUF_DIGITS, GGUF_WHOLE_WORDS

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = {"type": "ByteLevel", "add_prefix_space": False}
_DIGITS = {"type": "Digits", "individual_digits": True}


def _splitting(expression: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated"}
    return [{**split, "invert": False}, {**_BYTES, "use_regex": False}]


_PARTS = {
    "gpt-2": [{**_BYTES, "use_regex": True}],
    "smollm": [_DIGITS, {**_BYTES, "use_regex": True}],
    **{name: _splitting(_WORDS % digits) for name, digits in GGUF_DIGITS.items()},
}
"""Parts of pre-tokenizers by the names that llama.cpp has for them (``tokenizer.ggml.pre``)."""
_TYPES = {"normal": 1, "control": 3, "user": 4, "unused": 5}
_NONE: tuple[Any, ...] = (None, "")


def add_tokenizer(writer: Any, tokenizer: Any, size: int) -> str | None:
    """Describe a tokenizer to a writer of a GGUF file, or write that there is none.

    Args:
        size: rows of the model's embedding; tokens that are missing are filled up.

    Returns:
        Why it was left out, to follow what was; None where the file holds it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    data = {} if backend is None else json.loads(backend.to_str())
    reason = _unfit(data, tokenizer, size) if data else "it is no tokenizer of byte pairs"
    if reason is not None:
        writer.add_tokenizer_model("no_vocab")
        return reason
    added = {one["id"]: one for one in data["added_tokens"]}
    names = {number: name for name, number in data["model"]["vocab"].items()}
    names |= {number: one["content"] for number, one in added.items()}
    types = dict.fromkeys(names, _TYPES["normal"])
    types |= {at: _TYPES["control" if one["special"] else "user"] for at, one in added.items()}
    writer.add_tokenizer_model(GGUF_BYTE_PAIRS)
    writer.add_tokenizer_pre(_pre_of(data))
    writer.add_token_list([names.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types([types.get(number, _TYPES["unused"]) for number in range(size)])
    merges = data["model"]["merges"]
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    for kind in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{kind}_token_id", None)) is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    before, after = _around(tokenizer)
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(template)
    return None


def _unfit(data: dict[str, Any], tokenizer: Any, size: int) -> str | None:
    """Why a tokenizer cannot be told; None if it can."""
    model, added = data["model"], data["added_tokens"]
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("dropout"):
        return f"it is no tokenizer of byte pairs but {model['type']}"
    if any(
        model.get(key) not in _NONE for key in ("continuing_subword_prefix", "end_of_word_suffix")
    ):
        return "it marks parts of words"
    pre = _pre_of(data)
    if pre is None:
        return "llama.cpp is not known to split text into words as it does"
    if bool(model.get("ignore_merges")) != (pre in GGUF_WHOLE_WORDS):
        return "llama.cpp looks up whole words where it does not, or the other way round"
    if data["normalizer"] not in (None, {"type": "NFC"}):
        return f"it changes text before it splits it ({data['normalizer']['type']})"
    if any(one[key] for one in added for key in ("lstrip", "rstrip", "single_word")):
        return "it has tokens that take the space around them"
    if max([*model["vocab"].values(), *(one["id"] for one in added)]) >= size:
        return f"it has more tokens than the model's {size} rows"
    before, after = _around(tokenizer)
    known = [[], [tokenizer.bos_token_id]], [[], [tokenizer.eos_token_id]]
    if before not in known[0] or after not in known[1]:
        return "it puts other tokens than BOS and EOS around a text"
    return None


def _pre_of(data: dict[str, Any]) -> str | None:
    """llama.cpp's name for how text is split before pairs are merged."""
    found = data["pre_tokenizer"] or {}
    parts = found.get("pretokenizers", [found])
    kept = [{key: value for key, value in part.items() if key != "trim_offsets"} for part in parts]
    return next((name for name, own in _PARTS.items() if own == kept), None)


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens that are put before and after a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(
        (at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), len(whole)
    )
    return whole[:start], whole[start + len(plain) :]
