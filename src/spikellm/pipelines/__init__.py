"""Pipelines: how the weights of a block are fitted."""

from spikellm.pipelines import rtn as _rtn
from spikellm.pipelines.base import BlockContext, Pipeline, pipelines

__all__ = ["BlockContext", "Pipeline", "pipelines"]
