from __future__ import annotations

import json
import shutil
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import spikellm
from conftest import BUNDLED
from spikellm.__main__ import main
from spikellm.commands import compare, sweep
from spikellm.commands.compare import CompareOptions
from spikellm.commands.support.axes import Axis, Setting, parse_axis, settings_of
from spikellm.commands.support.options import GridOptions
from spikellm.commands.sweep import SweepOptions
from spikellm.core.errors import DependencyError, RequestError
from spikellm.observers.activation_store import SharedStream

GRID = ("activations.salient_rate=0.02,0.1", "activations.salient_steps=2,4")


def sweep_of(text: object, recipe: str = "rtn-w4a4", **more: Any) -> dict[str, Any]:
    """A sweep of the bundled model, measured on one text."""
    return sweep.sweep(str(BUNDLED), (str(text),), SweepOptions(recipe=recipe, **more))


def grid_of(axes: tuple[str, ...]) -> list[Setting]:
    return settings_of("w4a4-t2", [parse_axis(axis) for axis in axes], GridOptions())


@given(
    st.lists(
        st.sampled_from(["1", "0.5", "true", "gif", "[1, 2]", "{a: 1, b: 2}", "'a,b'"]),
        min_size=1,
        max_size=5,
    )
)
def test_commas_part_values_but_not_within_brackets(values: list[str]) -> None:
    assert parse_axis(f"weights.bits={','.join(values)}") == Axis("weights.bits", tuple(values))


@pytest.mark.parametrize("text", ["", "weights.bits", "=3", "weights.bits=", "weights.bits=3,,4"])
def test_damaged_axes(text: str) -> None:
    with pytest.raises(RequestError, match="expected key=value"):
        parse_axis(text)


def test_grid_has_every_combination_once() -> None:
    grid = grid_of(GRID)
    assert [
        (s.recipe.activations.salient_rate, s.recipe.activations.salient_steps) for s in grid
    ] == [
        (0.02, 2),
        (0.02, 4),
        (0.1, 2),
        (0.1, 4),
    ]
    assert len(grid_of(("activations.salient_rate=0.1,0.10,0.2",))) == 2, (
        "values that make one recipe are one point"
    )
    assert len(grid_of(())) == 1


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (["weights.bits=4", "weights.bits=3"], "twice"),
        (["weights.bits=4,40"], "weights.bits=40"),
        (["weights.bit=4"], "weights.bits"),
        (["activations.salient_rate=0,0.1"], "activations.salient_rate=0"),
        (["name=a,b"], "changes words alone"),
        (["seed=1,2"], "--set seed=1 and --seed set the same field"),
        (
            ["calibration.samples=1,2"],
            "--set calibration.samples=1 and --samples set the same field",
        ),
        (["weights.bits=4", "weights={bits: 3}"], "set the same field"),
    ],
)
def test_settings_are_checked_before_anything_slow(
    axes: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spikellm.api, "load", lambda *_, **__: pytest.fail("loaded a model"))
    with pytest.raises(RequestError, match=words):
        sweep_of("stdlib", "w4a4-t2", axes=tuple(axes), samples=2, seeds=(5, 6))
    with pytest.raises(RequestError, match="greater than or equal to 0"):
        sweep_of("stdlib", seeds=(5, -1))


@pytest.fixture
def work(text_file: Path) -> dict[str, Any]:
    return {"calibration": str(text_file), "samples": 2, "seqlen": 32, "limit": 2}


def swept(text_file: Path, work: dict[str, Any], **more: Any) -> dict[str, Any]:
    return sweep_of(text_file, "w4a4-t2", axes=GRID, **work, **more)


