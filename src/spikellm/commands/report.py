"""The verb ``report``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from spikellm import api
from spikellm.commands.inputs import require_models, require_texts
from spikellm.core import console
from spikellm.core.files import write_text
from spikellm.profiling.energy import load_table
from spikellm.profiling.page import render, require_page
from spikellm.profiling.report import Report


def report_to_page(
    model: str,
    text: str,
    out: Path | None,
    *,
    beside: Iterable[str] = (),
    tokens: int = 4096,
    seqlen: int | None = None,
    energy_table: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Report:
    """Measure a model on a text and write the page of its report; no page where ``out`` is None.

    Raises:
        RequestError: the folder of ``out`` does not exist, and whatever :func:`spikellm.report`
            raises.
        DependencyError: what pages are made with is not installed.
    """
    console.check_file_target("--out", out)
    if out is not None:
        require_page()
    beside = list(beside)
    require_texts([text])
    load_table(energy_table)
    require_models(beside)

    def others() -> Iterator[tuple[str, Any]]:
        for other in beside:
            console.note(f"measuring {other}")
            yield (
                Path(other).name,
                api.load(other, device=device, trust_remote_code=trust_remote_code)[0],
            )

    console.note(f"loading {model}")
    loaded, tokenizer = api.load(model, device=device, trust_remote_code=trust_remote_code)
    console.note(f"measuring perplexity and counting operations on {text}")
    name = Path(model).name
    found = api.report(
        loaded,
        tokenizer,
        text,
        tokens=tokens,
        seqlen=seqlen,
        name=name,
        beside=others(),
        energy_table=energy_table,
    )
    if out is not None:
        write_text(out, render(found))
    return found
