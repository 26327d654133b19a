"""The verb ``report``: one page with what a model costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from spikellm.commands.support.inputs import require_models, require_texts
from spikellm.commands.support.options import BosChoice, EnergyTable, LoadOptions, Model, Seqlen
from spikellm.commands.support.verb import Option, verbs
from spikellm.core import console
from spikellm.core.files import write_text

if TYPE_CHECKING:
    from spikellm.profiling.report import Report


@dataclass(frozen=True, kw_only=True)
class ReportOptions(LoadOptions):
    """What is measured, and where the page goes.

    Attributes:
        out: the page; none is written where it is None.
        tokens: how many tokens to measure on, in whole windows, at least one.
        without: rows of the energy estimate that are left out.
    """

    text: Annotated[str, Option("Text to measure on.", "NAME|PATH", reads="texts")] = "stdlib"
    out: Annotated[
        Path | None,
        Option(
            "Page to write; report.html unless --json is given alone.",
            "FILE",
            writes="file",
            unless_json=Path("report.html"),
        ),
    ] = None
    beside: Annotated[
        tuple[str, ...],
        Option(
            "Show this model beside it, the original for example. May be repeated.",
            "MODEL",
            reads="models",
        ),
    ] = ()
    tokens: Annotated[int, Option("Tokens to measure on, in whole windows.")] = 4096
    seqlen: Seqlen = None
    bos: BosChoice = "auto"
    energy_table: EnergyTable = None
    without: Annotated[
        tuple[str, ...],
        Option(
            "Leave these rows out of the energy estimate: coding, firing, scaling, norms, softmax,"
            " rotary, routing, memory.",
            "ROW,…",
            separated=True,
            filled="names of rows",
        ),
    ] = ()


_DEFAULT = ReportOptions()


@verbs.register("report")
def report(model: Model, options: ReportOptions = _DEFAULT) -> Report:
    """Write one page with what a model costs: operations, spikes, energy estimated from operation
    counts, sizes, errors.

    Examples:

      spikellm report out/w4a4 --text test.txt --beside ./model --out report.html

      spikellm report out/w4a4 --json - | jq .energy_pj

    Raises:
        RequestError: the folder of the page does not exist, and whatever :func:`spikellm.report`
            raises.
        DependencyError: what pages are made with is not installed.
    """
    from spikellm import api
    from spikellm.profiling.energy import check_rows
    from spikellm.profiling.energy_table import load_table
    from spikellm.profiling.page import render, require_page

    console.check_file_target("--out", options.out)
    if options.out is not None:
        require_page()
    require_texts([options.text], bos=options.bos)
    load_table(options.energy_table)
    check_rows(options.without)
    require_models(options.beside)
    console.note(f"loading {model}")
    loaded, tokenizer = api.load(
        model, device=options.device, trust_remote_code=options.trust_remote_code
    )
    console.note(f"measuring perplexity and counting operations on {options.text}")
    found = api.report(
        loaded,
        tokenizer,
        options.text,
        tokens=options.tokens,
        seqlen=options.seqlen,
        bos=options.bos,
        name=Path(model).name,
        beside=_others(options),
        energy_table=options.energy_table,
        without=options.without,
    )
    if options.out is not None:
        write_text(options.out, render(found))
    return found


def _others(options: ReportOptions) -> Iterator[tuple[str, Any]]:
    """The models beside, each loaded when its turn has come."""
    from spikellm import api

    for other in options.beside:
        console.note(f"measuring {other}")
        loaded, _ = api.load(
            other, device=options.device, trust_remote_code=options.trust_remote_code
        )
        yield Path(other).name, loaded


def show(found: Report, options: ReportOptions) -> None:
    """Print the figures of the page, and where it is."""
    from spikellm.profiling.page import figures, verdict

    console.table(verdict(found), ["what", "found", "of what"], figures(found), left=1)
    if options.out:
        console.note(f"the page is {options.out}")
