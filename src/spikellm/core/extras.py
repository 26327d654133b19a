"""Optional packages, imported before the work that needs them begins."""

from __future__ import annotations

import importlib
from types import ModuleType

from spikellm.core.errors import DependencyError


def require(work: str, extra: str, *packages: str, otherwise: str = "") -> ModuleType:
    """Import packages of an extra.

    Args:
        work: what needs the packages, as the subject of a message: ``"pictures"``.
        extra: the extra that installs them.
        otherwise: what to do without them, appended to the message.

    Returns:
        The first package.

    Raises:
        DependencyError: one of them is not installed.
    """
    try:
        modules = [importlib.import_module(package) for package in packages]
    except ImportError as error:
        raise DependencyError(
            f"{work} need {error.name}, which is not installed; pip install"
            f" 'spikellm[{extra}]'{otherwise}"
        ) from None
    return modules[0]
