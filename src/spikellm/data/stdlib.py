"""Text that is part of every Python: the docstrings of its standard library.

Files are parsed, never imported, so that reading them has no side effect and needs no optional
component. The text differs a little from one Python version to the next; a figure measured on it
names the version.
"""

from __future__ import annotations

import ast
import sysconfig
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

Split = Literal["calibration", "evaluation"]

# Parts that a distribution may leave out, or that are not prose of the library itself.
_EXCLUDED = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "idle_test",
        "lib2to3",
        "distutils",
        "ensurepip",
        "turtledemo",
        "__pycache__",
        "__phello__",
    }
)
_HELD_OUT = 8  # one top-level module in eight is kept for evaluation


@cache
def stdlib_docstrings(split: Split) -> str:
    """Docstrings of the standard library, blank line between them, in a fixed order.

    Args:
        split: ``"evaluation"`` for the held-out modules (one in eight, by checksum of the top-level
            name), ``"calibration"`` for the others.
    """
    return "\n\n".join(doc for _, doc in iterate_docstrings(split))


def is_held_out(module: str) -> bool:
    """Whether a top-level module belongs to the evaluation split."""
    return zlib.crc32(module.encode()) % _HELD_OUT == 0


def iterate_docstrings(split: Split | None = None) -> Iterator[tuple[str, str]]:
    """Yield ``(top-level module, docstring)`` in the order of file names and of the source.

    Args:
        split: as for :func:`stdlib_docstrings`; both by default. Files of the other are not read.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        module = parts[0].removesuffix(".py")
        if _EXCLUDED.intersection(parts) or (
            split is not None and is_held_out(module) != (split == "evaluation")
        ):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue  # a template or another encoding: no docstring to be had
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                doc = ast.get_docstring(node)
                if doc:
                    yield module, doc
