"""What is decided over the whole model before its first block is converted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from spikellm.algorithms.survey import SurveyedLayer
from spikellm.conversion.context import ConversionContext
from spikellm.conversion.step_shares import StepShares
from spikellm.conversion.survey import survey


def allocate_over_model(context: ConversionContext) -> dict[str, int]:
    """Let the algorithm look at the model, and share out steps over its layers, K and V, where the
    recipe asks for that.

    Returns how many channels of a layer, or of a head of K or V, are salient, where that is decided
    here.
    """
    if not context.surveyed:
        return {}
    recipe, algorithm = context.recipe, context.algorithm
    shares = StepShares(recipe.seed)
    settings = [one for block in context.plan for one in block.linears.values()]
    algorithm_looks = any(map(algorithm.needs_survey, settings))
    allocates = any(one.activations.allocated_over_model for one in settings)

    sampled = recipe.calibration.saliency_tokens if allocates else 1
    with closing(survey(context, sampled=sampled, hessian=algorithm_looks)) as blocks:

        def layers() -> Iterator[SurveyedLayer]:
            for block in blocks:
                shares.look(block.layers)
                shares.look_at_heads(block.heads)
                yield from block.layers

        surveyed = layers()
        if algorithm_looks:
            algorithm.survey(surveyed, recipe)
        for _ in surveyed:  # what the algorithm left is shared out too
            pass
    return shares.counts()
