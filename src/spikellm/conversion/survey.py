"""A look at the whole full-precision model before any block is converted, for decisions over all
layers at once.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from spikellm.algorithms.survey import SurveyedLayer
from spikellm.conversion.context import ConversionContext
from spikellm.conversion.head_losses import AttentionCalls, HeadLosses, SurveyedHeads
from spikellm.models.experts import every_expert_sees_every_token
from spikellm.models.placement import placed
from spikellm.models.plan import BlockPlan
from spikellm.observers.input_stats import SampledInputs
from spikellm.observers.sensitivity import output_sensitivity
from spikellm.observers.token_weights import SamplePlan, TokenWeights
from spikellm.recipe import LinearRecipe

_BATCHES = 2  # on which losses of K and V are measured, about 4,000 tokens


class SurveyedBlock(NamedTuple):
    """Linear layers of one block, and K and V of its attention, as far as they are surveyed."""

    layers: list[SurveyedLayer]
    heads: list[SurveyedHeads]


def survey(
    context: ConversionContext, *, sampled: int = 1, hessian: bool = True
) -> Generator[SurveyedBlock, None, None]:
    """What is surveyed, block after block; Hessians and samples live for one block.

    Transforms prepare all blocks first. The backward pass runs where the model is. Close it, or the
    block that is looked at may stay on the device.

    Args:
        sampled: tokens of each sample.
        hessian: whether Hessians are wanted.

    Raises:
        NumericalError, RequestError: see :func:`spikellm.observers.sensitivity.output_sensitivity`.
    """
    wanted = {
        name: settings
        for block in context.plan
        for name, settings in block.linears.items()
        if context.is_surveyed(settings)
    }
    on_stage = context.options.on_stage
    _prepare_all_blocks(context)
    on_stage(
        "weighing layers against each other: a backward pass of the whole model, then a look at"
        " each block"
    )
    attentions = {name for block in context.plan for name in _attentions(block)}
    sensitivity = output_sensitivity(context.model, context.shard, [*wanted, *sorted(attentions)])
    states, shard = context.first_states(), context.shard
    weights = TokenWeights.of(context.recipe.calibration, shard)
    plan = SamplePlan(shard.whole, sampled, shard.before, weights)
    for index, (block, module) in enumerate(zip(context.plan, context.blocks.modules, strict=True)):
        on_stage(f"looking at block {index + 1}/{len(context.plan)}")
        names = [name for name in block.linears if name in wanted]
        layers: dict[str, nn.Module] = {name: context.model.get_submodule(name) for name in names}
        modules = {name: context.model.get_submodule(name) for name in _attentions(block)}
        calls = AttentionCalls(modules, context.spread(_BATCHES))
        with placed(module, context.options.device):
            samples = SampledInputs(layers, plan, hessian=hessian)
            with samples.hooks(), calls.hooks(), every_expert_sees_every_token():
                states.advance(partial(context.runner.forward, index, module))
            samples.all_gather()
            heads = [
                found
                for name, own in modules.items()
                for found in HeadLosses(
                    name, *block.attentions[name], own, calls.kept[name], sensitivity[name]
                ).measure()
            ]
            yield SurveyedBlock(_surveyed(layers, wanted, samples, sensitivity), heads)


def _attentions(block: BlockPlan) -> list[str]:
    """Attention modules of a block whose steps or spikes of K or V are shared out over the
    model.
    """
    return [
        name
        for name, (_, settings) in block.attentions.items()
        if settings.allocated_parts or settings.priced_parts
    ]


def _prepare_all_blocks(context: ConversionContext) -> None:
    """Let transforms prepare the model and all its blocks, where there are any."""
    context.prepare_model()
    if not context.transforms.active:
        return
    context.options.on_stage("preparing all blocks, which stay in memory")
    states = context.first_states()
    for index, module in enumerate(context.blocks.modules):
        state = context.block_state(index, states)
        context.transforms.prepare_stream(state)
        context.transforms.prepare_block(state)
        states.advance(partial(context.runner.forward, index, module))


def _surveyed(
    layers: Mapping[str, nn.Module],
    wanted: Mapping[str, LinearRecipe],
    samples: SampledInputs,
    sensitivity: Mapping[str, Tensor],
) -> list[SurveyedLayer]:
    """Those of the layers that were run."""
    found = []
    for name, layer in layers.items():
        sample = samples.get(name)
        if sample is not None:
            same = [
                other
                for other in samples.shared_input_layers(name)
                if wanted[other].activations == wanted[name].activations
            ]
            found.append(
                SurveyedLayer(
                    name,
                    layer,
                    wanted[name],
                    samples.hessian(name),
                    sensitivity[name].to(sample.device),
                    sample,
                    tuple(sorted(same)),
                )
            )
    return found
