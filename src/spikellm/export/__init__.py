"""Converted models for other tools: one file a format, entered under its name."""

from spikellm.core.registry import import_parts
from spikellm.export.base import Exporter, Source, exporters

__all__ = ["Exporter", "Source", "exporters"]

import_parts(__name__, __path__)
