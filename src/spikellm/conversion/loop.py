"""The loop that all pipelines share: one decoder block after the other, a full-precision and a
converted stream through both.

For each block: run the original on the full-precision stream (the targets), let the pipeline see
the inputs it asked for as the converted stream brings them, fit, swap the layers, run the converted
block on the converted stream, record the error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spikellm.algorithms import Algorithm, BlockContext, FittedBlock
from spikellm.conversion.allocate import allocate_over_model
from spikellm.conversion.attention import fit_attention
from spikellm.conversion.block_runner import BlockRunner, batch_windows
from spikellm.conversion.estimate import Needs, estimate, find_units
from spikellm.conversion.head import convert_head, head_fitter
from spikellm.conversion.journal import Journal
from spikellm.conversion.record import BlockRecord, OnBlock, Progress, record_of
from spikellm.conversion.restore import restore
from spikellm.core import distributed
from spikellm.core.errors import NumericalError, RequestError
from spikellm.core.fingerprint import fingerprint
from spikellm.core.memory import peak_memory
from spikellm.core.offload import release, trim
from spikellm.data.shards import WindowShard, shard_windows
from spikellm.models.attention_interface import CHILD
from spikellm.models.experts import every_expert_sees_every_token
from spikellm.models.families import find_blocks
from spikellm.models.plan import BlockPlan, plan_blocks, plan_head
from spikellm.models.swap import replace_module, with_parameters
from spikellm.observers.activation_store import ActivationStore, SharedStream
from spikellm.observers.attention_stats import ATTENTION_TOKENS, AttentionSample
from spikellm.observers.input_stats import SampledInputs, stride_of
from spikellm.recipe import Recipe
from spikellm.transforms.residual_rotation import ModelRotation
from spikellm.transforms.wrap import wrap_online


class Streams(NamedTuple):
    """What a block is fed and should give; see :class:`spikellm.algorithms.BlockContext`."""

    inputs: ActivationStore
    fp_output: ActivationStore
    fp_input: ActivationStore


Store = Callable[[Needs], Path | None] | str | Path | None


@torch.no_grad()
def convert_blocks(
    model: nn.Module,
    windows: Tensor,
    recipe: Recipe,
    pipeline: Algorithm,
    *,
    device: torch.device,
    journal: Journal | None = None,
    on_block: OnBlock | None = None,
    on_stage: Callable[[str], object] = lambda _: None,
    shared: SharedStream | None = None,
    store: Store = None,
) -> list[BlockRecord]:
    """Convert every decoder block of a model in place.

    Args:
        model: full-precision causal language model, in evaluation mode.
        windows: calibration tokens, ``(windows, seqlen)``.
        recipe, pipeline: what to do and how.
        device: where blocks run; each goes there and back.
        journal: where finished blocks are kept, to resume from.
        on_block: called after every block, and after the output projection.
        on_stage: called with a few words before each part of a look at the whole model, where the
            pipeline takes one first.
        store: folder to keep the two streams in, instead of RAM; or a function that is told what is
            needed and returns one.
        shared: where the full-precision stream is kept for the next conversion of the same model.

    Returns:
        One record a block (and one for the output projection if the recipe converts it).

    Raises:
        NumericalError: NaN or infinity in a stream; names the block.
        UnsupportedModelError: the family cannot be converted exactly.
    """
    blocks = wrap_online(model, find_blocks(model), recipe)
    plan, head = plan_blocks(model, blocks, recipe), plan_head(model, recipe)
    surveyed = _check(plan, head, recipe, pipeline)
    part = _own_part(windows, recipe, pipeline)
    folder = _folder(
        store, model, blocks.modules, plan, head, part, recipe, pipeline, surveyed=surveyed
    )
    runner = BlockRunner(model, blocks, part.windows, _sizes(part.windows, recipe))
    rotation = ModelRotation(model, blocks, recipe)
    salient = (
        allocate_over_model(
            model, part, blocks, plan, runner, rotation, device, recipe, pipeline, on_stage, folder
        )
        if surveyed
        else {}
    )
    rotation.ends(part.windows[:1])
    exact = ActivationStore(runner.first_inputs(), folder)
    if shared:
        shared.open(
            _stream_key(part.windows, recipe, device, surveyed=surveyed), len(blocks.modules), exact
        )
    converted = exact.copy()
    records, total, tell = (
        list[BlockRecord](),
        len(plan) + (head is not None),
        on_block or (lambda _: None),
    )
    for index, block in enumerate(blocks.modules):
        started, name, home = time.monotonic(), plan[index].name, next(block.parameters()).device
        block.to(device)

        def forward(module: nn.Module, hidden: Tensor, index: int = index) -> Tensor:
            return runner.forward(index, module, hidden)

        rotation.stream(index, block, converted[0][:1], forward)
        fp_input = exact.copy() if pipeline.needs_fp_input(recipe) else None
        exact = _targets(exact, partial(forward, block), index, shared)
        _require_finite(
            exact,
            f"the original model gives NaN or infinity behind block {name}; its weights or type"
            f" ({exact[0].dtype}) do not bear this text",
        )
        known = restore(journal, index, model, plan[index]) if journal else None
        distributed.barrier()  # all have looked
        if known is not None:
            modules, fitted, record = known
        else:
            streams = Streams(converted, exact, fp_input or converted)
            modules, fitted = _fit(
                model,
                plan[index],
                block,
                streams,
                forward,
                recipe,
                pipeline,
                device,
                part,
                rotation,
                salient,
            )
        _put_in(model, block, modules, fitted.dense)
        dense = {parameter: model.get_parameter(parameter) for parameter in fitted.dense}
        converted.advance(partial(forward, block))
        if known is None:
            record = record_of(
                name, modules, ((converted[i], exact[i]) for i in range(len(exact))), fitted
            )
            _keep(journal, index, modules, dense, record)
        block.to(home)
        if journal and home.type == "cpu":
            journal.hand_back(index, modules, dense)
        release(block)
        trim()
        records.append(record)
        tell(
            Progress(
                index, total, record, time.monotonic() - started, peak_memory(), known is not None
            )
        )
    if head:
        started = time.monotonic()
        del exact, converted  # what the projection is fed takes their place
        records.append(
            convert_head(model, blocks.modules, head, windows, recipe, pipeline, folder, device)
        )
        tell(
            Progress(
                total - 1,
                total,
                records[-1],
                time.monotonic() - started,
                peak_memory(),
                resumed=False,
            )
        )
    return records


def _stream_key(windows: Tensor, recipe: Recipe, device: torch.device, *, surveyed: bool) -> str:
    """Names the full-precision stream: what of a conversion its bits depend on.

    After a survey blocks are rotated inside before they are run, for which all of a recipe counts.
    """
    rotation = recipe.rotation
    turned: object = rotation.residual, recipe.seed if rotation.residual else None
    if surveyed and rotation.active:
        turned = recipe.model_dump_json(exclude={"name", "description"})
    return f"{fingerprint(windows)} {recipe.attention.spiking} {turned} {device}"


def _keep(
    journal: Journal | None,
    index: int,
    modules: Mapping[str, nn.Module],
    dense: Mapping[str, nn.Parameter],
    record: BlockRecord,
) -> None:
    if journal:
        if distributed.is_main():
            journal.write(
                index,
                modules,
                {name: parameter.data for name, parameter in dense.items()},
                asdict(record),
            )
        distributed.barrier()


def _check(
    plan: list[BlockPlan], head: BlockPlan | None, recipe: Recipe, pipeline: Algorithm
) -> bool:
    """Refuse what the pipeline cannot do; returns whether it looks at the whole model first."""
    fits = [(block, pipeline.codes) for block in plan] + (
        [(head, head_fitter(pipeline).codes)] if head else []
    )
    for block, codes in fits:
        for name, one in block.linears.items():
            if one.weights.code not in codes:
                raise RequestError(
                    f"pipeline {recipe.pipeline!r} fits weights of code {' or '.join(codes)}, and"
                    f" {name} asks for {one.weights.code!r}; set pipeline to gptq"
                )
    return any(
        pipeline.needs_survey(one) or one.activations.allocated_over_model
        for block in plan
        for one in block.linears.values()
    )


def _own_part(windows: Tensor, recipe: Recipe, pipeline: Algorithm) -> WindowShard:
    size = batch_windows(windows.shape[1])
    part = shard_windows(windows, size)
    if distributed.world_size() > 1:
        pipeline.check_share([len(batch) for batch in part.windows.split(size)], recipe)
    return part


def _targets(
    states: ActivationStore,
    forward: Callable[[Tensor], Tensor],
    index: int,
    shared: SharedStream | None,
) -> ActivationStore:
    """States of the full-precision stream behind a block."""
    known = shared.behind(index) if shared else None
    if known is not None:
        return known.copy()
    states.advance(forward)
    if shared:
        shared.keep(index, states)
    return states


def _put_in(
    model: nn.Module,
    block: nn.Module,
    modules: Mapping[str, nn.Module],
    dense: Mapping[str, Tensor],
) -> None:
    """Converted modules and other parameters in the place of a block's own."""
    release(block)  # what is replaced is needed no more
    for name, module in modules.items():
        replace_module(model, name, module)
    for parameter, value in dense.items():
        owner, _, leaf = parameter.rpartition(".")
        if value.dim() == 1:
            model.get_parameter(parameter).data.copy_(value)
        else:  # the layer as it was stays as it was
            old = model.get_submodule(owner)
            replace_module(
                model, owner, with_parameters(old, {leaf: value.to(old.get_parameter(leaf).device)})
            )


