"""What is decided over the whole model before its first block is converted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from spikellm.algorithms import Pipeline
from spikellm.algorithms.survey import SurveyedLayer
from spikellm.conversion.block_runner import BlockReplay
from spikellm.conversion.step_shares import StepShares
from spikellm.conversion.survey import survey
from spikellm.data.shards import OwnWindows
from spikellm.models.families import Blocks
from spikellm.models.plan import BlockPlan
from spikellm.recipe import Recipe
from spikellm.transforms.residual_rotation import Rotating


def decide_over_model(
    model: nn.Module, part: OwnWindows, blocks: Blocks, plan: list[BlockPlan], replay: BlockReplay, rotating: Rotating, device: torch.device,
    recipe: Recipe, pipeline: Pipeline, on_stage: Callable[[str], object], folder: Path | None,
) -> dict[str, int]:  # fmt: skip
    """Let the pipeline look at the model, and share out steps over its layers; returns how many channels of a layer are salient, where that is decided here."""
    shares, settings = StepShares(recipe.seed), [one for block in plan for one in block.linears.values()]
    wanted, sampled = any(map(pipeline.surveys, settings)), any(one.activations.shared_out for one in settings)
    found = survey(
        model, part, blocks, plan, replay, rotating, device, lambda one: pipeline.surveys(one) or one.activations.shared_out, on_stage, folder,
        sampled=recipe.calibration.saliency_tokens if sampled else 1, hessian=wanted,
    )  # fmt: skip

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
