"""The command ``trace``: one decoder block in binary form, compared with its merged form, and left
in a folder as pictures, events and figures.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from spikellm import api
from spikellm.commands.inputs import require_texts
from spikellm.core import console
from spikellm.core.errors import RequestError
from spikellm.core.files import folder_when_done, require_free, require_outside
from spikellm.core.registry import unknown_name
from spikellm.data.windows import window_length
from spikellm.evaluation.perplexity import text_windows
from spikellm.export.nir import (
    NOT_EXPRESSED,
    layer_graph,
    read_graph,
    require_nir,
    run_graph,
    segment_weights,
    write_graph,
)
from spikellm.profiling.events import write_events
from spikellm.profiling.plots.canvas import axes, require_pictures, write_svg
from spikellm.profiling.plots.spikes import draw_membrane, draw_raster, membrane_in_moments
from spikellm.profiling.population import Population
from spikellm.profiling.trace import BlockTrace, trace_block

_RESULT = "trace.json"
_TOKENS = 64
_NEURONS = 2  # of each kind whose membrane is drawn


def trace_to_folder(
    model: str,
    text: str,
    out: Path,
    *,
    layer: int = 0,
    token: int | None = None,
    part: str | None = None,
    seqlen: int | None = None,
    nir: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Trace block ``layer`` on the first window of a text.

    Args:
        token: whose spikes are drawn, from 0; the last one by default.
        part: population to draw, by name within the block; the first one by default.
        seqlen: tokens of the window; 64 by default.
        nir: write the layer that is drawn as a NIR graph too, read it back, and run it on the
            token's spikes.

    Returns:
        What ``trace.json`` holds.

    Raises:
        RequestError: no such block, token or part; nothing spikes; a text shorter than the window;
            ``out`` holds what is read, or is not empty and no trace to overwrite.
        DependencyError: what pictures or graphs are made with is not installed.
    """
    require_outside(out, model, text)
    require_free(out.resolve(), overwrite=overwrite, mark=_RESULT)
    require_texts([text])
    require_pictures()
    if nir:
        require_nir()
    console.note(f"loading {model}")
    loaded, tokenizer = api.load(model, device=device, trust_remote_code=trust_remote_code)
    length = min(_TOKENS, window_length(loaded.config, None)) if seqlen is None else seqlen
    window = text_windows(loaded, tokenizer, text, seqlen=length, limit=1)
    chosen = length - 1 if token is None else token
    if not 0 <= chosen < length:
        raise RequestError(
            f"token is {chosen}; the window has tokens 0 to {length - 1} (--seqlen makes it longer)"
        )
    if part is not None:  # asked of two tokens before the work on all
        _require_part(
            trace_block(loaded, window[:, :2].to(next(loaded.parameters()).device), layer), part
        )
    console.note(f"running block {layer} spike by spike on {length} tokens")
    found = trace_block(loaded, window.to(next(loaded.parameters()).device), layer)
    population = _choose(found, part)
    words = [tokenizer.decode([int(one)]) for one in window[0]]
    result = {
        "model": model,
        "block": found.block,
        "text": text,
        "tokens": length,
        "token": chosen,
        "token_text": words[chosen],
        "equal": found.equal,
        "populations": [{**asdict(one), "equal": one.equal} for one in found.traces],
        "output": {
            "values": found.output_values,
            "largest_difference": found.output_difference,
            "exact": found.exact,
        },
        "drawn": population.name,
    }
    with folder_when_done(out, overwrite=overwrite, mark=_RESULT) as folder:
        result["events"] = write_events(found.populations, folder / "events.npz")
        _draw_raster(population, chosen, words[chosen], folder / "raster.svg")
        if population.thresholds is not None:
            _draw_membrane(population, chosen, folder / "membrane.svg")
        if nir:
            result["nir"] = _write_nir(found, population, chosen, folder / "layer.nir")
        console.write_json(result, str(folder / _RESULT))
    return result


def _require_part(found: BlockTrace, part: str) -> None:
    """Refuse a part that this block does not have, on whatever tokens."""
    names = {population.name for population in found.populations} | {
        name for name, own in found.layers.items() if own.neuron is not None
    }
    if part not in names:
        raise RequestError(unknown_name("part", part, sorted(names)))


def _choose(found: BlockTrace, part: str | None) -> Population:
    names = [population.name for population in found.populations]
    if part is None:
        return found.populations[0]
    if part not in names:
        raise RequestError(unknown_name("part", part, names))
    return found.populations[names.index(part)]


