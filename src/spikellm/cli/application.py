"""The program: its options, and the application that every command enters."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    name="spikellm",
    help=(
        "Turn a pretrained language model into a spike-driven one, see what that costs, and run"
        " it.\n\nTry `spikellm demo` first: it needs no download."
    ),
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def main_options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")] = False,
) -> None:
    """Options that stand before a command."""
    if context.invoked_subcommand is None and not version:
        print(context.get_help())
        raise typer.Exit
    if version:
        from spikellm.core.version import __version__

        print(__version__)
        raise typer.Exit
