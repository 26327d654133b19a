"""The output projection, converted after all blocks on what they feed it."""

from __future__ import annotations

import torch

from spikellm.algorithms import BlockContext, Streams
from spikellm.conversion.block_runner import batch_windows, input_of
from spikellm.conversion.context import ConversionContext
from spikellm.conversion.plan import head_algorithm
from spikellm.conversion.record import BlockRecord, record_of
from spikellm.core.offload import released_after_forward
from spikellm.models.next_token import tokens_at_a_time
from spikellm.models.plan import BlockPlan
from spikellm.models.swap import replace_module
from spikellm.observers.activation_store import ActivationStore
from spikellm.observers.input_stats import SampledInputs
from spikellm.observers.token_weights import SamplePlan, TokenWeights


@torch.no_grad()
def convert_head(context: ConversionContext, plan: BlockPlan) -> BlockRecord:
    """Convert the output projection, where it is; ``plan`` says what it becomes.

    Each of several ranks runs the whole text, so that samples and Hessian are whole as they are.
    """
    model, windows = context.model, context.windows
    [name] = plan.linears
    head, home = model.get_submodule(name), next(model.parameters()).device
    algorithm = head_algorithm(context.algorithm)
    recipe = algorithm.for_head(context.recipe)
    samples = SampledInputs(
        {name: head},
        SamplePlan(
            windows.numel(),
            recipe.calibration.saliency_tokens,
            weights=TokenWeights.of(recipe.calibration, context.shard),
            widths=plan.tells_massive_tokens,
        ),
        hessian=algorithm.needs_hessian(recipe),
    )
    batches = windows.to(home).split(batch_windows(windows.shape[1]))
    with samples.hooks(), released_after_forward(context.blocks.modules):
        inputs = ActivationStore(
            (input_of(model, head, batch) for batch in batches), context.folder
        )
    fitted = algorithm.fit_block(
        BlockContext(
            plan,
            head,
            {name: head},
            samples,
            Streams(inputs, inputs, inputs),
            lambda module, hidden: module(hidden),
            recipe,
            context.options.device,
        )
    )
    fitted = fitted._replace(notes=[*_notes(context, plan), *fitted.notes])
    layer, states = fitted.layers[name], (inputs[i].to(home) for i in range(len(inputs)))
    most = tokens_at_a_time(model)
    pieces = (part for hidden in states for part in hidden.flatten(0, -2).split(most))
    pairs = ((layer(part), head(part)) for part in pieces)
    record = record_of(name, fitted.layers, pairs, fitted)
    replace_module(model, name, layer)
    return record


def _notes(context: ConversionContext, plan: BlockPlan) -> list[str]:
    """In what the projection is fitted otherwise than the layers of the blocks."""
    [(name, settings)] = plan.linears.items()
    notes = []
    if settings.activations.allocated_over_model:
        notes.append(
            f"{name} gives more steps to its own share of channels: activations.allocation: model"
            " shares out over the layers of the blocks"
        )
    if settings.activations.spikes:
        notes.append(
            f"{name} takes as many spikes as its codes have: activations.spikes is shared out over"
            " the layers of the blocks"
        )
    if not context.algorithm.fits_alone:
        notes.append(
            f"{name} is rounded to nearest: algorithm {context.recipe.algorithm.name!r} learns on"
            " what a block gives, and there is none around it"
        )
    return notes
