from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import spikellm
from conftest import BUNDLED
from interruptions import bytes_of
from spikellm.__main__ import main


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_convert_eval_generate_inspect(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text_file: Path
) -> None:
    """The main job as a user types it."""
    out = tmp_path / "new" / "w4a4"
    arguments = (
        "convert",
        BUNDLED,
        out,
        "--recipe",
        "w4a4-t2",
        "--calibration",
        text_file,
        "--samples",
        2,
        "--seqlen",
        32,
        "--set",
        "weights.bits=3",
        "--seed",
        5,
    )
    status, stdout, stderr = run(capsys, *arguments)
    assert status == 0, stderr
    assert "35 spiking layers, 1.099 steps" in stdout
    assert "block 5/5" in stderr
    assert "left dense: lm_head" in stderr
    assert [path.name for path in out.parent.iterdir()] == ["w4a4"], "no temporary folder is left"

    status, stdout, _ = run(
        capsys, "eval", out, "--perplexity", text_file, "--limit", 2, "--seqlen", 64, "--json", "-"
    )
    result = json.loads(stdout)
    assert result["model"] == str(out)
    assert result["perplexity"][str(text_file)].keys() == {
        "value",
        "tokens",
        "windows",
        "seqlen",
        "bos",
    }
    model, tokenizer = spikellm.load(out)
    assert (
        result["perplexity"][str(text_file)]["value"]
        == spikellm.perplexity(model, tokenizer, str(text_file), seqlen=64, limit=2).value
    )

    status, stdout, _ = run(
        capsys,
        "eval",
        out,
        "--perplexity",
        text_file,
        "--limit",
        1,
        "--seqlen",
        16,
        "--form",
        "binary",
    )
    assert status == 0
    assert "perplexity" in stdout

    status, stdout, _ = run(capsys, "generate", out, "Return a list of", "--max-new-tokens", 8)
    assert status == 0
    assert stdout.startswith("Return a list of")
    _, again, _ = run(capsys, "generate", out, "Return a list of", "--max-new-tokens", 8)
    assert again == stdout, "greedy is repeatable"
    _, sampled, _ = run(
        capsys,
        "generate",
        out,
        "Return a list of",
        "--max-new-tokens",
        8,
        "--temperature",
        1.5,
        "--seed",
        1,
    )
    _, same, _ = run(
        capsys,
        "generate",
        out,
        "Return a list of",
        "--max-new-tokens",
        8,
        "--temperature",
        1.5,
        "--seed",
        1,
    )
    assert sampled == same != stdout

    status, stdout, _ = run(capsys, "inspect", out, "--json", "-")
    inspected = json.loads(stdout)
    assert inspected["recipe"]["seed"] == 5
    assert {layer["weight_bits"] for layer in inspected["layers"] if layer["spiking"]} == {3}
    assert [one["train"] for one in inspected["trains"]] == ["centered"]
    assert inspected["average_steps"] == pytest.approx(1.1, abs=0.01)
    status, stdout, _ = run(capsys, "inspect", out)
    assert "model.layers.0.self_attn.q_proj" in stdout
    assert "gif 4" in stdout


def test_greedy_takes_the_likeliest_token_whatever_the_model_brings(
    bundled: tuple[Any, Any],
) -> None:
    model, tokenizer = bundled
    plain = spikellm.generate(model, tokenizer, "Return a list of", max_new_tokens=12)
    tokens = tokenizer("Return a list of", return_tensors="pt")["input_ids"]
    for _ in range(12):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    assert plain == tokenizer.decode(tokens[0], skip_special_tokens=True)
    own = {
        "repetition_penalty": 9.0,
        "num_beams": 3,
        "suppress_tokens": tokens[0].tolist(),
        "min_p": 0.5,
        "max_length": 5,
        "no_repeat_ngram_size": 1,
    }
    model.generation_config.update(**own)
    assert spikellm.generate(model, tokenizer, "Return a list of", max_new_tokens=12) == plain
    assert {name: getattr(model.generation_config, name) for name in own} == own


