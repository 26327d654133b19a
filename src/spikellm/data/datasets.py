"""Text and token windows, for calibration and for perplexity.

A source is the name of a known set (``wikitext2``, ``c4``, ``ptb``: from the hub; ``stdlib``: the
running Python's docstrings) or a path: a text file, a ``.jsonl`` file with a ``text`` field, or a
folder of such files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spikellm.core.errors import DependencyError, RequestError
from spikellm.core.files import exists
from spikellm.data.stdlib import Split, stdlib_docstrings

_SUFFIXES = (".txt", ".jsonl")
_C4_DOCUMENTS = 4000


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
    """Refuse a source that is neither the name of a set nor an existing path.

    Raises:
        RequestError: it is neither; the message lists the known sets.
    """
    if not source:
        raise RequestError(
            f"the name of the text is empty; give a known set ({', '.join(NAMED)}) or a path ('.'"
            " for the current folder)"
        )
    if source not in NAMED and not exists(Path(source)):
        raise RequestError(
            f"text {source!r} is neither a known set ({', '.join(NAMED)}) nor an existing path"
        )


def _read_path(path: Path) -> str:
    if path.is_dir():
        files = sorted(
            file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file()
        )
        if not files:
            raise RequestError(f"folder {path} holds no {' or '.join(_SUFFIXES)} file")
        return "\n\n".join(_read_path(file) for file in files)
    try:
        text = path.read_text(encoding="utf-8-sig")  # a mark of byte order is no text
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it, or give a .txt or .jsonl"
            " file"
        ) from None
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
            raise RequestError(
                f"{path}, line {number}: expected a JSON object with a 'text' field"
            ) from None
        if not isinstance(documents[-1], str):
            raise RequestError(
                f"{path}, line {number}: 'text' is {type(documents[-1]).__name__}, expected a"
                " string"
            )
        if any("\ud800" <= letter <= "\udfff" for letter in documents[-1]):
            raise RequestError(
                f"{path}, line {number}: 'text' holds half of a surrogate pair (\\ud800 to"
                " \\udfff), which is no character; repair it"
            )
    return documents


def _from_hub(source: str, field: str, /, **where: Any) -> list[str]:
    import datasets

    try:
        data = datasets.load_dataset(**where)
        return list(data[field])
    except Exception as error:  # the hub client raises many kinds, which all mean the same here
        reason = " ".join(str(error).split())[:160]
        raise DependencyError(
            f"the text {source!r} comes from the hub, which could not be read ({reason}); give a"
            " local path, or 'stdlib', instead"
        ) from None


def _wikitext2(split: Split) -> str:
    part = "train" if split == "calibration" else "test"
    return "\n\n".join(
        _from_hub(
            "wikitext2", "text", path="Salesforce/wikitext", name="wikitext-2-raw-v1", split=part
        )
    )


def _ptb(split: Split) -> str:
    part = "train" if split == "calibration" else "test"
    lines = _from_hub(
        "ptb",
        "sentence",
        path="ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",
        name="penn_treebank",
        split=part,
    )
    return ("\n\n" if split == "calibration" else " ").join(lines)


def _c4(split: Split) -> str:
    file = (
        "en/c4-train.00000-of-01024.json.gz"
        if split == "calibration"
        else "en/c4-validation.00000-of-00008.json.gz"
    )
    documents = _from_hub(
        "c4", "text", path="allenai/c4", data_files={"part": file}, split=f"part[:{_C4_DOCUMENTS}]"
    )
    return "\n\n".join(documents)


NAMED: dict[str, Callable[[Split], str]] = {
    "wikitext2": _wikitext2,
    "c4": _c4,
    "ptb": _ptb,
    "stdlib": stdlib_docstrings,
}
