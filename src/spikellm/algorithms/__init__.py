"""Pipelines: how the weights of a block are fitted."""

from spikellm.algorithms.base import BlockContext, FittedBlock, Pipeline, pipelines
from spikellm.core.registry import import_parts

__all__ = ["BlockContext", "FittedBlock", "Pipeline", "pipelines"]

import_parts(__name__, __path__)