def _draw_raster(population: Population, token: int, word: str, path: Path) -> None:
    planes = population.of_token(token)
    title = f"Spikes of {population.name}, token {token} ({word.strip() or 'blank'})"
    words = (
        f"{int((planes != 0).sum())} binary spikes of {planes.shape[1]} channels over"
        f" {planes.shape[0]} moments, {int(population.salient.sum())} channels salient"
    )
    with axes(width=7.0, height=3.2) as (figure, axis):
        draw_raster(axis, planes, population.salient)
        axis.set_title(title, fontsize=9, loc="left")
        figure.legend(loc="outside lower left", ncols=3, fontsize=8, markerscale=2)
        write_svg(figure, path, title, words)


def _draw_membrane(population: Population, token: int, path: Path) -> None:
    """A few neurons: the salient ones with most spikes, and others of about the median."""
    codes, chosen = population.codes[token], population.salient
    ordinary = (~chosen).nonzero().flatten()
    ranked = ordinary[codes[ordinary].abs().argsort(stable=True)]
    picked = [int(channel) for channel in ranked[len(ranked) // 2 : len(ranked) // 2 + 1]] + [
        int(channel) for channel in ranked[-1:]
    ]
    loud = chosen.nonzero().flatten()
    picked += [
        int(channel)
        for channel in loud[codes[loud].abs().argsort(descending=True, stable=True)][:_NEURONS]
    ]
    assert population.thresholds is not None
    neuron, told = population.neuron, []
    with axes(width=7.0, height=1.3 * len(picked) + 0.6, nrows=len(picked), squeeze=False) as (
        figure,
        grid,
    ):
        for axis, channel in zip(grid[:, 0], picked, strict=True):
            theta, baseline = (
                pair[token, population.group[channel]] for pair in population.thresholds
            )
            steps, code = int(population.steps[channel]), int(codes[channel])
            current = theta * (
                code - baseline
            )  # what the code stands for; the input itself lies within half a threshold of it
            potential, spikes = membrane_in_moments(neuron, current, theta, baseline, steps)
            kind = "salient channel" if bool(chosen[channel]) else "channel"
            told.append(f"{kind} {channel}: {abs(code)} spikes in {len(potential)} moments")
            draw_membrane(
                axis,
                potential,
                spikes,
                f"{kind} {channel}, T = {steps}: code {code}",
                neuron.levels,
            )
            axis.set_ylabel("potential / θ")
        grid[-1, 0].set_xlabel("moment")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=3, fontsize=8)
        write_svg(
            figure,
            path,
            f"Membrane potentials of {population.name}, token {token}",
            "; ".join(told),
        )


def _write_nir(found: BlockTrace, population: Population, token: int, path: Path) -> dict[str, Any]:
    """Write the layer, read it back, run it, and compare its sums with an integer product."""
    if population.name not in found.layers:
        raise RequestError(
            f"{population.name} is a part of attention, not a layer with weights; name a layer with"
            " --part to write it as NIR"
        )
    layer = found.layers[population.name]
    write_graph(layer_graph(layer), path)
    sums = run_graph(read_graph(path), population.of_token(token))
    expected = segment_weights(layer) @ population.codes[token].long()
    return {
        "layer": population.name,
        "sums": sums.numel(),
        "mismatches": int((sums != expected).sum()),
        "not_expressed": list(NOT_EXPRESSED),
    }


def show(result: dict[str, Any]) -> None:
    """Print what was found."""
    columns = [
        "population",
        "neurons",
        "steps",
        "moments",
        "binary spikes",
        "additions",
        "integers compared",
        "equal",
    ]
    rows = [
        [
            one["name"],
            f"{one['channels']} × {one['tokens']} tokens",
            str(one["steps"]),
            str(one["moments"]),
            f"{one['spikes']:,}",
            f"{one['additions']:,}" if one["additions"] else "-",
            f"{one['integers']:,}",
            "yes" if one["equal"] else f"NO: {one['mismatches']:,} differ",
        ]
        for one in result["populations"]
    ]
    console.table(f"{result['block']} in binary form, {result['tokens']} tokens", columns, rows)
    output = result["output"]
    if output["exact"] and output["largest_difference"] == 0:
        end = (
            f"all {output['values']:,} values of the block's output have the same bits in binary"
            " and in merged form"
        )
    else:
        why = (
            ""
            if output["exact"]
            else " (a layer of this block adds up 16-bit inputs, whose sums round)"
        )
        end = (
            f"the block's output differs by at most {output['largest_difference']:.3g} between"
            f" binary and merged form{why}"
        )
    lines = [end]
    if nir := result.get("nir"):
        verdict = (
            "the same integers" if nir["mismatches"] == 0 else f"{nir['mismatches']} other integers"
        )
        lines.append(
            f"{nir['layer']} as a NIR graph, read back and run: {verdict} in {nir['sums']:,} sums."
            f" NIR does not express: {'; '.join(nir['not_expressed'])}"
        )
    for line in lines:
        console.out.print(line, highlight=False, markup=False, soft_wrap=True)
