from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spikellm.core import warn
from spikellm.core.errors import DependencyError, RequestError
from spikellm.core.fingerprint import fingerprint
from spikellm.data.datasets import read_text, require_source
from spikellm.data.stdlib import is_held_out, iterate_docstrings, stdlib_docstrings
from spikellm.data.tokens import tokenize
from spikellm.data.windows import disjoint_windows, random_windows, window_length


@pytest.mark.slow
def test_stdlib_splits_are_disjoint_and_real() -> None:
    calibration, evaluation = (
        list(iterate_docstrings(split)) for split in ("calibration", "evaluation")
    )
    sizes = [sum(len(doc) for _, doc in docs) for docs in (calibration, evaluation)]
    assert sizes[0] > 500_000
    assert 50_000 < sizes[1] < sizes[0] / 3
    held_out, others = ({module for module, _ in docs} for docs in (evaluation, calibration))
    assert all(map(is_held_out, held_out))
    assert not any(map(is_held_out, others))
    assert 0.05 < len(held_out) / len(held_out | others) < 0.25
    assert stdlib_docstrings("evaluation") == "\n\n".join(doc for _, doc in evaluation)


def test_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": t}) for t in ("one", "two")), encoding="utf-8"
    )
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    assert read_text(str(tmp_path / "b.txt"), "evaluation") == "second"
    assert read_text(str(tmp_path / "a.jsonl"), "evaluation") == "one\n\ntwo"
    assert read_text(str(tmp_path), "calibration") == "one\n\ntwo\n\nsecond"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"  \n", "is empty"),
        ("x.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("x.jsonl", b'{"text": "a"}\n{"body": "b"}', "line 2"),
        ("x.jsonl", b"not json", "line 1"),
        ("x.jsonl", b'{"text": 3}', "expected a string"),
        ("x.jsonl", rb'{"text": "a \ud800 b"}', "half of a surrogate pair"),
        (
            "x.jsonl",
            b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            "line 1: expected a JSON object",
        ),
        ("folder", None, "holds no .txt, .text, .jsonl, .ndjson or .json file$"),
        ("x.json", b'{"body": "b"}', "expected JSON texts .*found an object with body"),
        ("x.json", b'["a", {"body": "b"}]', "found an object with body"),
        ("x.json", b'["a", 3]', "text 2: it is int, expected a string"),
        ("x.JSON", b'"a"', "expected JSON texts .*found str"),
        ("x.json", b"plain words", "not JSON"),
        ("x.json", b'{"text": "a"}\n{"body": "b"}', "line 2"),
        ("x.JSONL.GZ", b"\x1f\x8b", "is compressed or an archive; unpack it"),
        ("x.zst", b"words", "is compressed or an archive; unpack it"),
        ("x.parquet", b"PAR1", "is a table; write its texts to a .jsonl"),
        ("x.html", b"<p>words</p>", "is a document with markup"),
        ("x.page", b"\n<!DOCTYPE html><p>words</p>", "is markup, not plain text"),
        ("x.data", b'{"text": "a"}\n{"text": "b"}', "is JSON, and its name does not say so"),
        ("x", b'[\n"a",\n"b"\n]', "is JSON, and its name does not say so"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(RequestError, match=message):
        read_text(str(path), "evaluation")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.JSONL", '{"text": "one"}\n{"text": "two"}'),
        ("x.ndjson", '{"text": "one"}\n\n{"text": "two"}'),
        ("x.json", '[{"text": "one", "id": 1}, {"text": "two"}]'),
        ("x.Json", '["one", "two"]'),
        ("x.json", '{"text": ["one", "two"]}'),
        ("x.json", '{"text": "one\\n\\ntwo"}'),
        ("x.json", '{"text": "one"}\n{"text": "two"}\n'),
        ("x.TXT", "one\n\ntwo"),
        ("x.text", "one\n\ntwo"),
        ("x.md", "one\n\ntwo"),
        ("x.rst", "one\n\ntwo"),
        ("x", "one\n\ntwo"),
    ],
)
def test_every_spelling_of_two_documents(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_text(str(tmp_path / name), "evaluation") == "one\n\ntwo"


@pytest.mark.parametrize("content", ["[1] A reference.", "{\\bf words}", "<who> is it?", "[ ] do"])
def test_words_that_begin_like_markup_are_words(tmp_path: Path, content: str) -> None:
    (tmp_path / "notes.tex").write_text(content, encoding="utf-8")
    assert read_text(str(tmp_path / "notes.tex"), "evaluation") == content


def test_a_folder_says_what_it_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(warn, "_said", set())
    contents = {"A.TXT": "one", "b.JSONL": '{"text": "two"}', "c.json": '["three"]'}
    for name, content in contents.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_text(str(tmp_path), "calibration") == "one\n\ntwo\n\nthree"
    assert not caplog.messages
    (tmp_path / "deep").mkdir()
    for name in ("README.md", "d.jsonl.gz", ".hidden", "deep/e.csv", "f", "g.bin"):
        (tmp_path / name).write_text("<p>", encoding="utf-8")
    for _ in range(2):
        assert read_text(str(tmp_path), "calibration") == "one\n\ntwo\n\nthree"
    assert caplog.messages == [
        f"spikellm: of folder {tmp_path} 3 text files are read and 5 left out: README.md,"
        " d.jsonl.gz, deep/e.csv, f and 1 more"
    ]
    (tmp_path / "c.json").write_text('{"perplexity": 3}', encoding="utf-8")
    with pytest.raises(RequestError, match=r"c.json: expected JSON texts .*or take the file away"):
        read_text(str(tmp_path), "calibration")


def test_a_folder_of_compressed_files_names_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.GZ").write_bytes(b"\x1f\x8b")
    with pytest.raises(RequestError, match=r"holds no .*\(1 with .gz\)"):
        read_text(str(tmp_path), "calibration")


def test_a_compressed_file_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(RequestError, match="is compressed"):
        require_source(str(tmp_path / "a.jsonl.gz"))


def test_more_windows_than_memory_are_refused_before_they_are_drawn() -> None:
    with pytest.raises(RequestError, match="give fewer --samples"):
        random_windows(torch.arange(5000), 2048, 10**12, 0, "text")


def test_line_separators_inside_json_strings(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a\u2028b"}\r\n{"text": "c"}\n', encoding="utf-8")
    assert read_text(str(path), "evaluation") == "a\u2028b\n\nc"


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_a_mark_of_byte_order_is_no_text(tmp_path: Path, name: str) -> None:
    content = "été" if name == "x.txt" else '{"text": "été"}'
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read_text(str(tmp_path / name), "evaluation") == "été"


def test_no_name_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.txt").write_text("private", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match="name of the text is empty"):
        read_text("", "calibration")
    assert read_text(".", "calibration") == "private"


def test_unknown_source() -> None:
    with pytest.raises(RequestError, match="neither a known set .* nor an existing path"):
        read_text("x" * 300, "evaluation")
    with pytest.raises(RequestError, match="neither a known set .* nor an existing path"):
        read_text("wikitext3", "evaluation")


@pytest.mark.parametrize("name", ["wikitext2", "ptb", "c4"])
def test_no_network_names_a_way_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DependencyError, match="give a local path, or 'stdlib'"):
        read_text(name, "evaluation")


def test_hub_texts_are_joined_as_the_field_does(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[dict[str, Any]] = []

    def load(**where: Any) -> dict[str, list[str]]:
        asked.append(where)
        return {"text": ["a", "", "b"], "sentence": ["x", "y"]}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_text("wikitext2", "evaluation") == "a\n\n\n\nb"
    assert read_text("ptb", "evaluation") == "x y"
    assert [(where["split"], where.get("name")) for where in asked] == [
        ("test", "wikitext-2-raw-v1"),
        ("test", "penn_treebank"),
    ]


def test_disjoint_windows_drop_the_tail() -> None:
    assert disjoint_windows(torch.arange(11), 4, "t").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_random_windows_are_decided_by_the_seed() -> None:
    tokens = torch.arange(1000)
    first = random_windows(tokens, 16, 8, 3, "t")
    assert first.shape == (8, 16)
    assert torch.equal(first, random_windows(tokens, 16, 8, 3, "t"))
    assert not torch.equal(first, random_windows(tokens, 16, 8, 4, "t"))
    assert torch.equal(first - first[:, :1], torch.arange(16).expand(8, 16))
    assert random_windows(torch.arange(4), 4, 2, 0, "t").tolist() == [[0, 1, 2, 3]] * 2


def test_text_shorter_than_a_window() -> None:
    with pytest.raises(RequestError, match="has 3 tokens, shorter than one window of 4"):
        disjoint_windows(torch.arange(3), 4, "t")
    with pytest.raises(RequestError, match="shorter than one window"):
        random_windows(torch.arange(3), 4, 1, 0, "t")


def test_window_length() -> None:
    class Config:
        max_position_embeddings = 256

    assert window_length(Config(), None) == 256
    assert window_length(Config(), 100) == 100
    assert window_length(object(), None) == 2048
    with pytest.raises(RequestError, match="above the model's maximum of 256"):
        window_length(Config(), 257)
    with pytest.raises(RequestError, match="too short"):
        window_length(Config(), 1)


def test_tokenize_once_with_the_tokenizers_own_special_tokens(tokenizer: Any) -> None:
    assert tokenize(tokenizer, "def f(): pass").tolist() == tokenizer("def f(): pass")["input_ids"]


def test_fingerprints_are_of_bytes_in_order() -> None:
    x = torch.arange(12).reshape(3, 4)
    assert fingerprint(x.T) == fingerprint(x.T.contiguous()) != fingerprint(x)
    assert fingerprint(torch.tensor(1.5)) != fingerprint(torch.tensor(2.5)), (
        "numbers without an axis too, as some families hold them"
    )
    assert fingerprint(torch.empty(0)) == fingerprint(torch.empty(0, 3))
