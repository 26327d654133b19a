"""Kernels: what a layer runs on. Each backend enters itself into the registry.

A backend is a module or package here (or in another distribution) that registers a
:class:`spikellm.kernels.base.Backend`.
"""

from spikellm.core.registry import import_parts
from spikellm.kernels.base import Backend, backends, choice, describe, reasons, register, select
from spikellm.kernels.spec import ExecutionMode, HeadSpec, LinearSpec, MixSpec, RowSpec, Segment

__all__ = [
    "Backend",
    "ExecutionMode",
    "HeadSpec",
    "LinearSpec",
    "MixSpec",
    "RowSpec",
    "Segment",
    "backends",
    "choice",
    "describe",
    "reasons",
    "register",
    "select",
]

import_parts(__name__, __path__)
