"""Models of a report beside figures that others published."""

from __future__ import annotations

from typing import NamedTuple

from spikellm.profiling.published import CAUTION, MODEL, PUBLISHED, UNPLACED
from spikellm.profiling.report import Beside, Report
from spikellm.profiling.sheets import Sheet


def sheet(report: Report) -> Sheet:
    """This model and its like beside figures that others published."""
    columns = ["system", "measured on", "perplexity", "ratio", "ACE, of 16 bits"]
    columns.append("source")
    own = [(row.name, row.perplexity, row.ace / row.dense_ace) for row in converted(report)]
    original = original_of(report)
    rows = []
    for name, perplexity, ace in own:
        told, ratio = f"{perplexity:.2f}", "original not measured"
        if original is not None:
            told += f" of {original.perplexity:.2f}"
            ratio = f"{perplexity / original.perplexity:.3f}×"
        rows.append([name, report.text.name, told, ratio, f"{ace:.3g}×", "measured here"])
    for one in PUBLISHED:
        about = "" if one.exact else "about "
        least, most = (f"{effort:.3g}" for effort in one.effort)
        rows.append(
            [
                f"{one.system} {one.setting}",
                MODEL,
                f"{about}{one.perplexity:.4g} of {one.original:.2f}",
                f"{about}{one.ratio:.3g}×",
                f"{least}×" if least == most else f"{least} to {most}×",
                one.source,
            ]
        )
    return columns, rows, f"{CAUTION} {UNPLACED}"


class Converted(NamedTuple):
    """What of a converted model stands beside published figures."""

    name: str
    perplexity: float
    ace: float
    dense_ace: int


def converted(report: Report) -> list[Converted]:
    """This model and those beside it that are converted."""
    beside = [row for row in report.beside if row.converted]
    found = [Converted(row.name, row.perplexity, row.ace, row.dense_ace) for row in beside]
    own = Converted(report.name, report.text.perplexity, report.ace, report.dense_ace)
    return [*found, own] if report.origin is not None else found


def original_of(report: Report) -> Beside | None:
    """The original, where it was measured."""
    return next((row for row in report.beside if not row.converted), None)
