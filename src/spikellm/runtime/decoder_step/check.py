"""A native step is taken only where it agrees with the library: every block, from the same input
and cache, must give the same integers in every layer and its output to rounding.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from spikellm.kernels.native.step_plan import INPUT, OUTPUT
from spikellm.kernels.native.step_run import run_step
from spikellm.kernels.native.weight_only import MOST_TOKENS
from spikellm.models.decoder_capture import Captured, capture
from spikellm.models.families import is_linear
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.vocabulary import CodedHead
from spikellm.runtime.decoder_step.blocks import Built, Reading, build
from spikellm.runtime.decoder_step.parts import UndescribedError
from spikellm.runtime.decoder_step.step import DecoderStep, embedding_of, entries_of, finish_of

_READINGS = [
    Reading(parallel, by_head, behind)
    for behind in (False, True)
    for by_head in (False, True)
    for parallel in (False, True)
]
_OTHER_CODES = 1e-2  # of a layer's, which rounding of sums in another order may move by one
_CLOSE = 2.0**-5  # of the largest value


@dataclass
class Pass:
    """A pass that is compared: tokens and positions ``(batch, tokens)``, mask and cache before."""

    tokens: Tensor
    positions: Tensor
    mask: Tensor | None
    cache: Cache


def checked_step(model: Any, given: Pass, run: Any) -> tuple[DecoderStep | str, Any]:
    """The native step of a model if it agrees with ``run``, the library's own pass on the cache;
    else why there is none. The output of that pass, too.
    """
    before = copied(given.cache)
    kinds = (SpikingLinear, CodedHead)
    layers = {one for one in model.modules() if isinstance(one, kinds) or is_linear(one)}
    seen = capture(model, run, layers)
    reason = "it has no blocks"
    for reading in _READINGS:
        try:
            built = build(model, seen, reading)
            found = _agreeing(model, built, seen, given, before)
        except UndescribedError as error:
            found = str(error)
        except Exception as error:
            found = f"{type(error).__name__} where it was read as {reading}"
        if isinstance(found, DecoderStep):
            return found, seen.output
        reason = found if reading == _READINGS[0] else reason
    return reason, seen.output


def copied(cache: Cache) -> Any:
    """Layers of a cache as they are now, in memory of their own once a step asks for them."""
    return SimpleNamespace(layers=[copy.copy(layer) for layer in cache.layers])


def _agreeing(
    model: Any, built: Built, seen: Captured, given: Pass, before: Any
) -> DecoderStep | str:
    tokens, positions = given.tokens, given.positions
    embed = embedding_of(model, tokens, positions, seen.given[0])
    if embed is None:
        return "its input embedding is none that it knows"
    finish = finish_of(model, seen)
    if finish is None:
        return "what it does to its logits behind the output projection is not known"
    step = DecoderStep(model, built, embed, finish, type(seen.output))
    cached = entries_of(before, tokens.shape[1])
    layers = iter(built.layers)
    program = built.program
    for index, span in enumerate(pairwise([*built.starts, program.length])):
        inside = step.given(seen.given[index], positions, given.mask, cached)
        is_block = index + 1 < len(built.starts)
        result = INPUT if is_block else OUTPUT
        own = [next(layers) for _ in range(len(program.shown(*span)) // 2)]
        if any(layer not in seen.outputs for layer in own):
            return f"block {index} does not call all of its linear layers"
        forced = [seen.outputs[layer].float() for layer in own]
        output, shown = run_step(program, inside, span, result=result, forced=forced)
        for layer, x, y in zip(own, shown[::2], shown[1::2], strict=True):
            if (problem := _differing(layer, x, y, seen)) is not None:
                return f"block {index}: {problem}" if is_block else problem
        if is_block and not _close(output, seen.given[index + 1]):
            return f"block {index} gives something else"
    return step


def _differing(layer: nn.Module, x: Tensor, y: Tensor, seen: Captured) -> str | None:
    """What of a layer's inputs and outputs in the native step, ``(tokens, channels)``, is not the
    library's.
    """
    wanted, output = seen.inputs[layer].reshape(x.shape), seen.outputs[layer]
    if not _close(x, wanted):
        return "the input of a layer is not the library's"
    spikes = isinstance(layer, SpikingLinear) and layer.neuron is not None
    if torch.equal(x, wanted.float()):
        coded = isinstance(layer, CodedHead) and len(x) <= MOST_TOKENS
        exact = spikes or coded
        same = torch.equal(y, output.float().reshape(y.shape)) if exact else _close(y, output)
        return None if same else "a layer gives something else"
    if isinstance(layer, SpikingLinear) and spikes:
        mine, its = layer.encode(x.to(wanted.dtype))[0], layer.encode(wanted)[0]
        if float((mine != its).float().mean()) > _OTHER_CODES or int((mine - its).abs().max()) > 1:
            return "the spikes of a layer are not the library's"
    return None


def _close(found: Tensor, wanted: Tensor) -> bool:
    found, wanted = found.float(), wanted.float().reshape(found.shape)
    if not bool(wanted.isfinite().all()):
        return False
    return float((found - wanted).abs().max()) <= _CLOSE * float(wanted.abs().max())
