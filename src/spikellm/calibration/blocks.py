"""The loop that all pipelines share: one decoder block after the other, a full-precision and a converted stream through both.

For each block: run the original on the full-precision stream (the targets), let the pipeline see the inputs it asked for as the converted
stream brings them, fit, swap the layers, run the converted block on the converted stream, record the error.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from spikellm.calibration.activations import ActivationStore, SampledInputs
from spikellm.calibration.memory import peak_memory
from spikellm.calibration.progress import Journal
from spikellm.calibration.replay import BlockReplay
from spikellm.errors import NumericalError, RequestError, UnsupportedModelError
from spikellm.modeling.families import Blocks, find_blocks, has_tied_head, linear_layers
from spikellm.modeling.linear import SpikingLinear
from spikellm.modeling.swap import replace_module, spiking_like
from spikellm.pipelines.base import BlockContext, Pipeline
from spikellm.recipe import LinearRecipe, Recipe


@dataclass(frozen=True)
class BlockRecord:
    """What converting one block did.

    Attributes:
        name: full name of the block.
        loss: mean squared difference of the two streams behind it.
        relative_loss: that over the mean square of the full-precision stream.
        layers: full names of the layers converted.
    """

    name: str
    loss: float
    relative_loss: float
    layers: list[str]


@dataclass(frozen=True)
class Progress:
    """Where the loop stands: for people, never saved."""

    index: int
    total: int
    record: BlockRecord
    seconds: float
    peak_memory: int
    resumed: bool


OnBlock = Callable[[Progress], None]


def plan_layers(model: nn.Module, blocks: Blocks, recipe: Recipe) -> list[dict[str, LinearRecipe]]:
    """Settings of every layer to convert, for each block, by full name.

    Raises:
        UnsupportedModelError: a block cannot be converted whole, or its sizes do not fit the recipe.
        RequestError: an override that matches nothing, or nothing left to convert.
    """
    plan: list[dict[str, LinearRecipe]] = []
    names: list[str] = []
    for index, block in enumerate(blocks.modules):
        full = [f"{blocks.name}.{index}.{name}" for name in linear_layers(block)]
        names += full
        plan.append({name: settings for name in full if (settings := recipe.for_module(name)) is not None})
    head = output_head(model)
    if recipe.lm_head and head is not None:
        names.append(head)
    if unmatched := recipe.unmatched_overrides(names):
        raise RequestError(f"the override {unmatched[0]!r} matches no linear layer; names are like {names[0]!r}")
    if not any(plan):
        raise RequestError("the recipe skips every linear layer, so there is nothing to convert")
    return plan


def output_head(model: nn.Module) -> str | None:
    """Full name of the output projection."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return next((name for name, module in model.named_modules() if module is head), None)


@torch.no_grad()
def convert_blocks(
    model: nn.Module,
    windows: Tensor,
    recipe: Recipe,
    pipeline: Pipeline,
    *,
    device: torch.device,
    journal: Journal | None = None,
    on_block: OnBlock | None = None,
) -> list[BlockRecord]:
    """Convert every decoder block of a model in place.

    Args:
        model: full-precision causal language model, in evaluation mode.
        windows: calibration tokens, ``(windows, seqlen)``.
        recipe, pipeline: what to do and how.
        device: where blocks run; each goes there and back.
        journal: where finished blocks are kept, to resume from.
        on_block: called after every block.

    Returns:
        One record a block (and one for the output projection if the recipe converts it).

    Raises:
        NumericalError: NaN or infinity in a stream; names the block.
        UnsupportedModelError: the family cannot be converted exactly.
    """
    blocks = find_blocks(model)
    plan = plan_layers(model, blocks, recipe)
    if recipe.lm_head and has_tied_head(model):
        raise UnsupportedModelError(
            "lm_head is true, but the output projection shares its weight with the input embedding; leave lm_head false"
        )
    replay = BlockReplay(model, blocks, windows)
    exact = ActivationStore(replay.first_inputs)
    converted = exact.copy()
    records = []
    for index, block in enumerate(blocks.modules):
        started, name = time.monotonic(), f"{blocks.name}.{index}"
        home = next(block.parameters()).device
        block.to(device)

        def forward(module: nn.Module, batch: int, hidden: Tensor, index: int = index) -> Tensor:
            return replay.forward(index, module, batch, hidden)

        for batch in range(len(exact)):
            exact[batch] = forward(block, batch, exact[batch])
        _require_finite(
            exact,
            f"the original model gives NaN or infinity behind block {name}; its weights or type ({exact[0].dtype}) do not bear this text",
        )
        known = journal.read(index) if journal else None
        if known is not None:
            layers, record = _restore(model, plan[index], known), BlockRecord(**known.record)
        else:
            layers = _fit(model, name, block, plan[index], converted, exact, forward, recipe, pipeline, device)
        for layer_name, layer in layers.items():
            replace_module(model, layer_name, layer)
        for batch in range(len(converted)):
            converted[batch] = forward(block, batch, converted[batch])
        if known is None:
            record = _record(name, layers, ((converted[i], exact[i]) for i in range(len(exact))))
            if journal:
                journal.write(index, layers, asdict(record))
        block.to(home)
        records.append(record)
        if on_block:
            on_block(Progress(index, len(plan), record, time.monotonic() - started, peak_memory(), known is not None))
    if recipe.lm_head:
        records.append(_convert_head(model, windows, recipe, pipeline, exact, device))
    pipeline.finish(model)
    return records


