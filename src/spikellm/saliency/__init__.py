"""Optimal Brain Spiking: which channels get more steps."""

from spikellm.core.registry import import_parts
from spikellm.saliency.base import Evidence, Selection, choose, criteria, ranking, salient_count

__all__ = ["Evidence", "Selection", "choose", "criteria", "ranking", "salient_count"]

import_parts(__name__, __path__)
