"""A report as one page of HTML that needs nothing else: no script, no font, no picture from
elsewhere.
"""

from __future__ import annotations

from importlib import resources

from spikellm.core.extras import require
from spikellm.core.version import __version__
from spikellm.profiling.counts import FORMS, Operations
from spikellm.profiling.energy import OMITTED
from spikellm.profiling.report import PARTS, Report

_NAMES = {
    "linear": "linear layers of blocks",
    "attention": "attention",
    "head": "output projection",
    "rotation": "rotations",
    "whole": "whole model",
}
LIMITS = (
    (
        "Perplexity is of this text and these windows alone; a short text leaves an uncertainty of"
        " several percent. Compare only figures of the same text, windows and tokenizer."
    ),
    (
        "Counts are of a forward pass over whole windows. Attention counts the whole matrix, as it"
        " is computed, not its causal half."
    ),
    (
        "Spikes are counted in linear layers and, where attention spikes, in Q, K and V. Norms,"
        " softmax, embeddings and residual sums are not spikes."
    ),
    (
        "Energy is arithmetic times a table; control, routing, coding of inputs and static power"
        " are left out, memory traffic is apart."
    ),
    "Sizes are of the stored integers with their scales and channel groups.",
)
Sheet = tuple[list[str], list[list[str]], str]


def require_page() -> None:
    """Ask for what pages are made with, before the work that fills them.

    Raises:
        DependencyError: jinja2 or matplotlib is not installed.
    """
    require(
        "pages of reports",
        "report",
        "jinja2",
        "matplotlib",
        otherwise=", or write JSON alone (--json)",
    )


def render(report: Report) -> str:
    """The page.

    Raises:
        DependencyError: see :func:`require_page`.
    """
    require_page()
    import jinja2

    from spikellm.profiling.plots.canvas import DARK, LIGHT
    from spikellm.profiling.plots.overview import pictures

    template = (resources.files("spikellm.profiling") / "page.html").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    light, dark = (
        " ".join(f"{name}: {value};" for name, value in scheme.items()) for scheme in (LIGHT, DARK)
    )
    return environment.from_string(template).render(
        report=report,
        origin=report.origin,
        light=light,
        dark=dark,
        verdict=verdict(report),
        tiles=figures(report),
        pictures=pictures(report),
        beside=_beside(report),
        operations=_operations(report),
        forms=_forms(report),
        energies=_energies(report),
        layers=_layers(report),
        omitted=OMITTED,
        limits=LIMITS,
        version=__version__,
    )


def verdict(report: Report) -> str:
    """The report in a sentence."""
    if report.origin is None:
        return f"An ordinary model: perplexity {report.text.perplexity:.2f}, no spiking layer."
    saved = (
        f"{report.ace / report.dense_ace:.3f} of the original's arithmetic effort and"
        f" {_share(report.summary.weight_bytes, report.summary.dense_bytes)} of its bytes in the"
        " converted layers"
    )
    original = next((row for row in report.beside if not row.converted), None)
    lost = (
        ""
        if original is None
        else (
            f", {report.text.perplexity / original.perplexity:.3f} times that of {original.name}"
            f" ({original.perplexity:.2f})"
        )
    )
    return f"Perplexity {report.text.perplexity:.2f}{lost}, with {saved}."


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.3f}" if whole else "-"


