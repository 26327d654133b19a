"""The report of a model on a text: perplexity and counts of the same windows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict, Unpack

from spikellm.checkpoint.save import spike_config
from spikellm.core.errors import RequestError
from spikellm.core.keywords import require_known_keywords
from spikellm.data.tokens import bos_token
from spikellm.data.windows import window_length
from spikellm.evaluation.perplexity import perplexity_of_windows, text_windows
from spikellm.profiling.energy import check_rows
from spikellm.profiling.energy_table import load_table
from spikellm.profiling.massive import most_massive
from spikellm.profiling.measurement import Pricing, make_report, measure_beside
from spikellm.profiling.report import Beside, Origin, Report, Text

_MASSIVE = 12  # tokens with extra steps that a report names


class ReportOptions(TypedDict, total=False):
    """Keywords of :func:`report`, as it describes them."""

    tokens: int
    seqlen: int | None
    bos: str
    name: str
    beside: Iterable[tuple[str, Any]]
    energy_table: str | Path | None
    without: Iterable[str]


def report(
    model: Any, tokenizer: Any, text: str = "stdlib", **options: Unpack[ReportOptions]
) -> Report:
    """What a model costs on a text: operations, spikes, estimated energy, sizes, perplexity.

    Args:
        text: as for :func:`perplexity`; its first windows.
        tokens: how many tokens to measure on, in whole windows, at least one; 4096 by default.
        seqlen: tokens of a window.
        bos: as for :func:`perplexity`.
        name: of the model, in the report; ``"model"`` by default.
        beside: names and models measured on the same windows: the original, or other conversions of
            it. Taken one at a time.
        energy_table: see :func:`spikellm.profiling.energy_table.load_table`.
        without: rows of the energy estimate to leave out, see
            :data:`spikellm.profiling.work.ROWS`.

    Raises:
        RequestError: unknown text, table or row, a text shorter than one window, a model beside it
            with another vocabulary.
        TypeError: a keyword that is not known.
    """
    require_known_keywords("report", options, ReportOptions.__annotations__)
    tokens, name = options.get("tokens", 4096), options.get("name", "model")
    if tokens < 1:
        raise RequestError(f"tokens is {tokens}; expected at least 1")
    pricing = Pricing(load_table(options.get("energy_table")), tuple(options.get("without", ())))
    check_rows(pricing.without)
    length = window_length(model.config, options.get("seqlen"))
    limit, bos = max(1, tokens // length), options.get("bos", "auto")
    windows = text_windows(model, tokenizer, text, seqlen=length, limit=limit, bos=bos)
    rows: list[Beside] = []
    for other_name, other in options.get("beside", ()):
        if other.config.vocab_size != model.config.vocab_size:
            raise RequestError(
                f"{other_name} has {other.config.vocab_size} tokens in its vocabulary,"
                f" {name} has {model.config.vocab_size}; perplexities of other tokens do"
                " not compare"
            )
        value = perplexity_of_windows(other, windows).value
        converted = bool(spike_config(other))
        rows.append(
            measure_beside(other, other_name, windows, value, pricing.table, converted=converted)
        )
    config = spike_config(model)
    origin = Origin(config.parsed_recipe(), dict(config.record or {})) if config else None
    value = perplexity_of_windows(model, windows).value
    started = bos_token(tokenizer, bos) is not None
    measured = Text(Path(text).name, windows.shape[0], length, value, started)
    found = make_report(model, name, windows, measured, pricing, origin)
    massive = (
        token._replace(text=tokenizer.decode([int(windows[token.window, token.position])]))
        for token in most_massive(found.extra, _MASSIVE)
    )
    return replace(found, beside=tuple(rows), massive=tuple(massive))
