"""``spikellm bench --llama-bench``, mostly with a program that only says what llama.cpp's would."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import BUNDLED, first_blocks
from spikellm.__main__ import main
from spikellm.commands.support import llama_bench, timing
from spikellm.commands.support.llama_bench import LlamaBenchOptions, chosen_types, types_near
from spikellm.commands.support.llama_turn import Peer
from spikellm.commands.support.timing import Run, Work
from spikellm.core.errors import SpikeLLMError
from spikellm.core.memory import memory_of

REAL = os.environ.get("SPIKELLM_LLAMA_BENCH") or shutil.which("llama-bench")
WORK = Work(8, 4, 1, "bfloat16", energy=False)
Fake = Callable[..., str]


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    """Makes a program that says something, on standard output or error, and ends with a code; its
    arguments go to ``asked``.
    """

    def make(says: str = "", complains: str = "", code: int = 0) -> str:
        path = tmp_path / "llama-bench"
        path.write_text(
            f"#!{sys.executable}\nimport json, sys\n"
            f"open({str(tmp_path / 'asked')!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
            "given = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
            "rate = 200.0 if given['-n'] == '0' else 50.0\n"
            "record = {'avg_ts': rate, 'build_number': 7, 'model_type': 'llama 1B Q4_1'}\n"
            f"print({says!r} or json.dumps([record]))\n"
            f"print({complains!r}, file=sys.stderr)\nsys.exit({code})\n"
        )
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models take no time, and files are written in this process."""

    def run(name: str, *_: Any) -> Run:
        return Run("Model", 0.02, 0.04, 1000, "torch", None, None, name != str(BUNDLED))

    monkeypatch.setattr(timing, "run_apart", run)
    monkeypatch.setattr(timing, "apart", lambda _, function, *arguments: function(*arguments))


def asked(folder: Path) -> list[dict[str, str]]:
    lines = [json.loads(line) for line in (folder / "asked").read_text().splitlines()]
    return [dict(zip(line[::2], line[1::2], strict=True)) for line in lines]


@pytest.mark.usefixtures("quick")
def test_command(
    capsys: pytest.CaptureFixture[str], fake: Fake, tmp_path: Path, converted_folder: Path
) -> None:
    pytest.importorskip("gguf")
    arguments = ["bench", str(converted_folder), "--original", str(BUNDLED), "--repeat", "2"]
    arguments += ["--llama-bench", fake(), "--threads", "3", "--prompt-tokens", "8"]
    assert main([*arguments, "--new-tokens", "4", "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    _, original, peer = result["rows"]
    assert original["model"] == str(BUNDLED)
    assert peer["model"] == f"{BUNDLED.name}-q4_1-f16.gguf", "4-bit layers, vocabulary as it is"
    assert peer["kind"] == "llama-bench"
    assert peer["kernels"].startswith("llama.cpp 7: 1 f16, ")
    assert peer["prefill_tokens_per_second"] == pytest.approx(200)
    assert peer["decode_tokens_per_second"] == pytest.approx(50)
    assert 0 < peer["disk_bytes"] < original["disk_bytes"] * 3
    assert result["ratio"]["decode_tokens_per_second"] == pytest.approx(1)
    assert result["ratio_llama_cpp"]["decode_tokens_per_second"] == pytest.approx(100 / 50)
    calls = asked(tmp_path)
    assert [(call["-p"], call["-n"], call.get("-d")) for call in calls] == [
        ("8", "0", None),
        ("0", "4", "8"),
    ] * 2
    assert {(call["-t"], call["-ngl"], call["-r"], call["-o"]) for call in calls} == {
        ("3", "0", "1", "json")
    }
    assert not Path(calls[0]["-m"]).exists(), "what was written for it is removed"


@pytest.mark.usefixtures("quick")
def test_a_file_that_is_there(
    capsys: pytest.CaptureFixture[str], fake: Fake, tmp_path: Path, converted_folder: Path
) -> None:
    file = tmp_path / "own.gguf"
    file.write_bytes(b"GGUF")
    arguments = ["bench", str(converted_folder), "--llama-bench", fake(), "--gguf", str(file)]
    assert main([*arguments, "--repeat", "1"]) == 0
    table = " ".join(capsys.readouterr().out.split())
    assert "first over llama.cpp" in table
    assert "first over original" not in table
    assert "an original in" not in table, "nothing runs in a type that could be chosen"
    assert asked(tmp_path)[0]["-m"] == str(file)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gguf-type", "q4_0"], "--gguf-type has no effect without --llama-bench"),
        (["--llama-bench", "./nowhere/llama-bench"], "is not there; give the path"),
        (["--llama-bench", __file__], "is no program that can be run"),
        (["--llama-bench", sys.executable], "give --original, from which a file is written"),
        (["--llama-bench", sys.executable, "--gguf", "missing.gguf"], "missing.gguf is no file"),
        (
            ["--llama-bench", sys.executable, "--original", str(BUNDLED), "--gguf-type", "q9"],
            "unknown GGUF type 'q9'",
        ),
        (
            ["--llama-bench", sys.executable, "--gguf", __file__, "--gguf-type", "q4_0"],
            "which is there; give one",
        ),
    ],
)
def test_wrong_requests(
    capsys: pytest.CaptureFixture[str], converted_folder: Path, arguments: list[str], words: str
) -> None:
    assert main(["bench", str(converted_folder), "--repeat", "1", *arguments]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ({"complains": "failed to load\n", "code": 1}, "ended with 1: failed to load"),
        ({"code": 3}, "ended with 3: it said nothing"),
        ({"says": "| model | t/s |"}, "printed no rate"),
        ({"says": "[]"}, "printed no rate"),
        ({"says": '[{"avg_ts": 0}]'}, "printed no rate"),
    ],
)
def test_a_program_that_fails(fake: Fake, tmp_path: Path, says: dict[str, Any], words: str) -> None:
    peer = Peer(fake(**says), tmp_path / "m.gguf", "m", None)
    with pytest.raises(SpikeLLMError, match=words):
        peer.turn(WORK)


