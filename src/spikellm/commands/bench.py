"""The verb ``bench``: how fast a model runs here and what memory it takes, beside its 16-bit
original and llama.cpp in the same run.

They take turns, each in a process of its own; medians over the turns are compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from spikellm.commands.support.llama_bench import LlamaBenchOptions, peer_beside
from spikellm.commands.support.llama_turn import KIND
from spikellm.commands.support.options import Device, Model, Trust
from spikellm.commands.support.verb import Option, verbs
from spikellm.core import console
from spikellm.core.errors import RequestError

if TYPE_CHECKING:
    from spikellm.commands.support.timing import Run, Work

COMPARED = ("prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory", "disk_bytes")
"""Figures of which ratios are given."""
_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class BenchOptions(LlamaBenchOptions):
    """What is run.

    Attributes:
        original: folder or hub name.
        prompt_tokens, new_tokens: the prompt is random.
        device: of all models; the CPU by default.
        dtype: of an original, bfloat16 by default.
    """

    original: Annotated[
        str | None, Option("Time this model beside it, in the same run.", "MODEL", reads="models")
    ] = None
    prompt_tokens: Annotated[int, Option("Tokens of the prompt.")] = 128
    new_tokens: Annotated[int, Option("Tokens decoded after it, one at a time.")] = 64
    repeat: Annotated[int, Option("Turns of each model; medians are shown.")] = 3
    threads: Annotated[int | None, Option("Threads of torch.")] = None
    device: Device = None
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
        "kernels", "prefill_joules_per_token", "decode_joules_per_token"}], "ratio": {…},
        "ratio_llama_cpp": {…}}``; ``ratio`` is the first row over that of an original,
        ``ratio_llama_cpp`` over that of llama.cpp, whose ``kind`` is ``llama-bench``. Peak memory
        is beyond that of the bare process, of llama.cpp that of the whole process; on a CUDA device
        it is the device's.

    Raises:
        RequestError: a number below 1, an unknown type or device, a type where nothing is an
            original, the CPU's measures on another device, a model beside itself, more tokens than
            the model can attend to, whatever :func:`spikellm.load` and
            :func:`spikellm.commands.support.llama_bench.peer_beside` raise.
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
        options.device,
    )
    turns: dict[str, Callable[[], Run]] = {
        name: partial(run_apart, name, work, options.trust_remote_code) for name in names
    }
    with peer_beside(model, options.original, options, options.trust_remote_code) as peer:
        if peer is not None:
            turns[peer.name] = partial(peer.turn, work)
        runs: dict[str, list[Run]] = {name: [] for name in turns}
        for turn in range(options.repeat):
            for name, run in turns.items():
                console.note(f"{name}: turn {turn + 1} of {options.repeat}")
                runs[name].append(run())
        files = {name: Path(name) for name in names}
        files |= {peer.name: peer.file} if peer else {}
        rows = [row_of(name, found, work, files[name]) for name, found in runs.items()]
    result: dict[str, Any] = {
        "work": work._asdict(),
        "energy_meter": (Meter().missing or "powercap") if options.energy else None,
        "rows": rows,
    }
    if options.original is not None:
        result["ratio"] = _ratio(rows[0], rows[1])
    if peer is not None:
        result["ratio_llama_cpp"] = _ratio(rows[0], rows[-1])
    return result


def _ratio(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    return {key: one[key] / other[key] for key in COMPARED if one[key] and other[key]}


def _require_sense(names: Sequence[str], options: BenchOptions) -> None:
    from spikellm.checkpoint.config import read_config
    from spikellm.core.devices import find_device

    prompt, new, repeat = options.prompt_tokens, options.new_tokens, options.repeat
    threads, dtype = options.threads, options.dtype
    if min(prompt, new, repeat, 1 if threads is None else threads) < 1:
        raise RequestError(
            f"prompt {prompt}, new {new}, repeat {repeat}, threads {threads}: expected at least 1"
            " of each"
        )
    if dtype not in (None, *_DTYPES):
        raise RequestError(f"dtype {dtype!r}: expected bfloat16, float16 or float32")
    device = find_device(options.device or "cpu")
    if device.type != "cpu" and (options.llama_bench is not None or options.energy):
        raise RequestError(
            f"device {device}: llama-bench and the machine's energy counters are for the CPU; leave"
            " --llama-bench and --energy out, or --device"
        )
    if len({Path(name).resolve() for name in names}) < len(names):
        raise RequestError(f"{names[0]} is given twice; give another model as --original, or none")
    if dtype is not None and all(read_config(Path(name)) for name in names):
        raise RequestError(
            f"dtype {dtype} has no effect on {' and '.join(names)}: converted models run as they"
            " are; give an original, or no dtype"
        )


def row_of(name: str, runs: Sequence[Run], work: Work, where: Path) -> dict[str, Any]:
    """A row of the table from the turns of one model, which lies in a folder or a file: medians,
    and rates from them.
    """
    first = statistics.median(run.first_token for run in runs)
    decode = statistics.median(run.decode for run in runs)
    return {
        "model": name,
        "kind": runs[0].kind,
        "converted": runs[0].converted,
        "first_token_seconds": first,
        "prefill_tokens_per_second": work.prompt / first,
        "decode_tokens_per_second": work.new / decode,
        "peak_memory": _median([run.peak_memory for run in runs], 1),
        "disk_bytes": _disk(where),
        "kernels": runs[0].kernels,
        "prefill_joules_per_token": _median([run.prefill_joules for run in runs], work.prompt),
        "decode_joules_per_token": _median([run.decode_joules for run in runs], work.new),
    }


def _median(values: Sequence[float | None], tokens: int) -> float | None:
    """Median for one token of what was measured; None if nothing was."""
    known = [value for value in values if value is not None]
    return statistics.median(known) / tokens if known else None


def _disk(where: Path) -> int | None:
    """Bytes of a file, or of the weights in a folder; None of a name on the hub."""
    if where.is_dir():
        return sum(path.stat().st_size for path in where.glob("*.safetensors"))
    return where.stat().st_size if where.is_file() else None


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    metered = result["energy_meter"] == "powercap"
    columns = ["model", "first token", "prefill", "decode", "peak memory", "weights on disk"]
    columns += ["kernels", *(["prefill, measured", "decode, measured"] if metered else [])]
    rows = [_cells(row, metered=metered) for row in result["rows"]]
    for key, words in (("ratio", "original"), ("ratio_llama_cpp", "llama.cpp")):
        if ratio := result.get(key):
            cells = [f"{ratio[key]:.2f}×" if key in ratio else "-" for key in COMPARED]
            rows.append([f"first over {words}", "-", *cells, *["-"] * (len(columns) - 6)])
    work = result["work"]
    threads = f", {work['threads']} thread(s)" if work["threads"] else ""
    originals = not all(row["converted"] or row["kind"] == KIND for row in result["rows"])
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
        console.size(row["peak_memory"]) if row["peak_memory"] else "-",
        console.size(row["disk_bytes"]) if row["disk_bytes"] else "-",
        row["kernels"],
    ]
    if metered:
        for part in ("prefill", "decode"):
            joules = row[f"{part}_joules_per_token"]
            cells.append("-" if joules is None else f"{joules:.3g} J/token")
    return cells
