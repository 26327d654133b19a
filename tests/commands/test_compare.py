from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

import spikellm
from conftest import BUNDLED
from spikellm.__main__ import main
from spikellm.core import console


def test_compare_is_what_single_conversions_give(
    capsys: pytest.CaptureFixture[str], text_file: Path
) -> None:
    arguments = [
        "compare",
        str(BUNDLED),
        "--recipes",
        "w8a8,w4a4-t2",
        "--calibration",
        str(text_file),
        "--samples",
        "1",
        "--seqlen",
        "32",
        "--limit",
        "2",
    ]
    assert main([*arguments, "--perplexity", str(text_file), "--seeds", "3,4", "--json", "-"]) == 0
    rows = {row["recipe"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert list(rows) == ["original", "w8a8", "w4a4-t2"]
    values = []
    for seed in (3, 4):
        model, tokenizer = spikellm.load(BUNDLED)
        spikellm.convert(
            model, tokenizer, "w4a4-t2", str(text_file), samples=1, seqlen=32, seed=seed
        )
        values.append(
            spikellm.perplexity(model, tokenizer, str(text_file), seqlen=32, limit=2).value
        )
    measured = rows["w4a4-t2"]["perplexity"][str(text_file)]
    assert measured["value"] == pytest.approx(sum(values) / 2)
    assert measured["deviation"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert measured["ratio"] == pytest.approx(
        measured["value"] / rows["original"]["perplexity"][str(text_file)]["value"]
    )
    assert rows["w8a8"]["weight_ratio"] == pytest.approx(0.5, abs=0.03)
    assert rows["original"]["average_steps"] is None
    assert rows["original"]["ace_ratio"] == rows["original"]["energy_ratio"]["binary"] == 1
    assert 0 < rows["w4a4-t2"]["ace_ratio"] < rows["w8a8"]["ace_ratio"] < 1
    assert (
        0 < rows["w4a4-t2"]["energy_ratio"]["merged"] < rows["w8a8"]["energy_ratio"]["merged"] < 1
    )


def test_table_and_refusals(capsys: pytest.CaptureFixture[str], text_file: Path) -> None:
    common = [
        "compare",
        str(BUNDLED),
        "--calibration",
        str(text_file),
        "--samples",
        "1",
        "--seqlen",
        "16",
        "--limit",
        "1",
        "--perplexity",
        str(text_file),
    ]
    assert main([*common, "--recipes", "w4a16"]) == 0
    printed = capsys.readouterr()
    assert "w4a16" in printed.out
    value = next(
        line for line in printed.err.splitlines() if line.startswith("w4a16: ")
    ).removeprefix("w4a16: ")
    assert value in printed.out, "each row is said as soon as it is measured"
    for extra, message in (
        ([], "--recipes"),
        (["--recipes", ","], "nothing to compare"),
        (["--recipes", "w4a16,nope"], "unknown recipe"),
        (["--recipes", "w4a16, nope"], "unknown recipe 'nope'"),
        (["--recipes", "original"], "rename the recipe"),
        (["--recipes", "w4a16", "--seeds", "x"], "whole numbers"),
        (["--recipes", "w4a16", "--seeds", ""], "whole numbers"),
        (["--recipes", "w4a16", "--seeds", "3,3"], "each number once"),
        (["--recipes", "w4a16", "--seeds", "3,-1"], "greater than or equal to 0"),
        (
            ["--recipes", "w4a16", "--seeds", "3", "--set", "seed=4"],
            "--set seed=4 and --seed set the same field",
        ),
    ):
        assert main([*common, *extra]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.out == ""


@pytest.mark.parametrize("style", ["markdown", "csv", "latex"])
def test_tables_for_other_programs(style: str, capsys: pytest.CaptureFixture[str]) -> None:
    columns, rows = ["recipe", "p|q & 50%"], [["w4a4_t2", "1.10 ± 0.01 (1.1×)"], ["a,b", 'say "x"']]
    console.table("title", columns, rows, style=style)  # type: ignore[arg-type]
    text = capsys.readouterr().out
    if style == "csv":
        assert list(csv.reader(io.StringIO(text))) == [columns, *rows]
    elif style == "markdown":
        assert text.splitlines()[:2] == [r"| recipe | p\|q & 50% |", "| :-- | --: |"]
        assert len(text.splitlines()) == 4
    else:
        assert r"w4a4\_t2 & 1.10 $\pm$ 0.01 (1.1$\times$) \\" in text
        assert r"p|q \& 50\%" in text
        assert text.startswith(r"\begin{tabular}{lr}")
        assert text.endswith("\\end{tabular}\n")


def test_an_unknown_style_or_energy_table_is_refused(
    text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [
        "compare",
        str(BUNDLED),
        "--recipes",
        "w8a8",
        "--calibration",
        str(text_file),
        "--perplexity",
        str(text_file),
    ]
    assert main([*common, "--table", "word"]) == 2
    assert "--table 'word': expected table, markdown, csv, latex" in capsys.readouterr().err
    assert main([*common, "--energy-table", "nowhere"]) == 2
    assert "no built-in table of that name" in capsys.readouterr().err


def test_a_table_that_says_nothing_of_the_original_is_refused(
    text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--recipes", "w8a8", "--perplexity", str(text_file)]
    arguments += ["--calibration", str(text_file), "--energy-table", "loihi-14nm"]
    assert main(["compare", str(BUNDLED), *arguments]) == 2
    assert "does not know fp16_multiply and fp16_add" in capsys.readouterr().err
