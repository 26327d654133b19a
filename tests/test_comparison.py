from __future__ import annotations

import json
from pathlib import Path

import pytest

import spikellm
from conftest import BUNDLED
from spikellm.__main__ import main


def test_compare_is_what_single_conversions_give(capsys: pytest.CaptureFixture[str], text_file: Path) -> None:
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
        spikellm.convert(model, tokenizer, "w4a4-t2", str(text_file), samples=1, seqlen=32, seed=seed)
        values.append(spikellm.perplexity(model, tokenizer, str(text_file), seqlen=32, limit=2).value)
    measured = rows["w4a4-t2"]["perplexity"][str(text_file)]
    assert measured["value"] == pytest.approx(sum(values) / 2)
    assert measured["deviation"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert measured["ratio"] == pytest.approx(measured["value"] / rows["original"]["perplexity"][str(text_file)]["value"])
    assert rows["w8a8"]["weight_ratio"] == pytest.approx(0.5, abs=0.03)
    assert rows["original"]["average_steps"] is None


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
    assert "w4a16" in capsys.readouterr().out
    for extra, message in (
        ([], "--recipes"),
        (["--recipes", ","], "nothing to compare"),
        (["--recipes", "w4a16,nope"], "unknown recipe"),
        (["--recipes", "w4a16", "--seeds", "x"], "whole numbers"),
    ):
        assert main([*common, *extra]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.out == ""
