from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from budget import examples
from spikellm.profiling.plots.pareto import Point, pareto_front, write_pareto

numbers = st.integers(0, 6).map(float)


def dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] <= b[0] and a[1] <= b[1] and a != b


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12))
def test_front_is_what_no_point_dominates(points: list[tuple[float, float]]) -> None:
    front = pareto_front(points)
    assert any(front)
    for point, best in zip(points, front, strict=True):
        beaten_by = [
            other
            for other, other_best in zip(points, front, strict=True)
            if dominates(other, point) and other_best
        ]
        assert bool(beaten_by) != best, "on the front, or dominated by a point that is"


def test_picture_tells_the_front_in_words(tmp_path: Path) -> None:
    points = [
        Point({"steps": 1.0, "ACE": 0.3}, 70.0, 0.5, "rate 0"),
        Point({"steps": 1.1, "ACE": 0.29}, 66.0, 0.0, "rate 0.1"),
        Point({"steps": 1.2, "ACE": 0.4}, 67.0, 0.2, "rate 0.2"),
    ]
    write_pareto(points, 60.0, "test.txt", tmp_path / "pareto.svg")
    assert (
        described(tmp_path / "pareto.svg")
        == "steps: front of rate 0, rate 0.1; ACE: front of rate 0.1; the original has 60.00"
    )
    text = (tmp_path / "pareto.svg").read_text()
    assert "3  rate 0.2" in text
    assert "#0102" not in text, "every stand-in colour became a variable"


def test_picture_leaves_out_costs_that_tell_nothing_apart(tmp_path: Path) -> None:
    points = [
        Point({"steps": 1.0, "spikes": spikes}, 60.0 + spikes, 0.0, f"at {spikes}")
        for spikes in (0.5, 0.8)
    ]
    write_pareto(points, 60.0, "test.txt", tmp_path / "all.svg")
    assert described(tmp_path / "all.svg") == "spikes: front of at 0.5; the original has 60.00"
    write_pareto(points[:1], 60.0, "test.txt", tmp_path / "one.svg")
    assert described(tmp_path / "one.svg").startswith("steps: front of at 0.5; spikes:")


def test_a_perplexity_far_above_the_others_does_not_flatten_them(tmp_path: Path) -> None:
    points = [
        Point({"spikes": 0.2}, 1369.0, 0.0, "coarse"),
        Point({"spikes": 0.9}, 72.0, 0.0, "middle"),
        Point({"spikes": 27.0}, 65.0, 0.0, "fine"),
    ]
    write_pareto(points, 64.0, "test.txt", tmp_path / "pareto.svg")
    text = (tmp_path / "pareto.svg").read_text()
    assert "1  coarse: perplexity 1,369, above the picture" in text
    drawn = {float(one) for one in re.findall(r">(\d+(?:\.\d+)?)</text>", text)}
    assert 70 in drawn, "ticks are those of the points that can be told apart"
    assert max(drawn) < 100
    assert {0.2, 0.5, 20.0} <= drawn, "costs so far apart are drawn by their logarithm"


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=9))
@examples(10)
def test_any_points_can_be_drawn(tmp_path_factory: Any, places: list[tuple[int, int]]) -> None:
    path = tmp_path_factory.mktemp("drawn") / "pareto.svg"
    points = [Point({"cost": x / 10}, y * 10.0, 0.0, f"{x}") for x, y in places]
    write_pareto(points, 30.0, "test.txt", path)
    assert described(path).startswith("cost: front of ")


def described(picture: Path) -> str:
    root = ET.parse(picture).getroot()  # noqa: S314
    return next(child.text or "" for child in root if child.tag.endswith("desc"))
