"""The output projection, converted after all blocks on what they feed it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from spikellm.algorithms import Algorithm, BlockContext, algorithms
from spikellm.conversion.block_runner import batch_windows, input_of
from spikellm.conversion.record import BlockRecord, record_of
from spikellm.core.offload import released_after_forward
from spikellm.models.plan import BlockPlan
from spikellm.models.swap import replace_module
from spikellm.observers.activation_store import ActivationStore
from spikellm.observers.input_stats import SampledInputs
from spikellm.recipe import Recipe


def head_fitter(pipeline: Algorithm) -> Algorithm:
    """What fits the output projection: the pipeline itself, or rounding to nearest where it needs a
    block around a layer.
    """
    return pipeline if pipeline.fits_alone else algorithms["rtn"]()


def alone(recipe: Recipe) -> Recipe:
    """The recipe as it fits the output projection, which has no layers beside it that could be
    fitted in turn.
    """
    return recipe.model_copy(update={"algorithm": recipe.algorithm.alone()})


@torch.no_grad()
def convert_head(
    model: nn.Module,
    blocks: nn.ModuleList,
    plan: BlockPlan,
    windows: Tensor,
    recipe: Recipe,
    pipeline: Algorithm,
    folder: Path | None,
    device: torch.device,
) -> BlockRecord:
    """Convert the output projection, where it is.

    Each of several ranks runs the whole text, so that samples and Hessian are whole as they are.

    Args:
        blocks, plan: the converted blocks, and what the projection becomes.
        windows: all calibration tokens, ``(windows, seqlen)``.
        folder: where to keep the projection's inputs; RAM by default.
    """
    [(name, settings)] = plan.linears.items()
    head, home, fitter = (
        model.get_submodule(name),
        next(model.parameters()).device,
        head_fitter(pipeline),
    )
    recipe = alone(recipe)
    hessian = fitter.needs_hessian(recipe)
    samples = SampledInputs(
        {name: head}, windows.numel(), recipe.calibration.saliency_tokens, hessian=hessian
    )
    batches = windows.to(home).split(batch_windows(windows.shape[1]))
    with samples.hooks(), released_after_forward(blocks):
        inputs = ActivationStore((input_of(model, head, batch) for batch in batches), folder)
    context = BlockContext(
        name,
        head,
        None,
        {name: head},
        plan.linears,
        samples,
        inputs,
        inputs,
        inputs,
        lambda module, hidden: module(hidden),
        recipe,
        device,
    )
    fitted = fitter.fit_block(context)
    if fitter is not pipeline:
        note = (
            f"{name} is rounded to nearest: pipeline {recipe.pipeline!r} learns on what a block"
            " gives, and there is none around it"
        )
        fitted = fitted._replace(notes=[note, *fitted.notes])
    if settings.activations.allocated_over_model:
        note = (
            f"{name} gives more steps to its own share of channels: activations.allocation: model"
            " shares out over the layers of the blocks"
        )
        fitted = fitted._replace(notes=[note, *fitted.notes])
    layer, states = fitted.layers[name], (inputs[i].to(home) for i in range(len(inputs)))
    record = record_of(
        name, fitted.layers, ((layer(hidden), head(hidden)) for hidden in states), fitted
    )
    replace_module(model, name, layer)
    return record
