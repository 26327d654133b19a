"""Optimal Brain Spiking: which channels get more steps."""

from spikellm.core.registry import import_parts
from spikellm.saliency.base import (
    Evidence,
    Ranking,
    Selection,
    choose,
    criteria,
    ranking,
    rankings,
    salient_count,
)

__all__ = [
    "Evidence",
    "Ranking",
    "Selection",
    "choose",
    "criteria",
    "ranking",
    "rankings",
    "salient_count",
]

import_parts(__name__, __path__)
