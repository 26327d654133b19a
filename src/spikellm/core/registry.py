"""Named parts (neurons, saliency criteria, algorithms): a decorator puts one in, a lookup takes it
out and lists the valid names if it is not there.

Parts are found where they lie: the package's own in :data:`PARTS`, those of other distributions
through entry points of the group :data:`PLUGINS`. Both are imported once, when a name is looked up
that is not there yet or all names are asked for. A plugin that cannot be loaded holds up nobody who
does not need it: it is warned of once, and named where a name is not found.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import pkgutil
import threading
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, NamedTuple, TypeVar

from spikellm.core.errors import RequestError

T = TypeVar("T")
PARTS = (
    "spikellm.neurons",
    "spikellm.kernels",
    "spikellm.saliency",
    "spikellm.nn.formats",
    "spikellm.transforms",
    "spikellm.algorithms",
    "spikellm.training",
    "spikellm.export",
)
PLUGINS = "spikellm.plugins"
_log = logging.getLogger("spikellm")


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> str:
    """One line for an unknown name: what was found, the nearest valid one, all valid ones."""
    valid = list(valid)
    near = difflib.get_close_matches(name, valid, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}{hint} (valid: {', '.join(valid)})"


class Registry(Generic[T]):
    """A dictionary of parts of one kind that refuses unknown names with the valid ones.

    Looking up a name that is there costs no more than a dictionary does. Where it is not, or all
    names are asked for, :func:`load_parts` runs first.

    Args:
        kind: of the parts, for messages.
        loads: whether parts of the kind come with :func:`load_parts`; otherwise only what is
            registered already is found.
    """

    def __init__(self, kind: str, *, loads: bool = True) -> None:
        self.kind = kind
        self._loads = loads
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that enters a part under ``name``.

        Raises:
            ValueError: another part has that name.
        """

        def enter(part: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = part
            return part

        return enter

    def __contains__(self, name: object) -> bool:
        if name not in self._entries and self._loads:
            load_parts()
        return name in self._entries

    def __getitem__(self, name: str) -> T:
        if name not in self:
            raise RequestError(self.unknown(name))
        return self._entries[name]

    def unknown(self, name: str) -> str:
        """One line for a name that is not there: see :func:`unknown_name`, and the plugins that
        could not be loaded, since it may be theirs.
        """
        broken = [one.problem for one in plugins() if one.problem] if self._loads else []
        return "; ".join([unknown_name(self.kind, name, self.names()), *broken])

    def names(self) -> list[str]:
        """Names of all parts, those of plugins included, sorted."""
        if self._loads:
            load_parts()
        return sorted(self._entries)


def import_parts(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that each enters what it has into the registry: adding a
    part is adding a file.
    """
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


class Plugin(NamedTuple):
    """An entry point of :data:`PLUGINS`.

    Attributes:
        name: of the entry point.
        origin: its distribution and module, in words.
        problem: why it could not be loaded, in one line; None if it was.
    """

    name: str
    origin: str
    problem: str | None


class _Loader:
    """Imports all parts once; a plugin that fails is not tried again until the process ends."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._begun = self._done = False
        self.plugins: list[Plugin] = []

    def load(self) -> None:
        if not self._done:
            with self._lock:
                if not self._begun:  # what is being imported may look names up itself
                    self._begun = True
                    try:
                        self._import()
                    except BaseException:
                        self._begun = False
                        raise
                    self._done = True

    def _import(self) -> None:
        for name in PARTS:
            import_parts(name, importlib.import_module(name).__path__)
        for plugin in sorted(entry_points(group=PLUGINS), key=lambda one: (one.name, one.value)):
            self.plugins.append(_load_plugin(plugin))


def _load_plugin(plugin: EntryPoint) -> Plugin:
    """Import a plugin and let it register its parts."""
    owner = f"{plugin.dist.name} {plugin.dist.version} " if plugin.dist else ""
    origin, problem = f"{owner}({plugin.value})", None
    try:
        found = plugin.load()
        if callable(found):
            found()
    except (Exception, SystemExit) as error:
        problem = (
            f"the plugin {plugin.name!r} of {origin} cannot be loaded:"
            f" {type(error).__name__}: {' '.join(str(error).split())}; repair or uninstall it"
        )
        _log.warning("spikellm: %s", problem)
    return Plugin(plugin.name, origin, problem)


_loader = _Loader()


def load_parts() -> None:
    """Import the package's own parts and all plugins, once.

    An entry point of :data:`PLUGINS` names a module that registers parts on import, or a function
    that registers them when called. Its parts are then like the package's own.
    """
    _loader.load()


def plugins() -> list[Plugin]:
    """All plugins, those that cannot be loaded too."""
    load_parts()
    return _loader.plugins