@pytest.mark.slow
def test_points_are_those_of_conversions_one_by_one(text_file: Path, work: dict[str, Any]) -> None:
    """Sharing what conversions have in common changes no bit."""
    result = swept(text_file, work, seeds=(2, 3))
    for row in result["rows"]:
        settings = tuple(f"{key}={value}" for key, value in row["point"].items())
        options = CompareOptions(**work, seeds=(2, 3), settings=settings)
        alone = compare.compare(str(BUNDLED), ("w4a4-t2",), (str(text_file),), options)["rows"]
        assert row["perplexity"] == alone[1]["perplexity"]
        for key in ("average_steps", "ace_ratio", "weight_bytes", "energy_ratio", "stored"):
            assert row[key] == alone[1][key]
        assert result["original"]["perplexity"] == alone[0]["perplexity"]


def test_a_shared_stream_changes_no_byte(text_file: Path) -> None:
    shared = SharedStream()
    states = []
    for stream in (None, shared, shared):
        model, tokenizer = spikellm.load(BUNDLED)
        spikellm.convert(
            model, tokenizer, "w4a4-t2", str(text_file), samples=2, seqlen=32, shared=stream
        )
        states.append(model.state_dict())
    assert shared.behind(0) is not None
    for other in states[1:]:
        assert all(torch.equal(other[key], value) for key, value in states[0].items())


def test_a_shared_stream_forgets_other_windows_and_keeps_to_its_limit(text_file: Path) -> None:
    shared, small = SharedStream(), SharedStream(limit=10)
    model, tokenizer = spikellm.load(BUNDLED)
    spikellm.convert(
        model, tokenizer, "w4a4-t2", str(text_file), samples=2, seqlen=32, shared=shared
    )
    before = shared.behind(4)
    model, tokenizer = spikellm.load(BUNDLED)
    spikellm.convert(
        model, tokenizer, "w4a4-t2", str(text_file), samples=2, seqlen=32, seed=5, shared=shared
    )
    after = shared.behind(4)
    assert before is not None
    assert after is not None
    assert not torch.equal(before[0], after[0])
    model, tokenizer = spikellm.load(BUNDLED)
    spikellm.convert(
        model, tokenizer, "w4a4-t2", str(text_file), samples=2, seqlen=32, shared=small
    )
    assert small.behind(0) is None


