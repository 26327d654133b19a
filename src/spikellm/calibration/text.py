"""Text and token windows, for calibration and for perplexity.

A source is the name of a known set (``wikitext2``, ``c4``, ``ptb``: from the hub; ``stdlib``: the running Python's docstrings) or a path: a text
file, a ``.jsonl`` file with a ``text`` field, or a folder of such files.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikellm.calibration.stdlib_text import Split, stdlib_docstrings
from spikellm.errors import DependencyError, RequestError
from spikellm.files import exists
from spikellm.modeling.families import longest_window

DEFAULT_SEQLEN = 2048
_SUFFIXES = (".txt", ".jsonl")
_C4_DOCUMENTS = 4000
_REMEMBERED = 4


def read_text(source: str, split: Split) -> str:
    """Text of a source.

    Args:
        source: name of a set, or path. A path gives the same text for either split.
        split: ``"calibration"`` (training part) or ``"evaluation"`` (test part) of a named set.

    Raises:
        RequestError: no such set or file, not text, or empty.
        DependencyError: the hub cannot be reached.
    """
    require_source(source)
    text = NAMED[source](split) if source in NAMED else _read_path(Path(source))
    if not text.strip():
        raise RequestError(f"text {source!r} is empty; give a file with some text in it")
    return text


def require_source(source: str) -> None:
    """Refuse what is neither the name of a set nor an existing path.

    Raises:
        RequestError: says what there is.
    """
    if not source:
        raise RequestError(f"the name of the text is empty; give a known set ({', '.join(NAMED)}) or a path ('.' for the current folder)")
    if source not in NAMED and not exists(Path(source)):
        raise RequestError(f"text {source!r} is neither a known set ({', '.join(NAMED)}) nor an existing path")


def _read_path(path: Path) -> str:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise RequestError(f"folder {path} holds no {' or '.join(_SUFFIXES)} file")
        return "\n\n".join(_read_path(file) for file in files)
    try:
        text = path.read_text(encoding="utf-8-sig")  # a mark of byte order is no text
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start}); convert it, or give a .txt or .jsonl file") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    return "\n\n".join(_json_lines(path, text)) if path.suffix == ".jsonl" else text


def _json_lines(path: Path, text: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            documents.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise RequestError(f"{path}, line {number}: expected a JSON object with a 'text' field") from None
        if not isinstance(documents[-1], str):
            raise RequestError(f"{path}, line {number}: 'text' is {type(documents[-1]).__name__}, expected a string")
        if any("\ud800" <= letter <= "\udfff" for letter in documents[-1]):
            raise RequestError(
                f"{path}, line {number}: 'text' holds half of a surrogate pair (\\ud800 to \\udfff), which is no character; repair it"
            )
    return documents


def _from_hub(source: str, field: str, /, **where: Any) -> list[str]:
    import datasets

    try:
        data = datasets.load_dataset(**where)
        return list(data[field])
    except Exception as error:  # the hub client raises many kinds, all of which mean the same to the user
        reason = " ".join(str(error).split())[:160]
        raise DependencyError(
            f"the text {source!r} comes from the hub, which could not be read ({reason}); give a local path, or 'stdlib', instead"
        ) from None


def _wikitext2(split: Split) -> str:
    part = "train" if split == "calibration" else "test"
    return "\n\n".join(_from_hub("wikitext2", "text", path="Salesforce/wikitext", name="wikitext-2-raw-v1", split=part))


def _ptb(split: Split) -> str:
    part = "train" if split == "calibration" else "test"
    lines = _from_hub(
        "ptb", "sentence", path="ptb-text-only/ptb_text_only", revision="refs/convert/parquet", name="penn_treebank", split=part
    )
    return ("\n\n" if split == "calibration" else " ").join(lines)


def _c4(split: Split) -> str:
    file = "en/c4-train.00000-of-01024.json.gz" if split == "calibration" else "en/c4-validation.00000-of-00008.json.gz"
    documents = _from_hub("c4", "text", path="allenai/c4", data_files={"part": file}, split=f"part[:{_C4_DOCUMENTS}]")
    return "\n\n".join(documents)


NAMED: dict[str, Callable[[Split], str]] = {"wikitext2": _wikitext2, "c4": _c4, "ptb": _ptb, "stdlib": stdlib_docstrings}


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Tokens of a whole text, tokenized once with the tokenizer's own special tokens: int64, ``(tokens,)``."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)


_recent: OrderedDict[tuple[str, ...], Tensor] = OrderedDict()


def read_tokens(tokenizer: Any, source: str, split: Split) -> Tensor:
    """Tokens of a source, ``(tokens,)``; the last few are remembered, since comparisons read the same text again and again."""
    text = read_text(source, split)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenize(tokenizer, text)
    key = (hashlib.sha256(text.encode()).hexdigest(), hashlib.sha256(backend.to_str().encode()).hexdigest())
    if key not in _recent:
        _recent[key] = tokenize(tokenizer, text)
    _recent.move_to_end(key)
    while len(_recent) > _REMEMBERED:
        _recent.popitem(last=False)
    return _recent[key]


def require_known(tokens: Tensor, model: Any) -> None:
    """Refuse tokens that a model has no embedding for.

    Raises:
        RequestError: the tokenizer is that of another model.
    """
    known, largest = int(model.get_input_embeddings().weight.shape[0]), int(tokens.max()) if tokens.numel() else 0
    if largest >= known:
        raise RequestError(f"the tokenizer gives token {largest} and the model knows {known}; give the tokenizer that belongs to the model")


def window_length(config: object, seqlen: int | None) -> int:
    """Tokens of a window: as asked, else the smaller of 2048 and what the model can attend to.

    Raises:
        RequestError: longer than the model's maximum, or too short to predict anything.
    """
    longest = longest_window(config)
    if seqlen is None:
        return min(DEFAULT_SEQLEN, longest or DEFAULT_SEQLEN)
    if longest is not None and seqlen > longest:
        raise RequestError(f"seqlen {seqlen} is above the model's maximum of {longest} tokens; give --seqlen {longest} or less")
    if seqlen < 2:
        raise RequestError(f"seqlen {seqlen} is too short; a window needs at least 2 tokens to predict one from another")
    return seqlen


def disjoint_windows(tokens: Tensor, seqlen: int, source: str) -> Tensor:
    """Consecutive windows, the tail dropped: ``(windows, seqlen)``.

    Raises:
        RequestError: the text is shorter than one window.
    """
    _require_window(tokens, seqlen, source)
    return tokens[: tokens.shape[0] // seqlen * seqlen].view(-1, seqlen)


def random_windows(tokens: Tensor, seqlen: int, samples: int, seed: int, source: str) -> Tensor:
    """Windows at random places, ``(samples, seqlen)``; the same seed gives the same windows.

    Raises:
        RequestError: the text is shorter than one window, or so many windows do not fit into memory.
    """
    import psutil

    _require_window(tokens, seqlen, source)
    needed, free = samples * seqlen * tokens.element_size(), int(psutil.virtual_memory().available)
    if needed > free:
        raise RequestError(f"{samples} windows of {seqlen} tokens take {needed:,} bytes and {free:,} are free; give fewer --samples")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(tokens.shape[0] - seqlen + 1, (samples,), generator=generator)
    return torch.stack([tokens[start : start + seqlen] for start in starts.tolist()])


def _require_window(tokens: Tensor, seqlen: int, source: str) -> None:
    if tokens.shape[0] < seqlen:
        raise RequestError(
            f"text {source!r} has {tokens.shape[0]} tokens, shorter than one window of {seqlen}; give a longer text or --seqlen {max(2, tokens.shape[0])}"
        )


def fingerprint(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, to tell whether two runs saw the same."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()
