"""Text of files and folders. The suffix of a name says how a file is read, in capital letters too:

- ``.txt``, ``.text``, ``.md``: as it is;
- ``.jsonl``, ``.ndjson``: a JSON object with a ``text`` field in each line;
- ``.json``: an array of strings or of such objects, one object whose ``text`` is a string or an
  array of strings, or lines as in ``.jsonl``;
- compressed files, tables and documents with markup are refused;
- any other file is read as it is, unless it begins like JSON or markup.

Of a folder the files with the suffixes of :data:`FOLDER_SUFFIXES` are read, and a warning names the
others. Markdown is not among them: beside data it describes the data.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from spikellm.core.errors import RequestError
from spikellm.core.io import PlainDataError, parse_json
from spikellm.core.warn import say_once

FOLDER_SUFFIXES = (".txt", ".text", ".jsonl", ".ndjson", ".json")
"""What is read of a folder."""

_PLAIN, _LINES = (".txt", ".text", ".md"), (".jsonl", ".ndjson")
_REFUSED = {
    **dict.fromkeys(
        (".gz", ".zst", ".bz2", ".xz", ".lz4", ".br", ".z", ".zip", ".7z", ".rar", ".tar", ".tgz"),
        "is compressed or an archive; unpack it, and give the file that is in it",
    ),
    **dict.fromkeys(
        (".parquet", ".arrow", ".feather", ".orc", ".avro", ".csv", ".tsv", ".xlsx"),
        "is a table; write its texts to a .jsonl file, each line an object with a 'text' field",
    ),
    **dict.fromkeys(
        (".html", ".htm", ".xhtml", ".xml", ".pdf", ".doc", ".docx", ".odt", ".epub", ".rtf"),
        "is a document with markup; write its text alone to a .txt file",
    ),
}
_MARKUP = re.compile(r"\s*<(!doctype|\?xml|html|head|body)\b", re.IGNORECASE)
_NAMED = 4  # files that a warning names


def require_text_file(path: Path) -> None:
    """Refuse a file whose name says that it is not read.

    Raises:
        RequestError: it is compressed, a table or a document; says what would do.
    """
    if path.is_file() and (reason := _REFUSED.get(path.suffix.lower())):
        raise RequestError(f"{path} {reason}")


def read_path(path: Path) -> str:
    """Text of a file, or of the files of a folder in the order of their names, a blank line between
    documents.

    Raises:
        RequestError: not UTF-8, not as its suffix says, or nothing to read.
    """
    return _read_folder(path) if path.is_dir() else _read_file(path)


def _read_folder(path: Path) -> str:
    found = sorted(file for file in path.rglob("*") if file.is_file())
    files = [file for file in found if file.suffix.lower() in FOLDER_SUFFIXES]
    others = [file.relative_to(path) for file in found if file not in set(files)]
    others = [file for file in others if not any(part.startswith(".") for part in file.parts)]
    if not files:
        kinds = Counter(file.suffix.lower() or "no suffix" for file in others)
        there = ", ".join(f"{count} with {kind}" for kind, count in kinds.most_common(_NAMED))
        raise RequestError(
            f"folder {path} holds no {', '.join(FOLDER_SUFFIXES[:-1])} or {FOLDER_SUFFIXES[-1]}"
            f" file{f' ({there})' if there else ''}"
        )
    if others:
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        say_once(
            f"of folder {path} {len(files)} text files are read and {len(others)} left out:"
            f" {', '.join(map(str, others[:_NAMED]))}{more}"
        )
    return "\n\n".join(map(_read_file, files))


def _read_file(path: Path) -> str:
    require_text_file(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # a mark of byte order is no text
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it, or give a .txt or .jsonl"
            " file"
        ) from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    suffix = path.suffix.lower()
    if suffix in _LINES:
        return "\n\n".join(_json_lines(path, text))
    if suffix == ".json":
        return "\n\n".join(_json(path, text))
    if suffix not in _PLAIN:
        _require_plain(path, text)
    return text


def _json_lines(path: Path, text: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise RequestError(
                f"{path}, line {number}: expected a JSON object with a 'text' field"
            ) from None
        documents.append(_checked(document, f"{path}, line {number}: 'text'"))
    return documents


def _json(path: Path, text: str) -> list[str]:
    """Documents of a JSON file; some hold an object a line."""
    if not text.strip():
        return []
    try:
        data = parse_json(text)
    except PlainDataError as error:
        if _is_json(text.lstrip().partition("\n")[0]):
            return _json_lines(path, text)
        raise RequestError(f"{path}: {error}; repair it, or give a .txt or .jsonl file") from None
    if isinstance(data, dict) and "text" in data:
        texts = data["text"]
        data = texts if isinstance(texts, list) else [texts]
    elif not isinstance(data, list):
        raise _no_text(path, data)
    odd = next((entry for entry in data if isinstance(entry, dict) and "text" not in entry), None)
    if odd is not None:
        raise _no_text(path, odd)
    texts = [entry["text"] if isinstance(entry, dict) else entry for entry in data]
    return [_checked(one, f"{path}, text {place}: it") for place, one in enumerate(texts, start=1)]


def _no_text(path: Path, data: Any) -> RequestError:
    if isinstance(data, dict):
        names = ", ".join(ascii(name)[1:-1][:20] for name in list(data)[:_NAMED])
        found = f"an object with {names or 'nothing in it'}"
    else:
        found = type(data).__name__
    return RequestError(
        f"{path}: expected JSON texts (an array of strings or of objects with a 'text' field, or"
        f" one such object), found {found}; give the texts so, or take the file away"
    )


def _checked(document: Any, what: str) -> str:
    if not isinstance(document, str):
        raise RequestError(f"{what} is {type(document).__name__}, expected a string")
    if any("\ud800" <= letter <= "\udfff" for letter in document):
        raise RequestError(
            f"{what} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character;"
            " repair it"
        )
    return document


def _require_plain(path: Path, text: str) -> None:
    """Refuse a file of an unknown suffix that begins like JSON or markup."""
    if _MARKUP.match(text):
        raise RequestError(f"{path} is markup, not plain text; write its text alone to a .txt file")
    if text.lstrip().startswith(("{", "[")) and (
        _is_json(text.strip().partition("\n")[0]) or _is_json(text)
    ):
        raise RequestError(
            f"{path} is JSON, and its name does not say so; name it .json (or .jsonl, if each line"
            " is an object), or .txt to read it as it is"
        )


def _is_json(text: str) -> bool:
    """Whether a text is a JSON object or array."""
    try:
        return isinstance(parse_json(text), (dict, list))
    except PlainDataError:
        return False
