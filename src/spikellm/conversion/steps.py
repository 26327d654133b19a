"""What the loop (:mod:`spikellm.conversion.loop`) does to one block, step by step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import nn

from spikellm.algorithms import BlockContext, FittedBlock, Streams
from spikellm.conversion.attention import fit_attentions, needs_tokens, ranked_attentions
from spikellm.conversion.context import ConversionContext
from spikellm.conversion.record import BlockRecord, record_of
from spikellm.conversion.restore import restore
from spikellm.conversion.streams import StreamPair
from spikellm.core import distributed
from spikellm.core.offload import release, trim
from spikellm.models.experts import every_expert_sees_every_token
from spikellm.models.placement import placed
from spikellm.models.plan import BlockPlan
from spikellm.models.swap import put_parameters, replace_module
from spikellm.observers.activation_store import ActivationStore
from spikellm.observers.attention_stats import ATTENTION_TOKENS, AttentionSample
from spikellm.observers.input_stats import SampledInputs
from spikellm.observers.token_weights import SamplePlan, TokenWeights
from spikellm.transforms.block_state import BlockState, TransformedBlock


@dataclass
class BlockStep:
    """One block while it is converted.

    Attributes:
        context: the conversion.
        index, plan, module: the block, on the device.
        streams: both streams, in front of the block or behind it.
        state: the block as transforms see it.
        started: when, seconds.
        fp_input: the full-precision stream in front of the block, where the algorithm needs it.
    """

    context: ConversionContext
    index: int
    plan: BlockPlan
    module: nn.Module
    streams: StreamPair
    state: BlockState
    started: float
    fp_input: ActivationStore | None = None

    @classmethod
    @contextmanager
    def taken(
        cls, context: ConversionContext, streams: StreamPair, index: int
    ) -> Iterator[BlockStep]:
        """A block on the device; it is put back afterwards, see
        :func:`spikellm.models.placement.placed`.
        """
        started, module = time.monotonic(), context.blocks.modules[index]
        with placed(module, context.options.device):
            state = context.block_state(index, streams.converted)
            yield cls(context, index, context.plan[index], module, streams, state, started)


class Samples(NamedTuple):
    """What was seen of a block: inputs of its layers, and Q, K and V of its attention."""

    inputs: SampledInputs
    attentions: AttentionSample


class Converted(NamedTuple):
    """A converted block: modules by full name, what else was fitted, and the record of a block that
    the journal had.
    """

    modules: dict[str, nn.Module]
    fitted: FittedBlock
    record: BlockRecord | None = None


def prepare_stream(block: BlockStep) -> None:
    """Let the block work on the residual stream as transforms have made it."""
    block.context.transforms.prepare_stream(block.state)


def propagate_original(block: BlockStep) -> None:
    """Bring the full-precision stream behind the block."""
    if block.context.algorithm.needs_fp_input(block.context.recipe):
        block.fp_input = block.streams.exact.copy()
    forward = partial(block.context.runner.forward, block.index, block.module)
    block.streams.advance_exact(block.index, block.plan.name, forward)


def restored(block: BlockStep) -> Converted | None:
    """The block as the journal has it, if it does."""
    journal = block.context.options.journal
    known = restore(journal, block.index, block.context.model, block.plan) if journal else None
    distributed.barrier()  # all have looked
    return None if known is None else Converted(*known)


def prepare(block: BlockStep) -> TransformedBlock:
    """Apply the transforms within the block."""
    return block.context.transforms.prepare_block(block.state)


def observe(block: BlockStep) -> Samples:
    """Run the block on the converted stream, and sample what the algorithm asks for."""
    context, shard = block.context, block.context.shard
    model, wanted = context.model, context.recipe.calibration.saliency_tokens
    layers = {
        name: model.get_submodule(name)
        for name, settings in block.plan.linears.items()
        if context.algorithm.needs_inputs(settings)
    }
    hessian = context.algorithm.needs_hessian(context.recipe)
    weights = TokenWeights.of(context.recipe.calibration, shard)
    plan = SamplePlan(shard.whole, wanted, shard.before, weights, block.plan.tells_massive_tokens)
    inputs = SampledInputs(layers, plan, hessian=hessian)
    ranked = ranked_attentions(context, block.plan)
    attentions = AttentionSample(
        ranked,
        plan._replace(wanted=min(wanted, ATTENTION_TOKENS)),
        [name for name in ranked if needs_tokens(block.plan.attentions[name][1])],
    )
    if layers or ranked:
        with inputs.hooks(), attentions.hooks(), every_expert_sees_every_token():
            for batch in range(len(block.streams.converted)):
                context.runner.forward(block.index, block.module, block.streams.converted[batch])
        inputs.all_gather()
        attentions.all_gather()
    return Samples(inputs, attentions)


def fit(block: BlockStep, transformed: TransformedBlock, samples: Samples) -> Converted:
    """Fit the block's attention, then its layers."""
    context, streams = block.context, block.streams
    attentions = fit_attentions(context, block.plan, samples.attentions)
    fitted = context.algorithm.fit_block(
        BlockContext(
            block.plan,
            block.module,
            {name: context.model.get_submodule(name) for name in block.plan.linears},
            samples.inputs,
            Streams(streams.converted, streams.exact, block.fp_input or streams.converted),
            context.forward(block.index),
            context.recipe,
            context.options.device,
            context.allocated.salient,
            context.allocated.coding,
        )
    )
    told = fitted._replace(
        dense={**transformed.dense, **fitted.dense},
        notes=[*transformed.notes, *fitted.notes],
        rotated=transformed.rotated,
    )
    return Converted({**transformed.modules, **attentions, **fitted.layers}, told)


def swap(block: BlockStep, converted: Converted) -> None:
    """Put converted modules and other parameters in the place of the block's own."""
    release(block.module)  # what is replaced is needed no more
    for name, module in converted.modules.items():
        replace_module(block.context.model, name, module)
    put_parameters(block.context.model, converted.fitted.dense)


def propagate(block: BlockStep, converted: Converted) -> None:
    """Bring the converted stream behind the block."""
    if converted.fitted.behind is not None:
        for batch, states in enumerate(converted.fitted.behind):
            block.streams.converted[batch] = states
        return
    forward = partial(block.context.runner.forward, block.index, block.module)
    block.streams.converted.advance(forward)


def record(block: BlockStep, converted: Converted) -> BlockRecord:
    """The error behind the block; into the journal if it is new."""
    if converted.record is not None:
        return converted.record
    modules = converted.modules
    found = record_of(block.plan.name, modules, block.streams.pairs(), converted.fitted)
    journal = block.context.options.journal
    if journal:
        if distributed.is_main():
            dense = {name: one.data for name, one in _dense(block, converted).items()}
            journal.write(block.index, modules, dense, found.model_dump())
        distributed.barrier()
    return found


def free_memory(block: BlockStep, converted: Converted) -> None:
    """Let the block, which is back where it was, take no more memory than it needs."""
    journal, home = block.context.options.journal, next(block.module.parameters(), None)
    if journal and home is not None and home.device.type == "cpu":
        journal.hand_back(block.index, converted.modules, _dense(block, converted))
    release(block.module)
    trim()


def _dense(block: BlockStep, converted: Converted) -> dict[str, nn.Parameter]:
    """Parameters that changed and stay dense, as the model now has them."""
    return {name: block.context.model.get_parameter(name) for name in converted.fitted.dense}
