"""Pages of the site that are made from the code: the command line and the Python functions."""

from __future__ import annotations

import inspect
from typing import Any, get_args

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

API = (
    "load",
    "convert",
    "save",
    "train",
    "perplexity",
    "zero_shot",
    "generate",
    "report",
    "set_execution_mode",
    "summarize",
    "Conversion",
)
"""What ``import spikellm`` gives, in the order in which it is used."""
MODULES = (
    ("Neurons", "spikellm.neurons.integrate_fire"),
    ("Thresholds", "spikellm.quantization.thresholds"),
    ("The spiking layer", "spikellm.nn.linear"),
    ("Spiking attention", "spikellm.nn.attention"),
    ("Criteria of saliency", "spikellm.saliency.base"),
    ("Kernels", "spikellm.kernels.base"),
    ("Counts", "spikellm.profiling.counts"),
    ("Energy", "spikellm.profiling.energy"),
    ("Traces", "spikellm.profiling.trace"),
)
"""What people who add parts read."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for path, text in (("reference/cli.md", cli_page()), ("reference/api.md", api_page())):
        files.append(File.generated(config, path, content=text))
    return files


def cli_page() -> str:
    """Every command with its arguments and options."""
    import spikellm.cli  # noqa: F401  enters every verb
    from spikellm.commands.support.verb import Verb, verbs

    parts = [
        "# Command line\n\nMade from the code. Every command has `--json FILE|-` beside what stands"
        " here; those that print a table have `--table table|markdown|csv|latex`.\n"
    ]
    for name in verbs.names():
        verb = Verb(name)
        parts.append(f"## spikellm {name}\n\n{_words(verb.words)}\n")
        rows = [_row(one) for one in verb.parameters]
        if rows:
            head = "| | what | default |\n|---|---|---|"
            parts.append("\n".join([head, *rows]) + "\n")
    return "\n".join(parts)


def _words(text: str) -> str:
    """Paragraphs, the example as code."""
    lines = []
    for part in text.split("\n\n"):
        word, example, command = part.partition("Example: ")
        lines.append(f"```\n{command}\n```" if example and not word else part)
    return "\n\n".join(lines)


def _row(one: Any) -> str:
    required = one.default is inspect.Parameter.empty
    shown = "" if required else _value(one.default)
    choices = get_args(one.type)
    text = one.help.text
    if choices and all(isinstance(choice, str) for choice in choices):
        text += f" One of: {', '.join(choices)}."
    needed = "required" if required else shown
    return f"| `{one.option}` | {_cell(text)} | {_cell(needed)} |"


def _value(default: object) -> str:
    return "" if default in (None, (), False) else f"`{default}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def api_page() -> str:
    """The functions of the package, then what parts are written against."""
    import spikellm

    parts = ["# Python\n\nMade from the docstrings. `import spikellm` gives the first eleven.\n"]
    for name in API:
        own = getattr(spikellm, name)
        parts.append(f"::: {own.__module__}.{name}\n")
    for title, module in MODULES:
        options = "    options: {show_root_heading: false, heading_level: 3}"
        parts.append(f"## {title}\n\n`{module}`\n\n::: {module}\n{options}\n")
    return "\n".join(parts)