def test_samples_are_of_all_tokens(bundled: tuple[Any, Any]) -> None:
    model, tokenizer = bundled
    model.generation_config.update(top_p=0.1, min_p=0.5)
    tokens = tokenizer("Return a list of", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(tokens).logits[0, -1]
    seldom = 0
    for seed in range(8):
        torch.manual_seed(seed)
        drawn = torch.multinomial((logits / 3.0).softmax(0), 1)
        text = spikellm.generate(
            model, tokenizer, "Return a list of", max_new_tokens=1, temperature=3.0, seed=seed
        )
        assert text == tokenizer.decode([*tokens[0], *drawn], skip_special_tokens=True)
        seldom += int(drawn) not in logits.topk(50).indices
    assert seldom


def test_attention_is_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text_file: Path
) -> None:
    out = tmp_path / "out"
    settings = "attention={query: {bits: 4}, key: {bits: 4}, value: {bits: 4}}"
    status, _, stderr = run(
        capsys,
        "convert",
        BUNDLED,
        out,
        "--recipe",
        "w8a8",
        "--calibration",
        text_file,
        "--samples",
        1,
        "--seqlen",
        16,
        "--set",
        settings,
    )
    assert status == 0
    assert "attention spikes in 5 modules" in stderr
    _, stdout, _ = run(capsys, "inspect", out)
    assert (
        "attention spikes in 5 modules: query 4, key 4, value 4 bits; a cached token and key-value"
        " head takes 38 bytes, 128 at 16 bits" in stdout
    )
    assert "w8a8 with attention=" in stdout.replace("\n", "")
    assert run(capsys, "generate", out, "Return a list of", "--max-new-tokens", 4)[0] == 0


def test_inspect_an_ordinary_model(capsys: pytest.CaptureFixture[str]) -> None:
    status, stdout, _ = run(capsys, "inspect", BUNDLED)
    assert status == 0
    assert "not converted" in stdout


def test_force_and_refusal_of_a_full_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text_file: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x", encoding="utf-8")
    arguments = (
        "convert",
        BUNDLED,
        tmp_path / "out",
        "--recipe",
        "w8a8",
        "--calibration",
        text_file,
        "--samples",
        1,
        "--seqlen",
        16,
    )
    status, stdout, stderr = run(capsys, *arguments)
    assert (status, stdout) == (2, "")
    assert "not empty" in stderr
    assert "--force" not in stderr, "which would not help"
    status, stdout, stderr = run(capsys, *arguments, "--force")
    assert (status, stdout) == (2, "")
    assert "holds no config.json" in stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]
    (tmp_path / "out" / "config.json").write_text("{}", encoding="utf-8")
    status, stdout, stderr = run(capsys, *arguments)
    assert (status, stdout) == (2, "")
    assert "--force" in stderr
    status, stdout, _ = run(capsys, *arguments, "--force", "--json", "-")
    assert status == 0
    assert json.loads(stdout)["layers"] == 35
    assert not (tmp_path / "out" / "old").exists()


