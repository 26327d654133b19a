"""The verb ``bench``: how fast a model runs here and what memory it takes, beside its 16-bit
original in the same run.

The models take turns, each in a process of its own; medians over the turns are compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from spikellm.commands.support.options import Model, Trust
from spikellm.commands.support.verb import Option, verbs
from spikellm.core import console
from spikellm.core.errors import RequestError

if TYPE_CHECKING:
    from spikellm.commands.support.timing import Run, Work

COMPARED = ("prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory", "disk_bytes")
"""Figures whose ratio to the original is given."""
_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is run.

    Attributes:
        original: folder or hub name.
        prompt_tokens, new_tokens: the prompt is random.
        dtype: of an original, bfloat16 by default.
    """

    original: Annotated[
        str | None, Option("Time this model beside it, in the same run.", "MODEL", reads="models")
    ] = None
    prompt_tokens: Annotated[int, Option("Tokens of the prompt.")] = 128
    new_tokens: Annotated[int, Option("Tokens decoded after it, one at a time.")] = 64
    repeat: Annotated[int, Option("Turns of each model; medians are shown.")] = 3
    threads: Annotated[int | None, Option("Threads of torch.")] = None
    dtype: Annotated[
        str | None,
        Option("Type that an original runs in: bfloat16 (default), float16, float32."),
    ] = None
    energy: Annotated[
        bool, Option("Read the machine's energy counters (Linux powercap), where there are any.")
    ] = False
    trust_remote_code: Trust = False


_DEFAULT = BenchOptions()


@verbs.register("bench")
def bench(model: Model, options: BenchOptions = _DEFAULT) -> dict[str, Any]:
    """Time a model: prefill, decode, time to the first token, peak memory, size on disk.

    Example: spikellm bench out/w4a4 --original ./model --threads 1

    Returns:
        ``{"work", "energy_meter", "rows": [{"model", "kind", "converted", "first_token_seconds",
        "prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory", "disk_bytes",
        "kernels", "prefill_joules_per_token", "decode_joules_per_token"}], "ratio": {…}}``;
        ``ratio`` is the first row over the second, with an original.

    Raises:
        RequestError: a number below 1, an unknown type, a type where nothing is an original, a
            model beside itself, more tokens than the model can attend to, whatever
            :func:`spikellm.load` raises.
        SpikeLLMError: a process died, for want of memory for example.
    """
    from spikellm.commands.support.timing import Work, run_apart
    from spikellm.profiling.powercap import Meter

    names = [model] if options.original is None else [model, options.original]
    _require_sense(names, options)
    work = Work(
        options.prompt_tokens,
        options.new_tokens,
        options.threads,
        options.dtype or _DTYPES[0],
        options.energy,
    )
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for turn in range(options.repeat):
        for name, done in runs.items():
            console.note(f"{name}: turn {turn + 1} of {options.repeat}")
            done.append(run_apart(name, work, options.trust_remote_code))
    rows = [row_of(name, found, work) for name, found in runs.items()]
    result: dict[str, Any] = {
        "work": work._asdict(),
        "energy_meter": (Meter().missing or "powercap") if options.energy else None,
        "rows": rows,
    }
    if len(rows) == 2:
        result["ratio"] = {
            key: rows[0][key] / rows[1][key] for key in COMPARED if rows[0][key] and rows[1][key]
        }
    return result


def _require_sense(names: Sequence[str], options: BenchOptions) -> None:
    from spikellm.checkpoint.config import read_config

    prompt, new, repeat = options.prompt_tokens, options.new_tokens, options.repeat
    threads, dtype = options.threads, options.dtype
    if min(prompt, new, repeat, 1 if threads is None else threads) < 1:
        raise RequestError(
            f"prompt {prompt}, new {new}, repeat {repeat}, threads {threads}: expected at least 1"
            " of each"
        )
    if dtype not in (None, *_DTYPES):
        raise RequestError(f"dtype {dtype!r}: expected bfloat16, float16 or float32")
    if len({Path(name).resolve() for name in names}) < len(names):
        raise RequestError(f"{names[0]} is given twice; give another model as --original, or none")
    if dtype is not None and all(read_config(Path(name)) for name in names):
        raise RequestError(
            f"dtype {dtype} has no effect on {' and '.join(names)}: converted models run as they"
            " are; give an original, or no dtype"
        )


def row_of(name: str, runs: Sequence[Run], work: Work) -> dict[str, Any]:
    """A row of the table from the turns of one model: medians, and rates from them."""
    first = statistics.median(run.first_token for run in runs)
    decode = statistics.median(run.decode for run in runs)
    return {
        "model": name,
        "kind": runs[0].kind,
        "converted": runs[0].converted,
        "first_token_seconds": first,
        "prefill_tokens_per_second": work.prompt / first,
        "decode_tokens_per_second": work.new / decode,
        "peak_memory": statistics.median(run.peak_memory for run in runs),
        "disk_bytes": _disk(name),
        "kernels": runs[0].kernels,
        "prefill_joules_per_token": _median([run.prefill_joules for run in runs], work.prompt),
        "decode_joules_per_token": _median([run.decode_joules for run in runs], work.new),
    }


def _median(values: Sequence[float | None], tokens: int) -> float | None:
    """Median for one token of what was measured; None if nothing was."""
    known = [value for value in values if value is not None]
    return statistics.median(known) / tokens if known else None


def _disk(name: str) -> int | None:
    """Bytes of the weights in a folder; None of a name on the hub."""
    folder = Path(name)
    if not folder.is_dir():
        return None
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    metered = result["energy_meter"] == "powercap"
    columns = ["model", "first token", "prefill", "decode", "peak memory", "weights on disk"]
    columns += ["kernels", *(["prefill, measured", "decode, measured"] if metered else [])]
    rows = [_cells(row, metered=metered) for row in result["rows"]]
    if ratio := result.get("ratio"):
        cells = [f"{ratio[key]:.2f}×" if key in ratio else "-" for key in COMPARED]
        rows.append(["first over second", "-", *cells, *["-"] * (len(columns) - 6)])
    work = result["work"]
    threads = f", {work['threads']} thread(s)" if work["threads"] else ""
    originals = not all(row["converted"] for row in result["rows"])
    dtype = f"; an original in {work['dtype']}" if originals else ""
    console.table(
        f"{work['prompt']} tokens of prompt, {work['new']} new{threads}{dtype}", columns, rows
    )
    if result["energy_meter"] and not metered:
        console.out.print(result["energy_meter"], highlight=False, markup=False, soft_wrap=True)


def _cells(row: dict[str, Any], *, metered: bool) -> list[str]:
    cells = [
        Path(row["model"]).name,
        f"{row['first_token_seconds'] * 1e3:.1f} ms",
        f"{row['prefill_tokens_per_second']:.1f} tokens/s",
        f"{row['decode_tokens_per_second']:.2f} tokens/s",
        console.size(row["peak_memory"]),
        console.size(row["disk_bytes"]) if row["disk_bytes"] else "-",
        row["kernels"],
    ]
    if metered:
        cells.append(f"{row['prefill_joules_per_token']:.3g} J/token")
        cells.append(f"{row['decode_joules_per_token']:.3g} J/token")
    return cells
