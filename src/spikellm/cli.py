"""The command line, derived from the verbs' signatures: parse, call, print.

Every function of the registry ``verbs`` becomes a command; its parameters and the fields of its
options become arguments and options, with the names, types, defaults and words that they have
there. Here are only the options that all commands share: ``--json``, and ``--table`` where a table
is printed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, cast, get_args, get_origin

import typer
from typer.core import TyperCommand

from spikellm import commands
from spikellm.commands.support.inputs import sources
from spikellm.commands.support.verb import Argument, Parameter, Verb, hand_over, verbs
from spikellm.core import console
from spikellm.core.console import Style
from spikellm.core.errors import RequestError
from spikellm.core.files import Source
from spikellm.core.registry import import_parts

_JSON = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE|-",
        help="Write the result as JSON to a file, or to standard output (-).",
    ),
]
_TABLE = Annotated[
    str, typer.Option("--table", help="How to print: table, markdown, csv or latex.")
]

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


def add_command(to: typer.Typer, verb: Verb) -> None:
    """Derive the command of a verb."""

    def command(**typed: Any) -> None:
        _run(verb, typed)

    parameters = [
        *(one for parameter in verb.parameters for one in _typed(parameter)),
        *([_keyword("table", _TABLE, "table")] if verb.takes_style else []),
        _keyword("json", _JSON, None),
    ]
    parameters.sort(key=lambda one: one.default is not inspect.Parameter.empty)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {}
    to.command(verb.name, help=verb.words, cls=_command_class(verb))(command)


def _run(verb: Verb, typed: dict[str, Any]) -> None:
    """Check what is written against what is read, run the verb, print what it found."""
    json, table = typed.pop("json"), typed.pop("table", None)
    given = {one.name: _value(one, typed) for one in verb.parameters}
    for one in verb.parameters:
        if given[one.name] is None and not json:
            given[one.name] = one.help.unless_json
    reads = _reads(verb, given)
    console.check_json_target(json, reads, _writes(verb, given))
    for one in verb.parameters:
        if one.help.writes == "file":
            console.check_file_target(one.option, given[one.name], reads)
    style = None if table is None else _style(table, json)
    result, arguments = verb.call(given)
    if result is None:  # another rank has it
        return
    if json:
        console.write_json(result.to_data() if hasattr(result, "to_data") else result, json)
    if json != "-":
        hand_over(verb.show, result, {**arguments, "style": style})
    if verb.require:
        hand_over(verb.require, result, arguments)


def _typed(parameter: Parameter) -> list[inspect.Parameter]:
    """A parameter as typer has it, and its earlier spelling, which help does not show."""
    about, kind, default = parameter.help, parameter.type, parameter.default
    if about.separated:
        kind, default = (str, default) if default is inspect.Parameter.empty else (str | None, None)
    elif get_origin(kind) is tuple:
        kind, default = (
            (list[str], default) if default is inspect.Parameter.empty else (list[str] | None, None)
        )
    if isinstance(about, Argument):
        shown = typer.Argument(metavar=about.metavar, help=about.text)
        return [_keyword(parameter.name, Annotated[kind, shown], default)]
    found = []
    for name, hidden in ((parameter.option, False), (f"--{about.formerly}", True)):
        if not hidden or about.formerly:
            option = typer.Option(
                name,
                metavar=about.metavar,
                help=about.text,
                hidden=hidden,
                callback=_filled(about.filled) if about.filled else None,
            )
            own = f"{parameter.name}_formerly" if hidden else parameter.name
            found.append(_keyword(own, Annotated[kind, option], default))
    return found


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _filled(expected: str) -> Callable[[typer.CallbackParam, str | None], str | None]:
    """A callback of an option that refuses an empty text, which would pass for no option at all."""

    def check(parameter: typer.CallbackParam, value: str | None) -> str | None:
        if value is not None and not value.strip(" ,"):
            raise RequestError(
                f"{parameter.opts[0]} is empty; expected {expected}, or leave it out"
            )
        return value

    return check


def _value(parameter: Parameter, typed: Mapping[str, Any]) -> Any:
    """What was typed, as the verb takes it.

    Raises:
        RequestError: numbers that are none or there twice, or an option under both its names.
    """
    value, earlier = typed[parameter.name], typed.get(f"{parameter.name}_formerly")
    if earlier is not None:
        if value is not None:
            raise RequestError(
                f"{parameter.option} and --{parameter.help.formerly} are the same; give one of them"
            )
        value = earlier
    if get_origin(parameter.type) is not tuple:
        return value
    if not parameter.help.separated:
        return tuple(value or ())
    if get_args(parameter.type)[0] is int:
        return whole_numbers(parameter.option, value)
    return tuple(name.strip() for name in (value or "").split(",") if name.strip())


def whole_numbers(option: str, text: str | None) -> tuple[int, ...]:
    """Numbers of an option that takes several, separated by commas.

    Raises:
        RequestError: one is no whole number, or is there twice.
    """
    try:
        numbers = () if text is None else tuple(int(number) for number in text.split(","))
    except ValueError:
        raise RequestError(
            f"{option} {text!r}: expected whole numbers separated by commas, for example 1,2,3"
        ) from None
    if len(set(numbers)) < len(numbers):
        raise RequestError(f"{option} {text}: expected each number once")
    return numbers


def _reads(verb: Verb, given: Mapping[str, Any]) -> list[Source]:
    found: dict[str, list[str]] = {}
    for one in verb.parameters:
        value = given[one.name]
        if one.help.reads and value:
            values = value if isinstance(value, tuple) else (value,)
            found.setdefault(one.help.reads, []).extend(str(name) for name in values if name)
    return sources(**cast("dict[str, Iterable[str]]", found))


def _writes(verb: Verb, given: Mapping[str, Any]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for one in verb.parameters:
        path = given[one.name]
        if one.help.writes and path is not None:
            found |= {f"{one.option}, {name}:": path / name for name in one.help.within} or {
                one.option: path
            }
    return found


def _style(table: str, json: str | None) -> Style:
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


def _command_class(verb: Verb) -> type[TyperCommand]:
    """A command whose help names what is registered, looked up no earlier than it is printed."""
    names = {one.name: one.help.names for one in verb.parameters if one.help.names}

    class Command(TyperCommand):
        def format_help(self, *arguments: Any) -> None:
            for shown in self.params:
                if find := names.get(shown.name or ""):
                    valid = f" One of: {', '.join(find())}."
                    text = getattr(shown, "help", None) or ""
                    shown.help = text.removesuffix(valid) + valid  # type: ignore[attr-defined]
            super().format_help(*arguments)

    return Command


import_parts(commands.__name__, commands.__path__)
for _name in verbs.names():
    add_command(app, Verb(_name))
