"""Pipelines: how the weights of a block are fitted."""

from spikellm.algorithms.base import Algorithm, BlockContext, FittedBlock, algorithms
from spikellm.core.registry import import_parts

__all__ = ["BlockContext", "FittedBlock", "Algorithm", "algorithms"]

import_parts(__name__, __path__)
