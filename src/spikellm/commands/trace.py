"""The verb ``trace``: one decoder block run by its spikes, compared with merged execution, and left
in a folder as pictures, events and figures.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from spikellm.commands.support.inputs import require_texts
from spikellm.commands.support.options import LoadOptions, Model
from spikellm.commands.support.verb import Option, verbs
from spikellm.core import console
from spikellm.core.errors import NumericalError, RequestError
from spikellm.core.files import folder_when_done, require_free, require_outside
from spikellm.core.registry import unknown_name

if TYPE_CHECKING:
    from torch import Tensor

    from spikellm.profiling.population import Population
    from spikellm.profiling.trace import BlockTrace

_RESULT = "trace.json"
_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class TraceOptions(LoadOptions):
    """What is run and drawn.

    Attributes:
        text: its first window is run.
        layer: decoder block, from 0.
        token: whose spikes are drawn, from 0; the last one by default.
        part: population to draw, by name within the block; the first one by default.
        seqlen: tokens of the window; 64 by default.
        form: of the spikes.
        nir: write the layer that is drawn as a NIR graph too, read it back, and run it on the
            token's spikes.
    """

    text: Annotated[str, Option("Text whose first window is run.", "NAME|PATH", reads="texts")] = (
        "stdlib"
    )
    layer: Annotated[int, Option("Decoder block, from 0.")] = 0
    token: Annotated[int | None, Option("Token to draw, from 0; the last one by default.")] = None
    part: Annotated[
        str | None,
        Option("Layer of the block to draw, for example mlp.down_proj; the first by default."),
    ] = None
    seqlen: Annotated[int | None, Option("Tokens of the window; 64 by default.")] = None
    form: Annotated[
        Literal["binary", "phase"],
        Option("Spikes of one size, or spikes worth powers of two by the moment."),
    ] = "binary"
    nir: Annotated[
        bool, Option("Write the layer that is drawn as a NIR graph, read it back and run it.")
    ] = False
    force: Annotated[bool, Option("Overwrite the trace in --out.")] = False


_DEFAULT = TraceOptions()


@verbs.register("trace")
def trace(
    model: Model,
    out: Annotated[
        Path, Option("Folder for pictures, events and figures.", "DIR", writes="folder")
    ],
    options: TraceOptions = _DEFAULT,
) -> dict[str, Any]:
    """Run a decoder block by its spikes alone and show that it ends in the same integers.

    Every spike waits in a queue and adds its weights when it arrives. Status 1 if the sums differ.

    Writes raster.svg, membrane.svg, events.npz and trace.json.

    Example: spikellm trace out/w4a4 --text text.txt --layer 0 --out out/trace

    Returns:
        What ``trace.json`` holds.

    Raises:
        RequestError: no such block, token or part; nothing spikes; a NIR graph of phase spikes; a
            text shorter than the window; ``out`` holds what is read, or is not empty and no trace
            to overwrite.
        DependencyError: what pictures or graphs are made with is not installed.
    """
    from spikellm import api
    from spikellm.commands.support.trace_files import (
        Drawn,
        write_membrane,
        write_nir,
        write_raster,
    )
    from spikellm.profiling.events import write_events

    _require_ready(model, out, options)
    console.note(f"loading {model}")
    loaded, tokenizer = api.load(
        model, device=options.device, trust_remote_code=options.trust_remote_code
    )
    window = _window(loaded, tokenizer, options)
    found = _traced(loaded, window, options)
    words = [tokenizer.decode([int(one)]) for one in window[0]]
    token = len(words) - 1 if options.token is None else options.token
    population = _choose(found, options.part)
    result = {
        "model": model,
        "block": found.block,
        "text": options.text,
        "tokens": len(words),
        "token": token,
        "token_text": words[token],
        **_findings(found),
        "drawn": population.name,
    }
    with folder_when_done(out, overwrite=options.force, mark=_RESULT) as folder:
        drawn = Drawn(population, token, options.form)
        result["events"] = write_events(found.populations, folder / "events.npz", options.form)
        write_raster(drawn, words[token], folder / "raster.svg")
        if population.thresholds is not None:
            write_membrane(drawn, folder / "membrane.svg")
        if options.nir:
            result["nir"] = write_nir(found, population, token, folder / "layer.nir")
        console.write_json(result, str(folder / _RESULT))
    return result


def _require_ready(model: str, out: Path, options: TraceOptions) -> None:
    """Ask for all that is needed before the work."""
    from spikellm.export.nir import NO_PHASE, require_nir
    from spikellm.profiling.plots.canvas import require_pictures

    require_outside(out, model, options.text)
    require_free(out.resolve(), overwrite=options.force, mark=_RESULT)
    require_texts([options.text])
    require_pictures()
    if options.nir:
        if options.form == "phase":
            raise RequestError(f"--nir with --form phase: {NO_PHASE}; leave one of them out")
        require_nir()


def _window(model: Any, tokenizer: Any, options: TraceOptions) -> Tensor:
    """The first window of the text, ``(1, tokens)``."""
    from spikellm.data.windows import window_length
    from spikellm.evaluation.perplexity import text_windows

    length, token = options.seqlen, options.token
    if length is None:
        length = min(_TOKENS, window_length(model.config, None))
    window: Tensor = text_windows(model, tokenizer, options.text, seqlen=length, limit=1)
    if token is not None and not 0 <= token < length:
        raise RequestError(
            f"token is {token}; the window has tokens 0 to {length - 1} (--seqlen makes it longer)"
        )
    return window.to(next(model.parameters()).device)


def _traced(model: Any, window: Tensor, options: TraceOptions) -> BlockTrace:
    from spikellm.profiling.trace import trace_block

    if options.part is not None:  # asked of two tokens before the work on all
        _require_part(trace_block(model, window[:, :2], options.layer, options.form), options.part)
    tokens = window.shape[1]
    console.note(f"running block {options.layer} by {options.form} spikes on {tokens} tokens")
    return trace_block(model, window, options.layer, options.form)


def _require_part(found: BlockTrace, part: str) -> None:
    """Refuse a part that this block does not have, on whatever tokens."""
    names = {population.name for population in found.populations} | {
        name for name, own in found.layers.items() if own.neuron is not None
    }
    if part not in names:
        raise RequestError(unknown_name("part", part, sorted(names)))


def _choose(found: BlockTrace, part: str | None) -> Population:
    if part is None:
        return found.populations[0]
    names = [population.name for population in found.populations]
    if part not in names:
        raise RequestError(unknown_name("part", part, names))
    return found.populations[names.index(part)]


def _findings(found: BlockTrace) -> dict[str, Any]:
    return {
        "form": found.form,
        "equal": found.equal,
        "populations": [{**asdict(one), "equal": one.equal} for one in found.traces],
        "output": {
            "values": found.output_values,
            "largest_difference": found.output_difference,
            "exact": found.exact,
        },
    }


def show(result: dict[str, Any]) -> None:
    """Print what was found."""
    doubled = ["doublings"] if result["form"] == "phase" else []
    columns = ["population", "neurons", "steps", "moments", "spikes", "additions", *doubled]
    columns += ["integers compared", "equal"]
    rows = [_cells(one, doubled=bool(doubled)) for one in result["populations"]]
    console.table(
        f"{result['block']} by {result['form']} spikes, {result['tokens']} tokens", columns, rows
    )
    for line in (
        _output_in_words(result["output"], result["form"]),
        *_thresholds_in_words(result["populations"]),
        *_nir_in_words(result.get("nir")),
    ):
        console.out.print(line, highlight=False, markup=False, soft_wrap=True)


def _cells(one: dict[str, Any], *, doubled: bool) -> list[str]:
    return [
        one["name"],
        f"{one['channels']} × {one['tokens']} tokens",
        str(one["steps"]),
        str(one["moments"]),
        f"{one['spikes']:,}",
        f"{one['additions']:,}" if one["additions"] else "-",
        *([f"{one['shifts']:,}" if one["additions"] else "-"] if doubled else []),
        f"{one['integers']:,}",
        "yes" if one["equal"] else f"NO: {one['mismatches']:,} differ",
    ]


def _output_in_words(output: dict[str, Any], form: str) -> str:
    if output["exact"] and output["largest_difference"] == 0:
        return (
            f"all {output['values']:,} values of the block's output have the same bits in {form}"
            " and in merged execution"
        )
    rounds = " (a layer of this block adds up 16-bit inputs, whose sums round)"
    return (
        f"the block's output differs by at most {output['largest_difference']:.3g} between"
        f" {form} and merged execution{'' if output['exact'] else rounds}"
    )


def _thresholds_in_words(populations: list[dict[str, Any]]) -> list[str]:
    constant = [one["name"] for one in populations if one["constant_thresholds"]]
    if not constant:
        return []
    which = "all populations" if len(constant) == len(populations) else ", ".join(constant)
    return [f"thresholds of {which} are constants: no smallest or largest value is looked for"]


def _nir_in_words(nir: dict[str, Any] | None) -> list[str]:
    if nir is None:
        return []
    differ = nir["mismatches"]
    verdict = f"{differ} other integers" if differ else "the same integers"
    return [
        f"{nir['layer']} as a NIR graph, read back and run: {verdict} in {nir['sums']:,} sums."
        f" NIR does not express: {'; '.join(nir['not_expressed'])}"
    ]


def require(result: dict[str, Any], out: Path) -> None:
    """Fail where the two executions differ.

    Raises:
        NumericalError: names the block.
    """
    if not result["equal"] or result.get("nir", {}).get("mismatches"):
        raise NumericalError(
            f"{result['form']} and merged execution of {result['block']} differ; {out / _RESULT}"
            " tells where"
        )
