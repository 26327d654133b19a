"""The loop that all algorithms share: one decoder block after the other, a full-precision and a
converted stream through both.

    prepare      transforms
    observe      what layers and attention are fed as the converted stream brings it
    fit          the algorithm
    swap         converted modules in the place of the block's own
    propagate    both streams: the original's before the fit, which aims at it, the converted behind
    record       the error of the block, the journal
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor, nn

from spikellm.algorithms import Algorithm
from spikellm.conversion.allocate import allocate_over_model
from spikellm.conversion.context import ConversionContext
from spikellm.conversion.head import convert_head
from spikellm.conversion.options import RunOptions
from spikellm.conversion.plan import plan_conversion
from spikellm.conversion.record import BlockRecord, Progress
from spikellm.conversion.steps import (
    BlockStep,
    fit,
    free_memory,
    observe,
    prepare,
    prepare_stream,
    propagate,
    propagate_original,
    record,
    restored,
    swap,
)
from spikellm.conversion.streams import StreamPair
from spikellm.conversion.text_size import too_little_text
from spikellm.conversion.vocabulary import code_vocabulary
from spikellm.core.memory import peak_memory
from spikellm.core.warn import say_once
from spikellm.recipe import Recipe


@torch.no_grad()
def convert_blocks(
    model: nn.Module, windows: Tensor, recipe: Recipe, algorithm: Algorithm, options: RunOptions
) -> tuple[list[BlockRecord], list[str]]:
    """Convert every decoder block of a model in place, and the output projection or the tables of
    the vocabulary if the recipe says so.

    Args:
        model: full-precision causal language model, in evaluation mode.
        windows: calibration tokens, ``(windows, seqlen)``.
        recipe, algorithm: what to do and how.
        options: where it runs, and who is told.

    Returns:
        One record a block, one for the output projection, and one a coded table; what a user
        should know of the text, which is said as a warning too.

    Raises:
        NumericalError: NaN or infinity in a stream; names the block.
        UnsupportedModelError: the family cannot be converted exactly.
        RequestError: see :func:`spikellm.conversion.plan.plan_conversion`.
    """
    plan = plan_conversion(model, windows, recipe, algorithm)
    notes = too_little_text(plan)
    for note in notes:
        say_once(note)
    context = ConversionContext.begin(plan, options)
    context = replace(context, allocated=allocate_over_model(context))
    context.prepare_model()
    records = _convert_each(context)
    if context.head:
        started = time.monotonic()
        records.append(convert_head(context, context.head))
        _tell(context, len(context.plan), records[-1], started)
    if context.vocabulary and recipe.vocabulary:
        records += code_vocabulary(model, context.vocabulary, recipe.vocabulary)
    return records, notes


def _convert_each(context: ConversionContext) -> list[BlockRecord]:
    streams = StreamPair.begin(context)
    records = []
    for index in range(len(context.plan)):
        with BlockStep.taken(context, streams, index) as block:
            prepare_stream(block)
            propagate_original(block)
            converted = restored(block)
            if converted is None:
                transformed = prepare(block)
                samples = observe(block)
                converted = fit(block, transformed, samples)
            swap(block, converted)
            propagate(block, converted)
            records.append(record(block, converted))
        free_memory(block, converted)
        _tell(context, index, records[-1], block.started, resumed=converted.record is not None)
    return records


def _tell(
    context: ConversionContext,
    index: int,
    found: BlockRecord,
    started: float,
    *,
    resumed: bool = False,
) -> None:
    total = len(context.plan) + (context.head is not None)
    seconds = time.monotonic() - started
    context.options.on_block(Progress(index, total, found, seconds, peak_memory(), resumed))
