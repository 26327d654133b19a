"""Verbs by name, and what the command line is told of their parameters."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from spikellm.core.registry import Registry

F = TypeVar("F", bound=Callable[..., Any])
_SECTION = re.compile(r"^(Args|Returns|Raises|Attributes):$", re.MULTILINE)


class Verbs(Registry[Callable[..., Any]]):
    """A registry of functions; each keeps its own type."""

    def register(self, name: str) -> Callable[[F], F]:
        """Decorator that enters a function under ``name``."""

        def enter(function: F) -> F:
            super(Verbs, self).register(name)(function)
            return function

        return enter


verbs = Verbs("command", loads=False)
"""Functions by name. The module of each also has ``show(result)``, which prints the result for
people, and may have ``require(result)``, which raises where a result means that the work failed.
Both may ask for parameters of the verb by their names, and ``show`` for ``style``, how to print
tables.
"""


@dataclass(frozen=True)
class Help:
    """What the command line needs to know of a parameter beside its name, its type and its default.

    Attributes:
        text: one sentence for ``--help``.
        metavar: what stands for its value there.
        name: of the option, where it is not the parameter's.
        formerly: an earlier name of the option, which is taken still.
        separated: values are separated by commas, instead of the option repeated.
        filled: what is expected, where an empty text would pass for no option at all.
        names: the names that are valid, for ``--help``; asked for when it is printed.
        reads: what is read: it is not overwritten by what is written.
        writes: what is written: not over what is read, nor one thing over another.
        within: names in a folder that are written, where it is not written as a whole.
        unless_json: the value of a parameter that is not given, unless ``--json`` is.
    """

    text: str
    metavar: str | None = None
    name: str | None = None
    formerly: str | None = None
    separated: bool = False
    filled: str | None = None
    names: Callable[[], Iterable[str]] | None = None
    reads: Literal["models", "texts", "recipes", "settings", "files", "tasks"] | None = None
    writes: Literal["file", "folder"] | None = None
    within: tuple[str, ...] = ()
    unless_json: Path | None = None


class Argument(Help):
    """A parameter that is given by its place."""


class Option(Help):
    """A parameter that is given by its name."""


class Parameter(NamedTuple):
    """A parameter of a verb, or a field of its options.

    Attributes:
        default: ``inspect.Parameter.empty`` where a value is required.
        field: whether it is a field of the options.
    """

    name: str
    type: Any
    default: Any
    help: Help
    field: bool

    @property
    def option(self) -> str:
        """How messages name it."""
        if isinstance(self.help, Argument):
            return self.help.metavar or self.name
        return f"--{self.help.name or self.name.replace('_', '-')}"


class Verb:
    """A function under a name, with what its signature says.

    Attributes:
        parameters: those with a :class:`Help`; the others are for Python alone.
        options: the dataclass of its options, None if it has none.
    """

    def __init__(self, name: str) -> None:
        self.name, self.run = name, verbs[name]
        module = sys.modules[self.run.__module__]
        self.show: Callable[..., None] = module.show
        self.require: Callable[..., None] | None = getattr(module, "require", None)
        self.options: type | None = None
        self.parameters: list[Parameter] = []
        hints = _hints(self.run)
        for own, parameter in inspect.signature(self.run).parameters.items():
            if is_dataclass(hints[own]):
                self.options = hints[own]
                self.parameters += _fields_of(hints[own])
            elif found := _parameter(own, hints[own], parameter.default, field=False):
                self.parameters.append(found)

    @property
    def takes_style(self) -> bool:
        """Whether it prints a table that may be printed in several ways."""
        return "style" in inspect.signature(self.show).parameters

    @property
    def words(self) -> str:
        """The docstring as far as it is for people; a paragraph's lines are joined."""
        text = _SECTION.split(inspect.getdoc(self.run) or "")[0].strip()
        paragraphs = re.split(r"\n\s*\n", text)
        return "\n\n".join(re.sub(r"\n\s*", " ", paragraph) for paragraph in paragraphs)

    def call(self, given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Run it; gives its result, and the arguments that it was called with, by name."""
        arguments = {one.name: given[one.name] for one in self.parameters if not one.field}
        if self.options:
            own = {one.name: given[one.name] for one in self.parameters if one.field}
            arguments["options"] = self.options(**own)
        return self.run(**arguments), arguments


def hand_over(function: Callable[..., None], result: Any, available: Mapping[str, Any]) -> None:
    """Call a function with a result and with those of the named values that it asks for."""
    asked = [*inspect.signature(function).parameters][1:]
    function(result, **{name: available[name] for name in asked if name in available})


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Types of the parameters; what a function returns may be named for type checkers alone."""
    own = {key: value for key, value in function.__annotations__.items() if key != "return"}
    scope = vars(sys.modules[function.__module__])
    return get_type_hints(SimpleNamespace(__annotations__=own), scope, scope, include_extras=True)


def _fields_of(options: type) -> list[Parameter]:
    """Fields of a dataclass, its own before those that it inherits."""
    hints = get_type_hints(options, include_extras=True)
    defaults = {one.name: one.default for one in fields(options)}
    names = [name for part in options.__mro__ for name in inspect.get_annotations(part)]
    found = []
    for name in dict.fromkeys(names):
        default = inspect.Parameter.empty if defaults[name] is MISSING else defaults[name]
        if parameter := _parameter(name, hints[name], default, field=True):
            found.append(parameter)
    return found


def _parameter(name: str, hint: Any, default: Any, *, field: bool) -> Parameter | None:
    if get_origin(hint) is not Annotated:
        return None
    kind, *notes = get_args(hint)
    helps = [note for note in notes if isinstance(note, Help)]
    return Parameter(name, kind, default, helps[0], field) if helps else None
