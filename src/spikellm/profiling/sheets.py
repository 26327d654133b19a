"""The tables of a page: column names, rows, and a note."""

from __future__ import annotations

from spikellm.models.stored_bits import TABLE, table_rows
from spikellm.profiling.counts import EXECUTION_MODES, Operations
from spikellm.profiling.massive import ExtraSteps
from spikellm.profiling.plots.grid import place_of
from spikellm.profiling.report import PART_NAMES, PARTS, Report

UNKNOWN = "not known"
Sheet = tuple[list[str], list[list[str]], str]


def share(part: float, whole: float) -> str:
    """A share, or a dash where there is no whole."""
    return f"{part / whole:.3f}" if whole else "-"


def ratio(found: float | None) -> str:
    """A ratio, which may not be known."""
    return UNKNOWN if found is None else f"{found:.3f}×"


def count(number: float) -> str:
    """A large number with three digits and a unit."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 1000:
            return f"{number:.3g}{unit}" if unit else f"{number:.0f}"
        number /= 1000
    return f"{number:.3g}E"


def beside(report: Report) -> Sheet:
    """This model and those beside it."""
    columns = [
        "model",
        "perplexity",
        "average steps",
        "ACE, linear layers",
        "energy*, merged",
        "stored bits a weight",
        "whole model",
    ]
    rows = [
        [
            row.name,
            f"{row.perplexity:.2f}",
            f"{row.average_steps:.3f}",
            f"{row.ace / row.dense_ace:.3f}×",
            ratio(row.energy.ratio("merged")),
            f"{row.stored.bits_a_weight:.2f}",
            f"{row.total_bytes / 2**20:.2f} MiB",
        ]
        for row in report.beside
    ]
    if report.origin is not None and not any(not row.converted for row in report.beside):
        rows.insert(
            0, ["original at 16 bits", "not measured", "1.000", "1.000×", "1.000×", "16.00", "-"]
        )
    rows.append(
        [
            report.name,
            f"{report.text.perplexity:.2f}",
            f"{report.average_steps:.3f}",
            f"{report.ace / report.dense_ace:.3f}×",
            ratio(report.energy["linear"].ratio("merged")),
            f"{report.summary.stored.bits_a_weight:.2f}",
            f"{report.summary.total_bytes / 2**20:.2f} MiB",
        ]
    )
    return (
        columns,
        rows,
        (
            "* estimated from operation counts. The original is measured where it is named with"
            " --beside."
        ),
    )


def operations(report: Report) -> Sheet:
    """Operations by part, and token by token."""
    columns = ["part", "multiply-accumulates", "average steps", "ACE, bit operations"]
    columns += ["ACE, of 16 bits", "additive"]
    rows = [
        _operation_row(PART_NAMES[part], report.part(part))
        for part in PARTS
        if report.part(part).executed or part == "whole"
    ]
    decode = report.decode.total()
    rows.append(
        _operation_row(f"whole model, a token at a time ({report.decode.tokens} tokens)", decode)
    )
    return (
        columns,
        rows,
        (
            f"Whole windows ({report.prefill.tokens:,} tokens); the last row counts tokens that"
            " come one by one, with a cache."
        ),
    )


def _operation_row(name: str, entry: Operations) -> list[str]:
    return [
        name,
        count(entry.macs),
        f"{entry.average_steps:.3f}",
        count(entry.ace),
        f"{share(entry.ace, entry.dense_ace)}{'×' if entry.dense_ace else ''}",
        f"{entry.additive_share:.1%}",
    ]


def modes(report: Report) -> Sheet:
    """Spikes and synaptic operations by execution mode, of the trains as they are, and if all of
    them were those of the codes.
    """
    columns = ["execution", "spikes, whole model", "spikes a value", "SOPs / MACs"]
    columns += ["with weights of zero", "SOPs, linear", "SOPs, attention", "SOPs, whole model"]
    columns += ["from zero: spikes a value", "from zero: SOPs"]
    linear, attention, whole = (report.part(part) for part in ("linear", "attention", "whole"))
    rows = [
        [
            mode,
            count(whole.spikes[mode]),
            share(linear.spikes[mode], linear.codes),
            share(linear.sops[mode], linear.macs),
            share(linear.reached[mode], linear.macs),
            count(linear.sops[mode]),
            count(attention.sops[mode]),
            count(whole.sops[mode]),
            share(linear.spikes_from_zero[mode], linear.codes),
            count(linear.sops_from_zero[mode]),
        ]
        for mode in EXECUTION_MODES
    ]
    return (
        columns,
        rows,
        (
            "Of linear layers where nothing else is said. SOPs: synaptic operations, non-zero"
            " spikes times the weights of their fan-out that are not zero,"
            f" {linear.weight_density:.1%} of those that spikes of linear layers reach; MACs:"
            " multiply-accumulates of the original. Merged: one spike a code that is not at rest;"
            " stepped: one a step; binary: spikes of one size; phase: spikes worth powers of two,"
            f" for which linear layers double accumulators {count(linear.shifts)} times. From"
            " zero: as published trains have it, which fire their baseline at rest."
        ),
    )


def energies(report: Report) -> Sheet:
    """Estimated energy by part and by row."""
    columns = ["part", "original", *EXECUTION_MODES, "reading weights (apart)"]
    tokens = report.prefill.tokens
    rows = []
    for part, words in report.rows().items():
        energy = report.energy[part]
        values = [*energy.columns()]
        if part in PARTS:
            values.append(energy.weight_traffic)
        cells = [UNKNOWN if v is None else f"{v / tokens / 1e6:.3g} µJ" for v in values]
        rows.append([words, *cells, *([] if part in PARTS else [""])])
    return columns, rows, _remarks(report)


def _remarks(report: Report) -> str:
    unknown = report.energy["whole"].unknown
    missing = [f"{', '.join(rows)} ({column})" for column, rows in unknown.items()]
    left = f" Left out: {', '.join(report.without)}." if report.without else ""
    return (
        "A token. The whole is the sum of what is above it"
        + (f", without what the table does not know: {'; '.join(missing)}" if missing else "")
        + f".{left} Weights are read from memory beside the chip once a window of"
        f" {report.text.seqlen} tokens."
    )


def stored(report: Report) -> Sheet:
    """Stored bits by kind."""
    return (
        TABLE,
        table_rows(report.summary.stored),
        (
            "Counted over the tensors that the model holds, those that are shared once. Bits a"
            " weight are of what is stored because of the weights of converted layers (of all"
            " layers but the output projection where none is), bits a parameter those of the whole"
            " for each parameter of the original."
        ),
    )


def layers(report: Report) -> Sheet:
    """Every layer."""
    columns = [
        "layer",
        "bits (input × weight)",
        "steps",
        "ACE",
        "spike rate",
        "weights not zero",
        "rate × weights",
        "synaptic operations, binary",
        "additive",
        "stored bits a weight",
    ]
    rows, known = [], {layer.name: layer for layer in report.summary.layers}
    for name, entry in report.prefill.layers.items():
        density = known[name].weight_density if name in known else None
        bits = ", ".join(f"{a} × {b}" for a, b in sorted(entry.by_bits))
        rate = f"{entry.spike_rate:.1%}" if entry.slots else "-"
        rows.append(
            [
                name,
                bits,
                f"{entry.average_steps:.3f}",
                count(entry.ace),
                rate,
                "-" if density is None else f"{density:.1%}",
                f"{entry.sparse_rate:.1%}" if entry.slots else "-",
                count(entry.sops["binary"]),
                f"{entry.additive_share:.0%}",
                f"{known[name].stored_bits:.3f}" if name in known else "-",
            ]
        )
    return (
        columns,
        rows,
        "Attention stands as its two products: scores (Q and K) and values (probabilities and V)."
        " Rate × weights is the share of a step's synapses at which anything is done: a spike that"
        " meets a weight other than zero.",
    )


def extra_steps(report: Report) -> Sheet:
    """Inputs in which tokens take more steps, a row a kind of layer."""
    columns = ["input", "blocks", "steps of such a token", "share at calibration", "share here"]
    columns += ["first of their window", "most in one block"]
    kinds: dict[str, list[ExtraSteps]] = {}
    for name, extra in report.extra.items():
        place = place_of(name)
        kinds.setdefault(name if place is None else place.row, []).append(extra)
    rows = []
    for kind, members in kinds.items():
        known = [extra.calibrated for extra in members if extra.calibrated is not None]
        found = sum(len(extra.found) for extra in members)
        first = sum(extra.first for extra in members)
        rows.append(
            [
                kind,
                str(len(members)),
                str(members[0].steps),
                f"{sum(known) / len(known):.3%}" if known else "-",
                f"{found / max(sum(extra.tokens for extra in members), 1):.3%}",
                f"{first} of {found}",
                f"{max(len(extra.found) for extra in members)} of {members[0].tokens:,}",
            ]
        )
    return (
        columns,
        rows,
        (
            "Tokens whose range is beyond the threshold of an input take more steps there, in every"
            " channel; in K and V, of at least one head. Blocks: in how many some tokens were"
            " massive at calibration."
        ),
    )


def massive(report: Report) -> Sheet:
    """Tokens that take more steps in most inputs."""
    rows = [
        [
            repr(token.text),
            f"{token.position}",
            f"{token.window}",
            f"{token.inputs} of {len(report.extra)}",
        ]
        for token in report.massive
    ]
    return (
        ["token", "position in its window", "window", "inputs in which it takes more steps"],
        rows,
        "Positions and windows count from 0. Those first that do so in most inputs.",
    )
