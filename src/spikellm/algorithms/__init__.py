"""Algorithms: how the weights of a block are fitted."""

from spikellm.algorithms.base import (
    Algorithm,
    BlockContext,
    FittedBlock,
    InputCoding,
    Streams,
    algorithms,
)
from spikellm.core.registry import import_parts

__all__ = ["Algorithm", "BlockContext", "FittedBlock", "InputCoding", "Streams", "algorithms"]

import_parts(__name__, __path__)