@pytest.mark.parametrize("held", ["model", "text", "texts", "recipe"])
def test_nothing_that_is_read_is_overwritten(
    held: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, text_file: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(BUNDLED, out if held != "model" else out / "model")
    shutil.copy(text_file, out / "text.txt")
    (out / "mine.yaml").write_text("weights: {bits: 8}", encoding="utf-8")
    (out / "config.json").touch()
    model = out / "model" if held == "model" else BUNDLED
    text = {"text": out / "text.txt", "texts": out}.get(held, text_file)
    recipe = out / "mine.yaml" if held == "recipe" else "w8a8"
    before = bytes_of(out)
    arguments = (
        "--recipe",
        recipe,
        "--calibration",
        text,
        "--samples",
        1,
        "--seqlen",
        16,
        "--force",
    )
    status, stdout, stderr = run(capsys, "convert", model, out, *arguments)
    assert (status, stdout) == (2, "")
    assert "which is to be read" in stderr
    assert bytes_of(out) == before


def test_interrupted_conversion_and_resume(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from spikellm.commands.support import progress as told

    out, whole = tmp_path / "out", tmp_path / "whole"
    arguments = ("--recipe", "w4a4-t2", "--calibration", text_file, "--samples", 2, "--seqlen", 32)
    report = told.report_block

    def interrupt() -> Any:
        def on_block(progress: Any) -> None:
            if progress.index == 2:
                raise KeyboardInterrupt

        return on_block

    monkeypatch.setattr(told, "report_block", interrupt)
    status, _, stderr = run(capsys, "convert", BUNDLED, out, *arguments)
    assert status == 130
    assert "--resume" in stderr
    assert not out.exists(), "nothing that looks whole"
    monkeypatch.setattr(told, "report_block", report)
    status, _, stderr = run(capsys, "convert", BUNDLED, out, *arguments)
    assert status == 2
    assert "interrupted conversion" in stderr
    other = ("--calibration", text_file, "--samples", 3, "--seqlen", 32, "--resume")
    status, _, stderr = run(capsys, "convert", BUNDLED, out, *other)
    assert status == 2
    assert "interrupted conversion with another recipe.calibration.samples (2, now 3)" in stderr
    status, _, stderr = run(capsys, "convert", BUNDLED, out, *arguments, "--resume")
    assert status == 0
    assert stderr.count("from the interrupted run") == 3
    status, _, stderr = run(capsys, "convert", BUNDLED, out, *other)
    assert status == 2
    assert "finished conversion with another recipe.calibration.samples (2, now 3)" in stderr
    assert run(capsys, "convert", BUNDLED, whole, *arguments, "--resume")[0] == 0, (
        "--resume starts where there is nothing"
    )
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert not (tmp_path / "out.partial").exists()


def test_recipes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, stdout, _ = run(capsys, "recipes")
    assert status == 0
    assert "w4a4-t4" in stdout
    _, yaml, _ = run(capsys, "recipes", "w4a4-t4", "--set", "weights.bits=5")
    (tmp_path / "mine.yaml").write_text(yaml, encoding="utf-8")
    _, stdout, _ = run(capsys, "recipes", tmp_path / "mine.yaml", "--json", "-")
    assert json.loads(stdout)["weights"]["bits"] == 5
    assert json.loads(run(capsys, "recipes", "--json", "-")[1]).keys() >= {"w4a4-t2"}


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    status, stdout, _ = run(capsys, "doctor", "--json", "-")
    assert status == 0
    assert (
        json.loads(stdout)["torch"] == torch.__version__.split("+")[0]
        or json.loads(stdout)["torch"] == torch.__version__
    )
    assert "kernels" in run(capsys, "doctor")[1]


def test_help_without_a_command_and_json_of_generate(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ((), ("--debug",)):
        status, stdout, stderr = run(capsys, *arguments)
        assert (status, stderr) == (0, "")
        assert "spikellm demo" in stdout
    _, stdout, _ = run(capsys, "generate", BUNDLED, "Return", "--max-new-tokens", 2, "--json", "-")
    assert json.loads(stdout)["text"].startswith("Return")


def test_names_with_brackets_are_printed_as_they_are(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text_file: Path
) -> None:
    odd = tmp_path / "a[red].txt"
    odd.write_bytes(text_file.read_bytes())
    status, stdout, stderr = run(
        capsys, "eval", BUNDLED, "--perplexity", odd, "--limit", 1, "--seqlen", 16
    )
    assert status == 0, stderr
    assert "a[red].txt" in stdout.replace("\n", "")


def test_json_goes_into_a_pipe_without_replacing_it(tmp_path: Path) -> None:
    import os
    import stat
    import threading

    from spikellm.core.console import write_json

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text(encoding="utf-8")))
    reader.start()
    write_json({"a": 1}, str(pipe))
    reader.join()
    assert json.loads(read[0]) == {"a": 1}
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[1].strip() == spikellm.__version__
    for command in ("demo", "convert", "eval", "generate", "inspect", "recipes"):
        status, stdout, _ = run(capsys, command, "--help")
        assert status == 0
        assert "Example" in stdout


def damaged(tmp_path: Path, change: Any) -> Path:
    folder = Path(shutil.copytree(BUNDLED, tmp_path / "damaged"))
    tensors = load_file(folder / "model.safetensors")
    change(folder, tensors)
    return folder


def with_nan(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.mlp.gate_proj.weight"][1, 1] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncated(folder: Path, _: dict[str, torch.Tensor]) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000])


def without_tokenizer(folder: Path, _: dict[str, torch.Tensor]) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def test_bad_input_gets_one_line_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text_file: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    out, short = tmp_path / "out", tmp_path / "short.txt"
    small = ("--calibration", text_file, "--samples", 1, "--seqlen", 16)
    nan = damaged(tmp_path, with_nan)
    cases: list[tuple[tuple[object, ...], int, str]] = [
        (("convert", tmp_path / "none", out, *small), 2, "does not exist"),
        (("convert", tmp_path / "empty", out, *small), 2, "no config.json"),
        (("convert", BUNDLED, tmp_path / "file", *small), 2, "is a file"),
        (("convert", BUNDLED, out, "--recipe", "nope", *small), 2, "unknown recipe 'nope'"),
        (
            ("convert", BUNDLED, out, "--set", "weights.bots=3", *small),
            2,
            "did you mean 'weights.bits'",
        ),
        (
            ("convert", BUNDLED, out, "--set", "weights.bits=12", *small),
            2,
            "less than or equal to 8",
        ),
        (
            ("convert", BUNDLED, out, "--set", "activations.salient_steps=0", *small),
            2,
            "greater than or equal to 1",
        ),
        (
            ("convert", BUNDLED, out, "--seed", 3, "--set", "seed=9"),
            2,
            "--set seed=9 and --seed set the same field",
        ),
        (
            ("convert", BUNDLED, out, "--set", "calibration.samples=1", "--samples", 2),
            2,
            "--set calibration.samples=1 and --samples",
        ),
        (
            ("convert", BUNDLED, out, "--set", "calibration={seqlen: 8}", "--seqlen", 16),
            2,
            "and --seqlen set the same field",
        ),
        (
            (
                "convert",
                BUNDLED,
                out,
                "--set",
                "calibration.text=stdlib",
                "--calibration",
                "stdlib",
            ),
            2,
            "and --calibration set the same field",
        ),
        (
            ("convert", BUNDLED, out, "--set", "weights.bits=3", "--set", "weights.bits=5"),
            2,
            "--set weights.bits=3 and --set weights.bits=5",
        ),
        (
            ("recipes", "w8a8", "--set", "weights.bits=3", "--set", "weights={bits: 5}"),
            2,
            "set the same field",
        ),
        (
            ("convert", BUNDLED, out, "--samples", "0", "--calibration", text_file),
            2,
            "greater than or equal to 1",
        ),
        (("convert", BUNDLED, out, "--samples", "many"), 2, "valid integer"),
        (("convert", BUNDLED, out, "--calibration", short), 2, "shorter than one window"),
        (("convert", BUNDLED, out, "--calibration", tmp_path / "no.txt"), 2, "neither a known set"),
        (("convert", BUNDLED, out, "--calibration", ""), 2, "name of the text is empty"),
        (("convert", BUNDLED, out, "--calibration", "x" * 300), 2, "neither a known set"),
        (("convert", "x" * 300, out, *small), 2, "does not exist"),
        (("convert", "é" * 150, out, *small), 2, "does not exist"),
        (
            ("convert", BUNDLED, out, "--calibration", text_file, "--seqlen", 999),
            2,
            "above the model's maximum of 256",
        ),
        (("convert", nan, out, *small), 1, "model.layers.2.mlp.gate_proj.weight holds 1 NaN"),
        (
            ("convert", "organisation/nowhere", out, *small),
            1,
            "give the path of a local model folder",
        ),
        (("convert", BUNDLED, out, "--device", "warp", *small), 2, "device 'warp'"),
        (("convert", BUNDLED, out, "--device", "meta", *small), 2, "it holds no values"),
        (
            ("convert", BUNDLED, out, "--set", "overrides=[{match: q_proj, skip: true}]", *small),
            2,
            "matches no layer",
        ),
        (("convert", BUNDLED, out, "--resume", "--force", *small), 2, "give one of them"),
        (("convert", BUNDLED, tmp_path / "file" / "x", *small), 2, "is a file"),
        (("convert", BUNDLED, BUNDLED, "--force", *small), 2, "OUT is the model itself"),
        (("convert", BUNDLED, "/", *small), 2, "give a folder with a name"),
        (
            ("convert", BUNDLED, out, "--json", tmp_path / "no" / "x.json", *small),
            2,
            "a folder that exists",
        ),
        (("convert", BUNDLED, tmp_path / ("x" * 250), *small), 2, "name too long"),
        (("convert", BUNDLED, out, "--recipe", "x" * 300, *small), 2, "unknown recipe"),
        (("convert", BUNDLED, out, "--json", tmp_path / ("x" * 250), *small), 2, "name too long"),
        (("eval", BUNDLED), 2, "--perplexity"),
        (("eval", BUNDLED, "--perplexity", short), 2, "shorter than one window"),
        (("eval", BUNDLED, "--perplexity", text_file, "--form", "binary"), 2, "no spiking layer"),
        (
            (
                "eval",
                BUNDLED,
                "--perplexity",
                text_file,
                "--json",
                tmp_path / "no" / "x.json",
                "--limit",
                1,
            ),
            2,
            "a folder that exists",
        ),
        (
            ("eval", BUNDLED, "--tasks", "piqa", "--seqlen", 16),
            2,
            "--seqlen has no effect without --perplexity",
        ),
        (
            ("eval", BUNDLED, "--tasks", "piqa", "--batch-size", 0),
            2,
            "--batch-size is 0; expected at least 1",
        ),
        (
            ("eval", BUNDLED, "--perplexity", text_file, "--form", ""),
            2,
            "--form is empty; expected merged, stepped, binary or phase",
        ),
        (
            ("eval", BUNDLED, "--perplexity", text_file, "--device", ""),
            2,
            "--device is empty; expected a device",
        ),
        (
            ("eval", BUNDLED, "--tasks", "piqa", "--task-folder", " "),
            2,
            "--task-folder is empty; expected a folder",
        ),
        (
            ("report", BUNDLED, "--energy-table", "", "--json", "-"),
            2,
            "--energy-table is empty; expected a table's name or file",
        ),
        (
            ("generate", BUNDLED, "word", "--seed", 5),
            2,
            "--seed has no effect without --temperature",
        ),
        (
            (
                "compare",
                BUNDLED,
                "--recipes",
                "w8a8",
                "--perplexity",
                short,
                "--table",
                "csv",
                "--json",
                "-",
            ),
            2,
            "--table csv has no effect",
        ),
        (
            ("sweep", BUNDLED, "--perplexity", short, "--table", "latex", "--json", "-"),
            2,
            "--table latex has no effect",
        ),
        (("generate", BUNDLED, ""), 2, "prompt is empty"),
        (("generate", BUNDLED, "word", "--max-new-tokens", 999), 2, "exceed the model's maximum"),
        (("generate", BUNDLED, "word", "--temperature", -1), 2, "temperature"),
        (("generate", BUNDLED, "word", "--temperature", "nan"), 2, "temperature"),
        (("generate", BUNDLED, "word", "--seed", 10**30, "--temperature", 1), 2, "seed is 1000"),
        (
            ("generate", tmp_path / "none", "word", "--json", tmp_path / "no" / "x.json"),
            2,
            "a folder that exists",
        ),
        (
            ("inspect", tmp_path / "none", "--json", tmp_path / "no" / "x.json"),
            2,
            "a folder that exists",
        ),
        (("recipes", "nope", "--json", tmp_path / "no" / "x.json"), 2, "a folder that exists"),
        (("doctor", "--json", tmp_path), 2, "a folder that exists"),
        (("eval", BUNDLED, "--perplexity", "x[/y].txt"), 2, "x[/y].txt"),
        (("--debugg",), 2, "No such option"),
        (("inspect", tmp_path / "empty"), 2, "no config.json"),
        (("recipes", "--set", "weights.bits=3"), 2, "name it"),
        (("nonsense",), 2, "No such command"),
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    for arguments, expected, message in cases:
        status, stdout, stderr = run(capsys, *arguments)
        assert status == expected, (arguments, stderr)
        lines = [line for line in stderr.splitlines() if line.startswith("spikellm: error:")]
        assert len(lines) == 1, (arguments, stderr)
        assert message in lines[0], (arguments, lines[0])
        assert stderr.rstrip().endswith(lines[0].rstrip())
        assert stdout == ""
        assert "Traceback" not in stderr
        left = {path.name for path in tmp_path.iterdir()} - set(before)
        assert not left, (arguments, left)


@pytest.mark.parametrize(
    ("damage", "message"), [(truncated, "truncated"), (without_tokenizer, "tokenizer")]
)
def test_damaged_models(
    damage: Any, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, text_file: Path
) -> None:
    status, _, stderr = run(capsys, "eval", damaged(tmp_path, damage), "--perplexity", text_file)
    assert status == 1
    assert message in stderr
    assert "Traceback" not in stderr


def test_as_a_program(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "spikellm", "inspect", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "Traceback" in run(capsys, "--debug", "inspect", tmp_path / "none")[2]


@pytest.mark.slow
def test_demo(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, stdout, stderr = run(
        capsys, "demo", "--out", tmp_path / "kept", "--json", tmp_path / "demo.json"
    )
    assert status == 0, stderr
    rows = {
        row["recipe"]: row
        for row in json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))["rows"]
    }
    assert list(rows) == ["original", "rtn-w4a4", "w4a4-t2", "w4a4-t4"]
    value = {name: row["perplexity"]["stdlib"]["value"] for name, row in rows.items()}
    assert value["original"] < value["w4a4-t2"] < value["rtn-w4a4"]
    assert all(row["sample"].startswith("Return a list of") for row in rows.values())
    assert rows["w4a4-t2"]["average_steps"] == pytest.approx(1.1, abs=0.01)
    assert all(name in stdout for name in rows)
    model, _ = spikellm.load(tmp_path / "kept" / "w4a4-t4")
    assert spikellm.summarize(model).spiking_layers == 35
