"""Roles in docstrings as plain code, for the site."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":\w+:`~?([^`<]+)`")


class Roles(griffe.Extension):
    """``:func:`spikellm.load``` becomes `spikellm.load`."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value)
