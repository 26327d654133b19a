from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

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
    root = ET.parse(tmp_path / "pareto.svg").getroot()  # noqa: S314
    described = next(child.text or "" for child in root if child.tag.endswith("desc"))
    assert (
        described
        == "steps: front of rate 0, rate 0.1; ACE: front of rate 0.1; the original has 60.00"
    )
    text = (tmp_path / "pareto.svg").read_text()
    assert "3  rate 0.2" in text
    assert "#0102" not in text, "every stand-in colour became a variable"
