"""Weight formats: how weights are stored, and what they stand for."""

from spikellm.core.registry import import_parts

import_parts(__name__, __path__)
