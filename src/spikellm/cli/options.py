"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from spikellm.core import console
from spikellm.core.console import Style
from spikellm.core.errors import RequestError


def filled(expected: str) -> Callable[[typer.CallbackParam, str | None], str | None]:
    """A callback of an option that refuses an empty text, which would pass for no option at all."""

    def check(parameter: typer.CallbackParam, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise RequestError(
                f"{parameter.opts[0]} is empty; expected {expected}, or leave it out"
            )
        return value

    return check


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder or hub name of a model, converted or not.")
]
Json = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE|-",
        help="Write the result as JSON to a file, or to standard output (-).",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        callback=filled("a device, for example cpu"),
        help="Where to run, for example cpu or cuda:0.",
    ),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a recipe field, for example weights.bits=3. May be repeated.",
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="NAME|PATH",
        help="wikitext2, c4, ptb (hub), stdlib (built in), a .txt or .jsonl file, or a folder.",
    ),
]
EnergyTable = Annotated[
    str | None,
    typer.Option(
        "--energy-table",
        metavar="NAME|FILE",
        callback=filled("a table's name or file"),
        help="Energies per operation; horowitz-45nm by default.",
    ),
]
Texts = Annotated[
    list[str],
    typer.Option("--perplexity", metavar="NAME|PATH", help="Text to measure on. May be repeated."),
]
Seeds = Annotated[
    str | None,
    typer.Option("--seeds", metavar="1,2,…", help="Convert once for each; mean and deviation."),
]
Limit = Annotated[int | None, typer.Option("--limit", help="Use the first N windows only.")]
Table = Annotated[str, typer.Option("--table", help="How to print: table, markdown, csv or latex.")]
Samples = Annotated[int | None, typer.Option("--samples", help="Windows of calibration text.")]
Seqlen = Annotated[
    int | None,
    typer.Option("--seqlen", help="Tokens of a window; min(2048, the model's maximum) by default."),
]


def require_style(table: str, json: str | None) -> Style:
    """The style of a table by name.

    Raises:
        RequestError: there is none of that name, or no table is printed.
    """
    style = console.table_style(table)
    if json == "-" and style != "table":
        raise RequestError(
            f"--table {table} has no effect with --json -, which prints no table; leave one of"
            " them out"
        )
    return style


def whole_numbers(option: str, text: str | None) -> list[int]:
    """Numbers of an option that takes several, separated by commas.

    Raises:
        RequestError: one is no whole number, or is there twice.
    """
    try:
        numbers = [] if text is None else [int(number) for number in text.split(",")]
    except ValueError:
        raise RequestError(
            f"{option} {text!r}: expected whole numbers separated by commas, for example 1,2,3"
        ) from None
    if len(set(numbers)) < len(numbers):
        raise RequestError(f"{option} {text}: expected each number once")
    return numbers
