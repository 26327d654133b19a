"""Text and token windows, for calibration and for perplexity.

A source is the name of a known set (``wikitext2``, ``c4``, ``ptb``: from the hub; ``stdlib``: the
running Python's docstrings) or a path: a file with text or with JSON texts, or a folder of such
files (see :mod:`spikellm.data.text_files`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from spikellm.core.errors import DependencyError, RequestError
from spikellm.core.files import exists
from spikellm.data.stdlib import Split, stdlib_docstrings
from spikellm.data.text_files import read_path, require_text_file

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
    text = NAMED[source](split) if source in NAMED else read_path(Path(source))
    if not text.strip():
        raise RequestError(f"text {source!r} is empty; give a file with some text in it")
    return text


def require_source(source: str) -> None:
    """Refuse a source that is neither the name of a set nor an existing path, or a file whose name
    says that it is no text.

    Raises:
        RequestError: says what is known, or what would do.
    """
    if not source:
        raise RequestError(
            f"the name of the text is empty; give a known set ({', '.join(NAMED)}) or a path ('.'"
            " for the current folder)"
        )
    if source in NAMED:
        return
    if not exists(Path(source)):
        raise RequestError(
            f"text {source!r} is neither a known set ({', '.join(NAMED)}) nor an existing path"
        )
    require_text_file(Path(source))


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
