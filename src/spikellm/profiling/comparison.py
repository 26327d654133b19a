"""Models of a report beside figures that others published."""

from __future__ import annotations

from typing import NamedTuple

from spikellm.profiling.published import CAUTION, MODEL, PUBLISHED, UNPLACED
from spikellm.profiling.report import Beside, Report
from spikellm.profiling.sheets import Sheet


def sheet(report: Report) -> Sheet:
    """This model and its like beside figures that others published."""
    columns = ["system", "measured on", "perplexity", "ratio", "ACE, of 16 bits"]
    columns += ["bits a weight", "source"]
    original = original_of(report)
    rows = []
    for row in converted(report):
        told, ratio = f"{row.perplexity:.2f}", "original not measured"
        if original is not None:
            told += f" of {original.perplexity:.2f}"
            ratio = f"{row.perplexity / original.perplexity:.3f}×"
        effort, bits = f"{row.ace / row.dense_ace:.3g}×", f"{row.stored_bits:.2f} stored"
        rows.append([row.name, report.text.name, told, ratio, effort, bits, "measured here"])
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
                f"{one.bits[0]} of codes",
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
    stored_bits: float  # a weight


def converted(report: Report) -> list[Converted]:
    """This model and those beside it that are converted."""
    beside = [row for row in report.beside if row.converted]
    found = [
        Converted(row.name, row.perplexity, row.ace, row.dense_ace, row.stored.bits_a_weight)
        for row in beside
    ]
    bits = report.summary.stored.bits_a_weight
    own = Converted(report.name, report.text.perplexity, report.ace, report.dense_ace, bits)
    return [*found, own] if report.origin is not None else found


def original_of(report: Report) -> Beside | None:
    """The original, where it was measured."""
    return next((row for row in report.beside if not row.converted), None)
