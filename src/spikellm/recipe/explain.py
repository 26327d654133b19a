"""What is wrong with a recipe, in one line."""

from __future__ import annotations

from pydantic import BaseModel, ValidationError

from spikellm.core.registry import unknown_name
from spikellm.recipe.base import UNKNOWN_KEY


def explain(error: ValidationError) -> str:
    """The first problem of a validation error, with the valid names where a key is unknown."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    if first["type"] == UNKNOWN_KEY:
        ctx = first["ctx"]
        words = unknown_name(
            "key",
            ".".join([*path, ctx["key"]]),
            [".".join([*path, name]) for name in ctx["valid"]],
        )
        owners = " and ".join(map(repr, ctx["owners"]))
        return f"{words}; {ctx['key']} is an option of {owners}" if owners else words
    message = first["msg"].removeprefix("Value error, ")
    where = ".".join(path)
    found = (
        f" (found {first['input']!r})" if not isinstance(first["input"], (dict, BaseModel)) else ""
    )
    return f"{where}: {message}{found}" if where else message
