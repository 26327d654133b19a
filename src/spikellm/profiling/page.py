"""A report as one page of HTML without scripts, and without fonts or pictures from elsewhere."""

from __future__ import annotations

from importlib import resources

from spikellm.core.extras import require
from spikellm.core.version import __version__
from spikellm.profiling import comparison, sheets
from spikellm.profiling.energy import OMITTED
from spikellm.profiling.report import Report

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
        "Energy is operations times a table, which is not a measurement; control, moving values and"
        " static power are left out, reading memory beside the chip is apart. What a table does not"
        " know is not known."
    ),
    "Sizes are of the stored integers with their scales and channel groups; stored bits of"
    " published systems are those of their codes alone.",
)


def require_page() -> None:
    """Check that the packages for pages are installed, before the work that fills a page.

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

    from spikellm.profiling.plots.canvas import DARK, LIGHT, css_of
    from spikellm.profiling.plots.layer_spikes import MARKS, layer_map, targets
    from spikellm.profiling.plots.overview import pictures

    template = (resources.files("spikellm.profiling") / "page.html").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(
        report=report,
        origin=report.origin,
        light=css_of(LIGHT),
        dark=css_of(DARK),
        verdict=verdict(report),
        tiles=figures(report),
        pictures=pictures(report),
        beside=sheets.beside(report),
        published=comparison.sheet(report) if comparison.converted(report) else None,
        extra=sheets.extra_steps(report),
        massive=sheets.massive(report),
        stored=sheets.stored(report),
        operations=sheets.operations(report),
        modes=sheets.modes(report),
        energies=sheets.energies(report),
        layers=sheets.layers(report),
        spikes=layer_map(report),
        marks=MARKS,
        targets=targets(report),
        omitted=OMITTED,
        limits=LIMITS,
        version=__version__,
    )


def verdict(report: Report) -> str:
    """The report in a sentence."""
    if report.origin is None:
        return f"An ordinary model: perplexity {report.text.perplexity:.2f}, no spiking layer."
    size = sheets.share(report.summary.weight_bytes, report.summary.dense_bytes)
    saved = (
        f"{report.ace / report.dense_ace:.3f} of the original's arithmetic effort and {size} of its"
        " bytes in the converted layers"
    )
    original = comparison.original_of(report)
    lost = (
        ""
        if original is None
        else (
            f", {report.text.perplexity / original.perplexity:.3f} times that of {original.name}"
            f" ({original.perplexity:.2f})"
        )
    )
    return f"Perplexity {report.text.perplexity:.2f}{lost}, with {saved}."


def figures(report: Report) -> list[list[str]]:
    """The key figures: what, how much, of what."""
    summary = report.summary
    tiles = [
        [
            "perplexity",
            f"{report.text.perplexity:.2f}",
            f"{report.prefill.tokens:,} tokens of {report.text.name}"
            f"{', BOS before each window' if report.text.bos else ''}",
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
        *_spikes(report),
        ["additive", f"{report.additive_share:.1%}", "products that are additions"],
        [
            "weights",
            f"{sheets.share(summary.weight_bytes, summary.dense_bytes)}×",
            f"{summary.weight_bytes / 2**20:.2f} MiB, converted layers",
        ],
        [
            "stored bits",
            f"{summary.stored.bits_a_weight:.2f}",
            f"a weight of converted layers; {summary.stored.bits_a_parameter:.2f} a parameter of"
            " the whole model",
        ],
        [
            "energy",
            sheets.ratio(report.energy["linear"].ratio("merged")),
            "of linear layers, estimated from operation counts, merged execution",
        ],
    ]


def _spikes(report: Report) -> list[list[str]]:
    """Spikes before linear layers, where inputs are coded."""
    linear = report.part("linear")
    if not linear.codes:
        return []
    phase, binary, published = (
        f"{count / linear.codes:.2f}"
        for count in (
            linear.spikes["phase"],
            linear.spikes["binary"],
            linear.spikes_from_zero["binary"],
        )
    )
    told = f"phase; binary {binary}, from zero {published}"
    return [["spikes a value", phase, told]]
