"""What a command reads is not what it writes, and is looked for before the work."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import spikellm.api
from conftest import BUNDLED
from interruptions import bytes_of
from spikellm.__main__ import main
from spikellm.commands.support.inputs import sources


@pytest.fixture
def place(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, texts, a recipe, energies and a folder of tasks, in the current folder."""
    shutil.copytree(BUNDLED, tmp_path / "model")
    shutil.copy(text_file, tmp_path / "mine.txt")
    (tmp_path / "texts").mkdir()
    shutil.copy(text_file, tmp_path / "texts" / "part.txt")
    (tmp_path / "mine.yaml").write_text(
        "weights: {bits: 8}\ncalibration: {text: mine.txt}\n", encoding="utf-8"
    )
    (tmp_path / "energies.yaml").write_text("name: mine", encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "one.yaml").write_text("task: one", encoding="utf-8")
    (tmp_path / "link.txt").symlink_to("mine.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("report model --text mine.txt --out model/model.safetensors", "lies in model"),
        ("report model --text mine.txt --out mine.txt", "is what this command reads"),
        ("report model --text mine.txt --beside model --json model/new.json", "lies in model"),
        ("report model --json same.html --out same.html", "overwrite each other"),
        ("report model --json report.html --out ./report.html", "overwrite each other"),
        (
            "report model --energy-table energies.yaml --json energies.yaml",
            "is what this command reads",
        ),
        ("inspect model --json model/config.json", "lies in model"),
        ("inspect ./model/ --json ../place/model/config.json", "lies in model"),
        ("eval model --perplexity mine.txt --json mine.txt", "is what this command reads"),
        ("eval model --perplexity mine.txt --json link.txt", "is what this command reads"),
        ("eval model --perplexity texts --json texts/part.txt", "lies in texts"),
        ("eval model --perplexity texts --json texts/new.JSON", "lies in texts"),
        ("eval model --tasks one --task-folder tasks --json tasks/one.yaml", "lies in tasks"),
        ("generate model word --json model/config.json", "lies in model"),
        ("recipes mine.yaml --json mine.yaml", "is what this command reads"),
        (
            "compare model --recipes w8a8,mine.yaml --perplexity texts --json mine.yaml",
            "is what this command reads",
        ),
        (
            "compare model --recipes mine.yaml --perplexity texts --json mine.txt",
            "is what this command reads",
        ),
        (
            (
                "compare model --recipes w8a8 --perplexity texts --calibration mine.txt --json"
                " mine.txt"
            ),
            "is what this command reads",
        ),
        (
            "sweep model --recipe mine.yaml --perplexity texts --json mine.yaml",
            "is what this command reads",
        ),
        (
            "sweep model --perplexity mine.txt --out texts --json texts/sweep.json",
            "overwrite each other",
        ),
        ("bench model --original model --json model/config.json", "lies in model"),
        ("convert model out --recipe mine.yaml --json mine.txt", "is what this command reads"),
        ("convert model texts --json texts/config.json", "overwrite each other"),
        ("trace model --text mine.txt --out tasks --json tasks/trace.json", "overwrite each other"),
    ],
)
def test_outputs_destroy_no_input(
    arguments: str, words: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = bytes_of(place)
    assert main(arguments.replace("../place", f"../{place.name}").split()) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert bytes_of(place) == before


def test_names_of_sets_and_presets_are_no_files(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("stdlib", "w8a8"):
        shutil.copy(place / "mine.txt", place / name)
    assert not any(
        source.includes(place / "stdlib")
        for source in sources(texts=["stdlib"], models=["organisation/model"])
    )
    assert main(["recipes", "w8a8", "--json", "w8a8"]) == 0
    assert (place / "w8a8").read_text(encoding="utf-8").startswith("{")
    assert not any(
        source.includes(place / "texts" / "new.csv") for source in sources(texts=["texts"])
    ), "which is not read as text"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            "eval model --perplexity mine.txt --perplexity nosuch.txt",
            "'nosuch.txt' is neither a known set",
        ),
        ("eval model --perplexity mine.txt --limit 0", "limit is 0"),
        (
            "compare model --recipes w8a8 --perplexity mine.txt --perplexity nosuch.txt",
            "'nosuch.txt' is neither a known set",
        ),
        ("compare model --recipes w8a8 --perplexity mine.txt --limit 0", "limit is 0"),
        (
            "sweep model --perplexity mine.txt --perplexity nosuch.txt",
            "'nosuch.txt' is neither a known set",
        ),
        ("sweep model --perplexity mine.txt --limit 0", "limit is 0"),
        ("report model --text nosuch.txt", "'nosuch.txt' is neither a known set"),
        ("report model --text mine.txt --beside texts", "folder texts has no config.json"),
        (
            "report model --text mine.txt --beside model --beside nosuch",
            "'nosuch' is no folder here",
        ),
        (
            "report model --text mine.txt --energy-table energies.yaml",
            "energy table energies.yaml: source",
        ),
    ],
)
def test_inputs_are_looked_for_before_the_work(
    arguments: str,
    words: str,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spikellm.api, "load", lambda *_, **__: pytest.fail("loaded a model"))
    assert main(arguments.split()) == (1 if "nosuch' is no folder" in words else 2)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("convert ../model .", "is, or holds, the current folder"),
        ("convert ../model ..", "which is to be read"),
        ("convert organisation/model .. --force", "is, or holds, the current folder"),
        ("trace ../model --out .", "is, or holds, the current folder"),
    ],
)
def test_the_current_folder_is_not_replaced(
    arguments: str,
    words: str,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (place / "empty").mkdir()
    monkeypatch.chdir(place / "empty")
    monkeypatch.setattr(spikellm.api, "load", lambda *_, **__: pytest.fail("loaded a model"))
    assert main(arguments.split()) == 2
    assert words in capsys.readouterr().err
    assert not list((place / "empty").iterdir())


def test_a_current_folder_that_is_gone(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "gone").mkdir()
    monkeypatch.chdir(place / "gone")
    (place / "gone").rmdir()
    assert main(["convert", str(place / "model"), "out"]) == 2
    assert "the current folder was deleted" in capsys.readouterr().err


def test_a_page_goes_into_a_pipe_without_replacing_it(place: Path) -> None:
    import os
    import threading

    from spikellm.core.files import write_text

    os.mkfifo(place / "pipe")
    read: list[str] = []
    reader = threading.Thread(
        target=lambda: read.append((place / "pipe").read_text(encoding="utf-8"))
    )
    reader.start()
    write_text(place / "pipe", "page")
    reader.join()
    assert read == ["page"]
    assert (place / "pipe").is_fifo()
