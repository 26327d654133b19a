"""What is decided over the whole model before its first block is converted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from spikellm.algorithms import Algorithm
from spikellm.algorithms.survey import SurveyedLayer
from spikellm.conversion.block_runner import BlockRunner
from spikellm.conversion.step_shares import StepShares
from spikellm.conversion.survey import survey
from spikellm.data.shards import WindowShard
from spikellm.models.families import Blocks
from spikellm.models.plan import BlockPlan
from spikellm.recipe import Recipe
from spikellm.transforms.residual_rotation import ModelRotation


def allocate_over_model(
    model: nn.Module,
    part: WindowShard,
    blocks: Blocks,
    plan: list[BlockPlan],
    runner: BlockRunner,
    rotation: ModelRotation,
    device: torch.device,
    recipe: Recipe,
    pipeline: Algorithm,
    on_stage: Callable[[str], object],
    folder: Path | None,
) -> dict[str, int]:
    """Let the pipeline look at the model, and share out steps over its layers.

    Returns how many channels of a layer are salient, where that is decided here.
    """
    shares, settings = (
        StepShares(recipe.seed),
        [one for block in plan for one in block.linears.values()],
    )
    wanted, sampled = (
        any(map(pipeline.needs_survey, settings)),
        any(one.activations.allocated_over_model for one in settings),
    )
    found = survey(
        model,
        part,
        blocks,
        plan,
        runner,
        rotation,
        device,
        lambda one: pipeline.needs_survey(one) or one.activations.allocated_over_model,
        on_stage,
        folder,
        sampled=recipe.calibration.saliency_tokens if sampled else 1,
        hessian=wanted,
    )

    def layers() -> Iterator[SurveyedLayer]:
        for block in found:
            shares.look(block)
            yield from block

    if wanted:
        pipeline.survey(layers(), recipe)
    else:
        for _ in layers():
            pass
    return shares.counts()
