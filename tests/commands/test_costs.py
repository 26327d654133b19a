"""Costs of rows, their fronts and their plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import BUNDLED
from spikellm.commands import compare
from spikellm.commands.compare import CompareOptions
from spikellm.commands.support.costs import COSTS, fronts_in_words, mark_fronts, spikes_in_words


def row(name: str, perplexity: float, spikes: float | None, bits: float = 4.0) -> dict[str, Any]:
    modes = ("merged", "stepped", "binary", "phase")
    found = None if spikes is None else dict.fromkeys(modes, spikes)
    return {
        "recipe": name,
        "perplexity": {"t": {"value": perplexity, "deviation": 0.0}},
        "average_steps": 1.0,
        "stored": {"bits_a_weight": bits},
        "ace_ratio": 0.3,
        "spikes_a_value": found,
        "sops_ratio": found,
        "energy_ratio": dict.fromkeys(modes, spikes),
    }


def test_fronts_are_marked_for_every_cost() -> None:
    rows = [row("a", 10.0, 1.0), row("b", 11.0, 0.5), row("c", 12.0, 0.6, 2.1)]
    rows.append(row("d", 9.0, None))
    mark_fronts(rows, "t")
    assert {*rows[0]["front"]} == {cost.key for cost in COSTS}
    for cost in ("spikes_binary", "spikes_phase", "sops_phase", "energy_merged"):
        marks = [one["front"][cost] for one in rows]
        assert marks == [True, True, False, False], "what has no spikes is on no front of them"
    assert [one["front"]["average_steps"] for one in rows] == [False, False, False, True]
    assert [one["front"]["stored_bits"] for one in rows] == [False, False, True, True]
    assert fronts_in_words(rows[1]) == "spikes energy"
    assert fronts_in_words(rows[2]) == "bits"
    assert [spikes_in_words(one) for one in rows[1:4:2]] == ["0.50/0.50", "-"]


def test_compare_draws_them(text_file: Path, tmp_path: Path) -> None:
    options = CompareOptions(
        calibration=str(text_file), samples=1, seqlen=32, limit=2, plot=tmp_path / "costs.svg"
    )
    result = compare.compare(str(BUNDLED), ("rtn-w4a4", "w4a16"), (str(text_file),), options)
    original, coded, uncoded = result["rows"]
    assert original["spikes_a_value"] is uncoded["spikes_a_value"] is None
    assert 0 < coded["spikes_a_value"]["phase"] < coded["spikes_a_value"]["binary"]
    assert coded["sops_ratio"]["phase"] == pytest.approx(coded["spikes_a_value"]["phase"], rel=0.2)
    bits = [one["stored"]["bits_a_weight"] for one in result["rows"]]
    assert bits[0] == 16
    assert bits[1] == bits[2] > 4, "the same weights with their scales"
    assert original["front"] == {}
    assert any(one["front"]["stored_bits"] for one in (coded, uncoded))
    picture = (tmp_path / "costs.svg").read_text()
    assert "phase spikes a value: front of rtn-w4a4;" in picture
    assert "ACE, original = 1: front of" in picture
    assert "average steps" not in picture, "both take one"