def count(number: float) -> str:
    """A large number for people."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 1000:
            return f"{number:.3g}{unit}" if unit else f"{number:.0f}"
        number /= 1000
    return f"{number:.3g}E"


def figures(report: Report) -> list[list[str]]:
    """The key figures: what, how much, of what."""
    summary, merged, dense = (
        report.summary,
        report.energy["linear"].merged,
        report.energy["linear"].dense,
    )
    tiles = [
        [
            "perplexity",
            f"{report.text.perplexity:.2f}",
            f"{report.prefill.tokens:,} tokens of {report.text.name}",
        ]
    ]
    if report.origin is None:
        return [*tiles, ["size", f"{summary.total_bytes / 2**20:.1f} MiB", "whole model"]]
    return [
        *tiles,
        ["average steps", f"{report.average_steps:.3f}", "of the linear layers"],
        [
            "ACE",
            f"{report.ace / report.dense_ace:.3f}×",
            "of the original at 16 bits, linear layers",
        ],
        [
            "spike rate",
            f"{report.spike_rate:.1%}" if report.prefill.firing else "-",
            "steps with a spike" if report.prefill.firing else "inputs are not coded",
        ],
        ["additive", f"{report.additive_share:.1%}", "products that are additions"],
        [
            "weights",
            f"{_share(summary.weight_bytes, summary.dense_bytes)}×",
            f"{summary.weight_bytes / 2**20:.2f} MiB, converted layers",
        ],
        ["energy", f"{merged / dense:.3f}×", "estimated from operation counts, merged form"],
    ]


def _beside(report: Report) -> Sheet:
    columns = [
        "model",
        "perplexity",
        "average steps",
        "ACE, linear layers",
        "energy*, merged",
        "whole model",
    ]
    rows = [
        [
            row.name,
            f"{row.perplexity:.2f}",
            f"{row.average_steps:.3f}",
            f"{row.ace / row.dense_ace:.3f}×",
            f"{row.energy.merged / row.energy.dense:.3f}×",
            f"{row.total_bytes / 2**20:.2f} MiB",
        ]
        for row in report.beside
    ]
    if report.origin is not None and not any(not row.converted for row in report.beside):
        rows.insert(0, ["original at 16 bits", "not measured", "1.000", "1.000×", "1.000×", "-"])
    own = report.energy["linear"]
    rows.append(
        [
            report.name,
            f"{report.text.perplexity:.2f}",
            f"{report.average_steps:.3f}",
            f"{report.ace / report.dense_ace:.3f}×",
            f"{own.merged / own.dense:.3f}×",
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


def _operations(report: Report) -> Sheet:
    columns = ["part", "multiply-accumulates", "average steps", "ACE", "of 16 bits", "additive"]
    rows = [
        _operation_row(_NAMES[part], report.part(part))
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
        f"{_share(entry.ace, entry.dense_ace)}×",
        f"{entry.additive_share:.1%}",
    ]


def _forms(report: Report) -> Sheet:
    columns = ["form", "spikes", "synaptic operations, linear", "attention", "whole model"]
    parts = {part: report.part(part) for part in ("linear", "attention", "whole")}
    rows = [
        [
            form,
            count(parts["whole"].spikes[form]),
            *(count(parts[part].sops[form]) for part in parts),
        ]
        for form in FORMS
    ]
    return (
        columns,
        rows,
        (
            "Synaptic operations: non-zero spikes times fan-out. Merged: one spike a code; stepped:"
            " one a step; binary: spikes of 0 and 1."
        ),
    )


def _energies(report: Report) -> Sheet:
    columns = ["part", "original", *FORMS, "reading weights (apart)"]
    tokens = report.prefill.tokens
    rows = [
        [
            _NAMES[part],
            *(
                f"{value / tokens / 1e6:.3g} µJ"
                for value in (one.dense, one.merged, one.stepped, one.binary, one.weight_traffic)
            ),
        ]
        for part, one in report.energy.items()
    ]
    return columns, rows, f"A token. Weights are read once a window of {report.text.seqlen} tokens."


def _layers(report: Report) -> Sheet:
    columns = [
        "layer",
        "bits (input × weight)",
        "steps",
        "ACE",
        "spike rate",
        "synaptic operations, binary",
        "additive",
    ]
    rows = []
    for name, entry in report.prefill.layers.items():
        bits = ", ".join(f"{a} × {b}" for a, b in sorted(entry.by_bits))
        rate = f"{entry.spike_rate:.1%}" if entry.slots else "-"
        rows.append(
            [
                name,
                bits,
                f"{entry.average_steps:.3f}",
                count(entry.ace),
                rate,
                count(entry.sops["binary"]),
                f"{entry.additive_share:.0%}",
            ]
        )
    return (
        columns,
        rows,
        "Attention stands as its two products: scores (Q and K) and values (probabilities and V).",
    )
