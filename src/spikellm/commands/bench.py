"""How fast a model runs here and what memory it takes, beside its 16-bit original in the same run.

Every model gets a process of its own, so that peak memory is its own; the processes take turns, and
medians over the turns are compared.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spikellm import api
from spikellm.checkpoint.config import read_config
from spikellm.checkpoint.save import spike_config
from spikellm.core import console
from spikellm.core.errors import RequestError, SpikeLLMError
from spikellm.core.memory import peak_memory
from spikellm.kernels.base import describe as describe_kernels
from spikellm.models.families import longest_window
from spikellm.profiling.powercap import Meter

COMPARED = ("prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory", "disk_bytes")
"""Figures whose ratio to the original is given."""


class Work(NamedTuple):
    """What is run: a prompt, then tokens one at a time.

    Attributes:
        prompt, new: tokens.
        threads: of torch; None leaves them.
        dtype: of an original; converted models run as they are.
        energy: read the machine's counters.
    """

    prompt: int
    new: int
    threads: int | None
    dtype: str
    energy: bool


class Run(NamedTuple):
    """One turn of one model: seconds to the first token and for all later ones, bytes beyond those
    of the bare process, joules by phase.
    """

    kind: str
    first_token: float
    decode: float
    peak_memory: int
    kernels: str
    prefill_joules: float | None
    decode_joules: float | None
    converted: bool = False


def bench(
    model: str,
    original: str | None = None,
    *,
    prompt: int = 128,
    new: int = 64,
    repeat: int = 3,
    threads: int | None = None,
    dtype: str | None = None,
    energy: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Time a model, and the original beside it.

    Args:
        model, original: folders or hub names.
        prompt, new: tokens of the prompt, which is random, and tokens decoded after it.
        repeat: turns of each model; medians are given.
        dtype: of an original, bfloat16 by default.

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
    if min(prompt, new, repeat, 1 if threads is None else threads) < 1:
        raise RequestError(
            f"prompt {prompt}, new {new}, repeat {repeat}, threads {threads}: expected at least 1"
            " of each"
        )
    if dtype not in (None, "bfloat16", "float16", "float32"):
        raise RequestError(f"dtype {dtype!r}: expected bfloat16, float16 or float32")
    names = [model] if original is None else [model, original]
    if original is not None and Path(model).resolve() == Path(original).resolve():
        raise RequestError(f"{model} is given twice; give another model as --original, or none")
    if dtype is not None and all(read_config(Path(name)) for name in names):
        raise RequestError(
            f"dtype {dtype} has no effect on {' and '.join(names)}: converted models run as they"
            " are; give an original, or no dtype"
        )
    work = Work(prompt, new, threads, dtype or "bfloat16", energy)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for turn in range(repeat):
        for name, done in runs.items():
            console.note(f"{name}: turn {turn + 1} of {repeat}")
            done.append(_in_a_process(name, work, trust_remote_code))
    rows = [_row(name, found, work) for name, found in runs.items()]
    result: dict[str, Any] = {
        "work": work._asdict(),
        "energy_meter": (Meter().missing or "powercap") if energy else None,
        "rows": rows,
    }
    if len(rows) == 2:
        result["ratio"] = {
            key: rows[0][key] / rows[1][key] for key in COMPARED if rows[0][key] and rows[1][key]
        }
    return result


def _in_a_process(name: str, work: Work, trust_remote_code: bool) -> Run:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(run_once, name, work, trust_remote_code).result()
        except BrokenProcessPool:
            raise SpikeLLMError(
                f"the process that ran {name} was ended by the system, most likely for want of"
                " memory; free some, or ask for fewer tokens"
            ) from None


@torch.no_grad()
def run_once(name: str, work: Work, trust_remote_code: bool = False) -> Run:
    """One turn, in this process: a short pass to warm up, the prompt, then token after token from
    the cache.
    """
    if work.threads:
        torch.set_num_threads(work.threads)
    bare = peak_memory()
    model, _ = api.load(name, trust_remote_code=trust_remote_code)
    if spike_config(model) is None:
        model = model.to(getattr(torch, work.dtype))
    longest = longest_window(model.config)
    if longest is not None and work.prompt + work.new > longest:
        raise RequestError(
            f"{work.prompt} tokens of prompt and {work.new} new ones exceed the maximum of {name},"
            f" {longest}; ask for less"
        )
    kernels = describe_kernels() if spike_config(model) is not None else "torch"
    tokens = torch.randint(
        0, model.config.vocab_size, (1, work.prompt), generator=torch.Generator().manual_seed(0)
    )
    model(tokens[:, :2], use_cache=False)
    meter = Meter() if work.energy else None
    readings = [meter.read()] if meter else []
    started = time.perf_counter()
    output = model(tokens, use_cache=True, logits_to_keep=1)
    first = time.perf_counter() - started
    readings += [meter.read()] if meter else []
    started = time.perf_counter()
    for _ in range(work.new):
        tokens = output.logits[:, -1:].argmax(-1)
        output = model(tokens, past_key_values=output.past_key_values, use_cache=True)
    decode = time.perf_counter() - started
    readings += [meter.read()] if meter else []
    spent = (
        [meter.joules(*readings[phase : phase + 2]) for phase in (0, 1)]
        if meter and meter.counters
        else [None, None]
    )
    return Run(
        type(model).__name__,
        first,
        decode,
        peak_memory() - bare,
        kernels,
        spent[0],
        spent[1],
        spike_config(model) is not None,
    )


def _row(name: str, runs: Sequence[Run], work: Work) -> dict[str, Any]:
    def median(values: Sequence[float | None], tokens: int = 1) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.median(known) / tokens if known else None

    first, decode = (
        statistics.median(getattr(run, phase) for run in runs)
        for phase in ("first_token", "decode")
    )
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
        "prefill_joules_per_token": median([run.prefill_joules for run in runs], work.prompt),
        "decode_joules_per_token": median([run.decode_joules for run in runs], work.new),
    }


def _disk(name: str) -> int | None:
    """Bytes of the weights in a folder; None of a name on the hub."""
    folder = Path(name)
    return (
        sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        if folder.is_dir()
        else None
    )


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    columns = [
        "model",
        "first token",
        "prefill",
        "decode",
        "peak memory",
        "weights on disk",
        "kernels",
    ]
    if result["energy_meter"] == "powercap":
        columns += ["prefill, measured", "decode, measured"]
    rows = []
    for row in result["rows"]:
        cells = [
            Path(row["model"]).name,
            f"{row['first_token_seconds'] * 1e3:.1f} ms",
            f"{row['prefill_tokens_per_second']:.1f} tokens/s",
            f"{row['decode_tokens_per_second']:.2f} tokens/s",
            console.size(row["peak_memory"]),
            console.size(row["disk_bytes"]) if row["disk_bytes"] else "-",
            row["kernels"],
        ]
        if len(columns) > len(cells):
            cells += [
                f"{row[key]:.3g} J/token"
                for key in ("prefill_joules_per_token", "decode_joules_per_token")
            ]
        rows.append(cells)
    if ratio := result.get("ratio"):
        cells = [f"{ratio[key]:.2f}×" if key in ratio else "-" for key in COMPARED]
        rows.append(["first over second", "-", *cells, *["-"] * (len(columns) - 6)])
    work = result["work"]
    threads = f", {work['threads']} thread(s)" if work["threads"] else ""
    dtype = (
        f"; an original in {work['dtype']}"
        if not all(row["converted"] for row in result["rows"])
        else ""
    )
    console.table(
        f"{work['prompt']} tokens of prompt, {work['new']} new{threads}{dtype}", columns, rows
    )
    if result["energy_meter"] not in (None, "powercap"):
        console.out.print(result["energy_meter"], highlight=False, markup=False, soft_wrap=True)
