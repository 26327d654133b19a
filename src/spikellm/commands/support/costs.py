"""What accuracy is weighed against in ``sweep`` and ``compare``: costs of a row of their tables,
the Pareto front of each, and the plot.

Stored bits are of the weights of converted layers, with all that is stored because of them. Spikes,
synaptic operations and energy are of the linear layers and of the whole model, as rows give
them (:func:`spikellm.commands.support.measure.row_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spikellm.profiling.counts import EXECUTION_MODES
from spikellm.profiling.plots.pareto import Point, pareto_front, write_pareto

_UNROLLED = ("binary", "phase")


class Cost(NamedTuple):
    """One cost of a row.

    Attributes:
        key: in JSON.
        words: in the plot.
        short: in the last column of a table; nothing where that would be too much.
        of: the cost of a row; None where it has none.
    """

    key: str
    words: str
    short: str
    of: Callable[[dict[str, Any]], float | None]


def _of(key: str, mode: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda row: (row[key] or {}).get(mode)


COSTS: tuple[Cost, ...] = (
    Cost(
        "stored_bits",
        "stored bits a weight",
        "bits",
        lambda row: float(row["stored"]["bits_a_weight"]),
    ),
    Cost("average_steps", "average steps", "steps", lambda row: row["average_steps"] or 1.0),
    Cost("ace_ratio", "ACE, original = 1", "ACE", lambda row: row["ace_ratio"]),
    *(
        Cost(
            f"spikes_{mode}",
            f"{mode} spikes a value",
            "spikes" if mode == "phase" else "",
            _of("spikes_a_value", mode),
        )
        for mode in _UNROLLED
    ),
    *(
        Cost(f"sops_{mode}", f"{mode} SOPs / MACs", "", _of("sops_ratio", mode))
        for mode in _UNROLLED
    ),
    *(
        Cost(
            f"energy_{mode}",
            f"energy {mode}, original = 1",
            "energy" if mode == "phase" else "",
            _of("energy_ratio", mode),
        )
        for mode in EXECUTION_MODES
    ),
)


def mark_fronts(rows: Sequence[dict[str, Any]], text: str) -> None:
    """Say of each row whether it is on the front of each cost, under ``front``; a row that does not
    have a cost is on none.
    """
    for cost in COSTS:
        having = [row for row in rows if cost.of(row) is not None]
        places = [(cost.of(row) or 0.0, _perplexity(row, text)) for row in having]
        for row in rows:
            row.setdefault("front", {})[cost.key] = False
        for row, best in zip(having, pareto_front(places), strict=True):
            row["front"][cost.key] = best


def fronts_in_words(row: dict[str, Any]) -> str:
    """The fronts that a row is on, as a table names them."""
    return " ".join(cost.short for cost in COSTS if cost.short and row["front"].get(cost.key))


def draw_costs(
    rows: Sequence[dict[str, Any]], original: dict[str, Any], text: str, path: Path
) -> None:
    """Draw perplexity over every cost that some row has, with the fronts.

    Raises:
        DependencyError: what draws it is not installed.
        SpikeLLMError: the file system refused.
    """
    points = [
        Point(
            {cost.words: found for cost in COSTS if (found := cost.of(row)) is not None},
            _perplexity(row, text),
            row["perplexity"][text]["deviation"],
            row["recipe"],
        )
        for row in rows
    ]
    write_pareto(points, _perplexity(original, text), Path(text).name, path)


def spikes_in_words(row: dict[str, Any]) -> str:
    """Binary and phase spikes a value of a row, as a table gives them."""
    found = row["spikes_a_value"]
    return "-" if found is None else "/".join(f"{found[mode]:.2f}" for mode in _UNROLLED)


def sops_in_words(row: dict[str, Any]) -> str:
    """Binary and phase synaptic operations over multiply-accumulates of a row."""
    found = row["sops_ratio"]
    return "-" if found is None else "/".join(f"{found[mode]:.2f}" for mode in _UNROLLED)


def _perplexity(row: dict[str, Any], text: str) -> float:
    return float(row["perplexity"][text]["value"])
