"""What is decided over the whole model before its first block is converted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from spikellm.algorithms.survey import SurveyedLayer
from spikellm.conversion.context import Allocated, ConversionContext
from spikellm.conversion.spike_shares import SpikeShares
from spikellm.conversion.step_shares import StepShares
from spikellm.conversion.survey import survey


def allocate_over_model(context: ConversionContext) -> Allocated:
    """Let the algorithm look at the model, and share out steps and spikes over its layers, K and V,
    where the recipe asks for that.

    Raises:
        RequestError: a budget of spikes is too small.
    """
    if not context.surveyed:
        return Allocated()
    recipe, algorithm = context.recipe, context.algorithm
    shares, spikes = StepShares(recipe.seed), SpikeShares()
    settings = [one for block in context.plan for one in block.linears.values()]
    algorithm_looks = any(map(context.algorithm_looks_at, settings))
    allocates = any(
        one.activations.allocated_over_model or one.activations.spikes for one in settings
    )

    sampled = recipe.calibration.saliency_tokens if allocates else 1
    with closing(survey(context, sampled=sampled, hessian=algorithm_looks)) as blocks:

        def layers() -> Iterator[SurveyedLayer]:
            for block in blocks:
                shares.look(block.layers)
                shares.look_at_heads(block.heads)
                spikes.look(block.layers)
                spikes.look_at_heads(block.heads)
                yield from block.layers

        surveyed = layers()
        if algorithm_looks:
            algorithm.survey(surveyed, recipe)
        for _ in surveyed:  # what the algorithm left is shared out too
            pass
    return Allocated(shares.counts(), spikes.codings())
