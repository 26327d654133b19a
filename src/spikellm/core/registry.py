"""Named parts (neurons, saliency criteria, pipelines): a decorator puts one in, a lookup takes it
out and lists the valid names if it is not there.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from spikellm.core.errors import RequestError

T = TypeVar("T")


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> str:
    """One line for an unknown name: what was found, the nearest valid name, all valid names."""
    valid = list(valid)
    near = difflib.get_close_matches(name, valid, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}{hint} (valid: {', '.join(valid)})"


class Registry(Generic[T]):
    """A dictionary of parts of one kind that refuses unknown names with the valid ones."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that enters a part under ``name``."""

        def enter(part: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = part
            return part

        return enter

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise RequestError(unknown_name(self.kind, name, self.names()))
        return self._entries[name]

    def names(self) -> list[str]:
        return sorted(self._entries)


def import_parts(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that each enters what it has into the registry: adding a
    part is adding a file.
    """
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")