def _fit(
    model: nn.Module, name: str, block: nn.Module, settings: dict[str, LinearRecipe], converted: ActivationStore, exact: ActivationStore,
    forward: Callable[[nn.Module, int, Tensor], Tensor], recipe: Recipe, pipeline: Pipeline, device: torch.device,
) -> dict[str, SpikingLinear]:  # fmt: skip
    layers = {layer: model.get_submodule(layer) for layer in settings}
    watched = {layer: module for layer, module in layers.items() if pipeline.observes(settings[layer])}
    samples = SampledInputs(
        watched, sum(converted[i].shape[0] * converted[i].shape[1] for i in range(len(converted))), recipe.calibration.saliency_tokens
    )
    if watched:
        with samples.watching():
            for batch in range(len(converted)):
                forward(block, batch, converted[batch])
    return pipeline.fit_block(BlockContext(block, layers, settings, samples, converted, exact, forward, recipe, device))


def _restore(model: nn.Module, settings: dict[str, LinearRecipe], known: Journal.Entry) -> dict[str, SpikingLinear]:
    layers = {name: spiking_like(model.get_submodule(name), settings[name]) for name in settings}
    for name, layer in layers.items():
        layer.load_state_dict(
            {key.removeprefix(f"{name}."): tensor for key, tensor in known.tensors.items() if key.startswith(f"{name}.")}, strict=True
        )
    return layers


def _record(name: str, layers: dict[str, SpikingLinear], pairs: Iterable[tuple[Tensor, Tensor]]) -> BlockRecord:
    """Difference of the two streams, from pairs of converted and exact states."""
    squared, power, count = 0.0, 0.0, 0
    for converted, exact in pairs:
        target = exact.double()
        squared += float((converted.double() - target).square().sum())
        power += float(target.square().sum())
        count += target.numel()
    if not math.isfinite(squared):
        raise NumericalError(
            f"the converted model gives NaN or infinity behind {name}; raise bits or leave its layers out with an override"
        )
    return BlockRecord(name, squared / count, squared / max(power, 1e-300), list(layers))


def _convert_head(
    model: nn.Module, windows: Tensor, recipe: Recipe, pipeline: Pipeline, exact: ActivationStore, device: torch.device
) -> BlockRecord:
    """Convert the output projection, on what the converted blocks feed it."""
    name = output_head(model)
    settings = recipe.for_module(name) if name else None
    if name is None or settings is None:
        raise RequestError("lm_head is true, but the model has no output projection or an override skips it")
    head = model.get_submodule(name)
    samples = SampledInputs({name: head}, windows.numel(), recipe.calibration.saliency_tokens)
    inputs: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    home = next(model.parameters()).device
    with samples.watching():
        for batch in windows.to(home).split(max(1, 2048 // windows.shape[1])):
            model(batch, use_cache=False)
    handle.remove()
    context = BlockContext(
        head, {name: head}, {name: settings}, samples, exact, exact, lambda module, batch, hidden: module(hidden), recipe, device
    )
    layers = pipeline.fit_block(context)
    record = _record(name, layers, ((layers[name](hidden), head(hidden)) for hidden in inputs))
    replace_module(model, name, layers[name])
    return record


def _require_finite(store: ActivationStore, message: str) -> None:
    if not all(bool(torch.isfinite(store[i]).all()) for i in range(len(store))):
        raise NumericalError(message)