def _folder(
    store: Store,
    model: Any,
    blocks: nn.ModuleList,
    plan: list[BlockPlan],
    head: BlockPlan | None,
    part: WindowShard,
    recipe: Recipe,
    pipeline: Algorithm,
    *,
    surveyed: bool,
) -> Path | None:
    if not callable(store):
        return None if store is None else Path(store)
    units = find_units(model, blocks, plan, head, pipeline.observes)
    state = (
        model.get_input_embeddings().weight.shape[1]
        * torch.empty(0, dtype=model.dtype).element_size()
    )
    streams = (
        max(
            (3 if pipeline.needs_fp_input(recipe) else 2) * part.windows.numel(),
            part.whole if head else 0,
        )
        * state
    )  # that of the projection takes the place of all
    sampled = -(-part.whole // stride_of(part.whole, recipe.calibration.saliency_tokens))
    return store(
        estimate(
            model,
            units,
            streams,
            sampled,
            hessian=pipeline.needs_hessian(recipe),
            sequential=pipeline.needs_fp_input(recipe),
            rotated=recipe.rotation.active,
            whole=surveyed,
        )
    )


def _sizes(windows: Tensor, recipe: Recipe) -> set[int]:
    """Numbers of windows that are run at a time beside whole batches: one where rotations are
    checked, and of a pipeline that learns its batch size and what is left of each batch.
    """
    step = recipe.algorithm.windows_of_a_step
    return ({1} if recipe.rotation.active else set()) | (
        {step, *(batch.shape[0] % step for batch in windows.split(batch_windows(windows.shape[1])))}
        if step is not None
        else set()
    )


def _fit(
    model: nn.Module,
    plan: BlockPlan,
    block: nn.Module,
    streams: Streams,
    forward: Callable[[nn.Module, Tensor], Tensor],
    recipe: Recipe,
    pipeline: Algorithm,
    device: torch.device,
    part: WindowShard,
    rotation: ModelRotation,
    salient: Mapping[str, int],
) -> tuple[dict[str, nn.Module], FittedBlock]:
    turned, converted = rotation.inside(plan, block, streams.inputs, forward, part), streams.inputs
    layers = {name: model.get_submodule(name) for name in plan.linears}
    watched = {
        name: module for name, module in layers.items() if pipeline.observes(plan.linears[name])
    }
    ranked = {
        name: model.get_submodule(name)
        for name, (_, settings) in plan.attentions.items()
        if settings.key.salient_rate + settings.value.salient_rate > 0 or settings.center
    }
    wanted = recipe.calibration.saliency_tokens
    samples = SampledInputs(
        watched, part.whole, wanted, hessian=pipeline.needs_hessian(recipe), before=part.before
    )
    attention_samples = AttentionSample(
        ranked, part.whole, min(wanted, ATTENTION_TOKENS), part.before
    )
    if watched or ranked:
        with samples.hooks(), attention_samples.hooks(), every_expert_sees_every_token():
            for batch in range(len(converted)):
                forward(block, converted[batch])
        samples.all_gather()
        attention_samples.all_gather()
    modules: dict[str, nn.Module] = dict(turned.rotations)
    for name, (shape, settings) in plan.attentions.items():
        sample = attention_samples[name] if name in ranked else None
        modules[f"{name}.{CHILD}"] = fit_attention(
            name, shape, settings, sample, recipe.seed, device
        )
        replace_module(
            model, f"{name}.{CHILD}", modules[f"{name}.{CHILD}"]
        )  # from here on the block codes Q, K and V
    fitted = pipeline.fit_block(
        BlockContext(
            plan.name,
            block,
            plan.heads,
            layers,
            plan.linears,
            samples,
            *streams,
            forward,
            recipe,
            device,
            salient,
        )
    )
    told = fitted._replace(
        dense={**turned.dense, **fitted.dense},
        notes=[*turned.notes, *fitted.notes],
        rotated=turned.channels,
    )
    return {**modules, **fitted.layers}, told


def _require_finite(store: ActivationStore, message: str) -> None:
    if not all(bool(torch.isfinite(store[i]).all()) for i in range(len(store))):
        raise NumericalError(message)
