"""Packages that only some work needs: asked for before that work begins."""

from __future__ import annotations

import importlib
from types import ModuleType

from spikellm.core.errors import DependencyError


def require(work: str, extra: str, *packages: str, otherwise: str = "") -> ModuleType:
    """Import packages of an extra.

    Args:
        work: what needs them, as a message begins: ``"pictures"``.
        extra: whose installation brings them.
        otherwise: what to do without them.

    Returns:
        The first package.

    Raises:
        DependencyError: one is not installed; names it.
    """
    try:
        modules = [importlib.import_module(package) for package in packages]
    except ImportError as error:
        raise DependencyError(
            f"{work} need {error.name}, which is not installed; pip install"
            f" 'spikellm[{extra}]'{otherwise}"
        ) from None
    return modules[0]