def test_goes_on_where_it_stopped(
    text_file: Path, work: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = swept(text_file, work)
    convert, calls = spikellm.api.convert, []

    def dies(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return convert(*arguments, **named)

    monkeypatch.setattr(spikellm.api, "convert", dies)
    with pytest.raises(KeyboardInterrupt):
        swept(text_file, work, out=tmp_path / "sweep")
    resumed = swept(text_file, work, out=tmp_path / "sweep")
    assert len(calls) == 3 + 2, "two points were kept"
    for a, b in zip(whole["rows"], resumed["rows"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == [
        "pareto.svg",
        "points",
        "result.json",
        "sweep.json",
    ]
    axes = ("activations.salient_rate=0.1,0.2",)
    again = sweep_of(text_file, "w4a4-t2", axes=axes, **work, out=tmp_path / "sweep")
    assert len(calls) == 6, "another grid takes the point that both have"
    assert len(again["rows"]) == 2


def test_another_calibration_text_makes_another_point(
    text_file: Path, work: dict[str, Any], tmp_path: Path
) -> None:
    path, text = tmp_path / "train.txt", text_file.read_text(encoding="utf-8")
    rows = []
    for content in (text, text[5000:], text):
        path.write_text(content, encoding="utf-8")
        options = {**work, "calibration": str(path), "out": tmp_path / "sweep"}
        found = sweep_of(text_file, "w4a4-t2", **options)
        rows.append(found["rows"][0])
    assert rows[0] == rows[2], "taken over"
    assert rows[0]["perplexity"] != rows[1]["perplexity"]


def test_points_of_something_else_are_refused(
    text_file: Path, work: dict[str, Any], tmp_path: Path
) -> None:
    one = {"out": tmp_path / "sweep", **work}
    sweep_of(text_file, **one)
    with pytest.raises(RequestError, match="another texts"):
        sweep_of(text_file, **{**one, "limit": 1})
    table = yaml.safe_load(
        (files("spikellm.profiling") / "energy_tables" / "horowitz-45nm.yaml").read_text()
    )
    table["picojoules"]["int32_add"] *= 2
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table))
    with pytest.raises(RequestError, match="another energy_table"):
        sweep_of(text_file, **one, energy_table=str(tmp_path / "table.yaml"))
    point = next((tmp_path / "sweep" / "points").iterdir())
    point.write_text("{")
    with pytest.raises(RequestError, match="damaged"):
        sweep_of(text_file, **one)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(RequestError, match="holds no sweep"):
        sweep_of(text_file, **{**one, "out": tmp_path / "other"})


def test_a_sweep_that_stopped_before_its_first_point_goes_on(
    text_file: Path, work: dict[str, Any], tmp_path: Path
) -> None:
    one = {"out": tmp_path / "sweep", **work}
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / ".sweep.json.123.tmp").touch()
    sweep_of(text_file, **one)
    shutil.rmtree(tmp_path / "sweep" / "points")
    sweep_of(text_file, **one)
    assert len(list((tmp_path / "sweep" / "points").iterdir())) == 2


def test_damaged_folders_get_one_line(
    text_file: Path, work: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "sweep"

    def again(words: str) -> None:
        with pytest.raises(RequestError, match=words):
            sweep_of(text_file, **work, out=out)

    sweep_of(text_file, **work, out=out)
    known = (out / "sweep.json").read_text(encoding="utf-8")
    for content in ("[]", "[" * 100_000, "{", "\xff"):
        (out / "sweep.json").write_text(content, encoding="latin-1")
        again("sweep.json is damaged")
    (out / "sweep.json").write_text(known, encoding="utf-8")
    points = sorted((out / "points").iterdir())
    for change in (
        {"ace": "x"},
        {"seconds": None},
        {"perplexity": {}},
        {"perplexity": []},
        {"energy": {"dense": 0, "merged": 1, "stepped": 1, "binary": 1, "weight_traffic": 0}},
        {"summary": []},
    ):
        for point in points:
            whole = point.read_text(encoding="utf-8")
            point.write_text(
                json.dumps({"measured": {**json.loads(whole)["measured"], **change}}),
                encoding="utf-8",
            )
            again(f"{point.name} is damaged")
            point.write_text(whole, encoding="utf-8")
    (out / "result.json").unlink()
    (out / "result.json").mkdir()
    again("result.json is a folder")
    (out / "result.json").rmdir()
    (out / "points").rename(tmp_path / "points")
    (out / "points").touch()
    again("points is a file")


def test_what_draws_the_plot_is_asked_for_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spikellm.api, "load", lambda *_, **__: pytest.fail("loaded a model"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DependencyError, match="pictures need matplotlib"):
        sweep_of("stdlib", out=tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_command(capsys: pytest.CaptureFixture[str], text_file: Path, tmp_path: Path) -> None:
    arguments = [
        "sweep",
        str(BUNDLED),
        "--recipe",
        "rtn-w4a4",
        "--set",
        "weights.bits=3,4",
        "--calibration",
        str(text_file),
        "--perplexity",
        str(text_file),
        "--samples",
        "2",
        "--seqlen",
        "32",
        "--limit",
        "2",
    ]
    assert main([*arguments, "--out", str(tmp_path / "sweep"), "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "sweep" / "result.json").read_text())
    assert [row["point"] for row in result["rows"]] == [
        {"weights.bits": "3"},
        {"weights.bits": "4"},
    ]
    for cost in ("average_steps", "spikes_phase", "sops_binary", "energy_phase"):
        assert any(row["front"][cost] for row in result["rows"]), cost
    picture = (tmp_path / "sweep" / "pareto.svg").read_text()
    assert "phase spikes a value: front of" in picture
    assert "binary SOPs / MACs: front of" in picture
    assert main([*arguments, "--out", str(tmp_path / "sweep"), "--table", "markdown"]) == 0
    table = capsys.readouterr().out
    assert table.count("\n") == 2 + 1 + 2
    assert "| original |" in table
    assert main([*arguments, "--seeds", "a"]) == 2
    assert "--seeds 'a'" in capsys.readouterr().err