def test_a_program_that_cannot_be_started(tmp_path: Path) -> None:
    path = tmp_path / "llama-bench"
    path.write_bytes(b"\x7fELF and no more")
    path.chmod(0o755)
    with pytest.raises(SpikeLLMError, match="cannot be run"):
        Peer(str(path), tmp_path / "m.gguf", "m", None).turn(WORK)


def test_types_follow_the_model(tmp_path: Path, converted_folder: Path, text_file: Path) -> None:
    import spikellm

    pytest.importorskip("gguf")
    assert types_near(str(BUNDLED)) == ("f16", "f16")
    assert types_near(str(converted_folder)) == ("q4_1", "f16")
    asks = LlamaBenchOptions(gguf_vocabulary_type="q8_0")
    assert chosen_types(str(converted_folder), asks) == ("q4_1", "q8_0")
    model, tokenizer = first_blocks(1)
    coded = ["algorithm.rounds=1", "vocabulary.bits=6"]
    spikellm.convert(
        model, tokenizer, "ternary-1.0", str(text_file), samples=1, seqlen=64, settings=coded
    )
    folder = spikellm.save(model, tokenizer, tmp_path / "ternary")
    assert types_near(str(folder)) == ("tq2_0", "q8_0")
    near = [llama_bench._near(bits, offset=True) for bits in (2, 4, 5, 6, 8, 16)]
    assert near == ["q4_1", "q4_1", "q5_1", "q8_0", "q8_0", "f16"]


def test_memory_of_another_process() -> None:
    assert (memory_of(os.getpid()) or 0) > 1 << 20
    assert memory_of(2**22 + 1) is None


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="no llama-bench on the path or in SPIKELLM_LLAMA_BENCH")
def test_real_program(capsys: pytest.CaptureFixture[str], converted_folder: Path) -> None:
    pytest.importorskip("gguf")
    arguments = ["bench", str(converted_folder), "--original", str(BUNDLED), "--repeat", "1"]
    arguments += ["--prompt-tokens", "8", "--new-tokens", "4", "--threads", "1"]
    assert main([*arguments, "--llama-bench", str(REAL), "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["rows"][-1]["kind"] == "llama-bench"
    assert result["rows"][-1]["peak_memory"] is None or result["rows"][-1]["peak_memory"] > 1 << 20
    assert min(result["ratio_llama_cpp"].values()) > 0
