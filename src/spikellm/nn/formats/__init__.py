"""Weight formats: how a layer stores its weights. Each enters itself into the registry."""

from spikellm.core.registry import import_parts
from spikellm.nn.formats.base import WeightFormat, format_of, formats

__all__ = ["WeightFormat", "format_of", "formats"]

import_parts(__name__, __path__)
